"""Reading tensors of safetensors and GGUF files ahead of their use, several at a time.

A memory-mapped file costs a page fault for each 4 KiB; reading with large calls from several threads keeps a fast disk, or
the page cache, busy while the tensors before are copied to the card and quantized. What is read at once are parts of a
file, not tensors: small tensors that lie side by side share one, large ones have several, each on its own way to the card.
"""

import threading
from collections import deque
from collections.abc import Generator, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import safe_open

from .gguf import SUFFIX
from .host_memory import Lock, page_lock
from .staging import Slab, Staging

WORKERS = 8
PART = 16 * 2**20  # bytes that one thread reads at once
SLABS = 3 * WORKERS  # parts that are being read, wait for their turn or are being copied
GAP = 4096  # bytes that nobody wants, read for the sake of what lies behind them
OPEN = 4  # parts that may still grow: tensors and their scales may lie in places of their own, which advance together

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, and where its bytes are."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(eq=False)
class _Part:
    """Bytes ``start`` to ``end`` of a file, which pass through ``slab``. ``left``: how many of ``tensors`` have not taken
    theirs."""

    path: Path
    start: int
    end: int
    tensors: list[Stored] = field(default_factory=list)
    left: int = 0
    slab: Slab | None = None
    read: Future | None = None


def mapped(wanted: Mapping[Key, Stored]) -> Generator[tuple[Key, torch.Tensor], None, None]:
    """Each tensor under its key in ``wanted``; the files' own pages serve as memory."""
    for path in {s.path for s in wanted.values()}:
        here = [(key, s) for key, s in wanted.items() if s.path == path]
        if path.suffix.lower() == SUFFIX:
            pages = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            yield from ((key, pages[s.offset :][: s.nbytes].view(s.dtype).view(s.shape)) for key, s in here)
        else:
            with safe_open(path, framework="pt") as file:
                yield from ((key, file.get_tensor(s.name)) for key, s in here)


def read_ahead(
    wanted: Mapping[Key, Stored], device: torch.device, lock: Lock = page_lock
) -> Generator[tuple[Key, torch.Tensor], None, None]:
    """Each tensor under its key in ``wanted``, in that order, in memory of its own on ``device``. Copies to a card are queued
    in the current stream, in which the tensors are to be used. Close it where not all of them may be taken.

    Args:
        lock: page-locks what they pass through, from the threads that read.

    Raises:
        OSError: a file ends early or can't be read.
    """
    parts, parts_of = _plan(wanted)
    waiting, staging = deque(parts), Staging(device, SLABS, PART, lock)
    files: dict[tuple[int, Path], BinaryIO] = {}

    def read_more() -> None:
        while waiting:
            slab = staging.take()
            if slab is None:
                return
            part = waiting.popleft()
            part.slab = slab
            part.read = pool.submit(_read, part, slab, files)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="qwen_edit_read") as pool:
        try:
            for key, stored in wanted.items():
                out = torch.empty(stored.nbytes, dtype=torch.uint8, device=device)
                at = 0
                for part in parts_of[key]:
                    read_more()
                    while part.read is None:  # all slabs are in use, most of them by copies
                        staging.wait()
                        read_more()
                    part.read.result()
                    assert part.slab is not None
                    end = min(stored.nbytes, part.end - stored.offset)
                    staging.copy(out[at:end], part.slab, stored.offset + at - part.start)
                    at, part.left = end, part.left - 1
                    if part.left == 0:
                        staging.give_back(part.slab)
                yield key, out.view(stored.dtype).view(stored.shape)
        finally:
            pool.shutdown(cancel_futures=True)
            for file in files.values():
                file.close()
            staging.close()


def _plan(wanted: Mapping[Key, Stored]) -> tuple[list[_Part], dict[Key, list[_Part]]]:
    """What to read, in the order in which it is needed, and of which parts each tensor is made."""
    parts: list[_Part] = []
    parts_of: dict[Key, list[_Part]] = {}
    growing: deque[_Part] = deque(maxlen=OPEN)
    for key, stored in wanted.items():
        at, end = stored.offset, stored.offset + stored.nbytes
        mine = parts_of[key] = []
        while at < end:
            part = next((p for p in growing if _reaches(p, stored.path, at)), None)
            if part is None:
                part = _Part(stored.path, at, at)
                parts.append(part)
                growing.append(part)
            at = part.end = min(end, part.start + PART)
            part.tensors.append(stored)
            part.left += 1
            mine.append(part)
    return parts, parts_of


def _reaches(part: _Part, path: Path, at: int) -> bool:
    """Whether a part can grow to hold what begins at byte ``at`` of a file."""
    return part.path == path and 0 <= at - part.end <= GAP and at < part.start + PART


def _read(part: _Part, slab: Slab, files: dict[tuple[int, Path], BinaryIO]) -> None:
    """Fill a part's slab. ``files`` are open, by thread and path."""
    here = threading.get_ident(), part.path
    if here not in files:
        files[here] = part.path.open("rb", buffering=0)
    file: Any = files[here]
    file.seek(part.start)
    done, size = 0, part.end - part.start
    while done < size:
        count = file.readinto(slab.view[done:size])
        if not count:
            inside = next(s for s in part.tensors if s.offset + s.nbytes > part.start + done)
            raise OSError(f"{part.path.name} ends inside {inside.name}.")
        done += count
    slab.lock()
