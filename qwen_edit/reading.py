"""Reading tensors of safetensors and GGUF files ahead of their use, several at a time.

A memory-mapped file costs a page fault for each 4 KiB; reading with large calls from a few threads keeps a fast disk, or
the page cache, busy while the tensors before are copied to the card and quantized. The threads share each large tensor, so
that few buffers are enough: memory that is touched for the first time costs as much as reading into it.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .gguf import SUFFIX

WORKERS = 8
PART = 8 * 2**20  # bytes that one thread reads at once
LARGE = 2**20  # tensors above this have buffers of the largest one's size, of which there are few
LARGE_BUFFERS = 5  # one in use, one complete, three being read
AHEAD = 4 * WORKERS  # tensors that are being read or wait for their use; most are small


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, and where its bytes are. ``keep``: it is read into memory of its own, where it may
    stay."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    keep: bool = False

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def mapped(wanted: Mapping[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor under its name in ``wanted``; the files' own pages serve as memory."""
    for path in {s.path for s in wanted.values()}:
        here = [(name, s) for name, s in wanted.items() if s.path == path]
        if path.suffix.lower() == SUFFIX:
            pages = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            yield from ((name, pages[s.offset :][: s.nbytes].view(s.dtype).view(s.shape)) for name, s in here)
        else:
            with safe_open(path, framework="pt") as file:
                yield from ((name, file.get_tensor(s.name)) for name, s in here)


def read_ahead(wanted: Mapping[str, Stored], *, pinned: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor under its name in ``wanted``, in order, in RAM.

    A tensor that is not kept lies in a buffer which the next ones take over: use it before asking for the next.

    Args:
        pinned: the buffers are page-locked, for fast copies to a card.

    Raises:
        OSError: a file ends early or can't be read.
    """
    try:
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="qwen_edit_read") as pool:
            try:
                yield from _in_order(wanted, pool, pinned)
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if pinned and hasattr(torch._C, "_host_emptyCache"):  # else torch keeps the buffers page-locked for good
            torch._C._host_emptyCache()


def _in_order(
    wanted: Mapping[str, Stored], pool: ThreadPoolExecutor, pinned: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    largest = max((stored.nbytes for stored in wanted.values() if not stored.keep), default=0)
    # by whether a tensor is large
    free = {True: _Buffers(largest, LARGE_BUFFERS, pinned), False: _Buffers(min(largest, LARGE), AHEAD, pinned)}
    pending: deque[tuple[str, torch.Tensor, list[Future]]] = deque()
    remaining = deque(wanted.items())
    while remaining or pending:
        while remaining and len(pending) < AHEAD:
            name, stored = remaining[0]
            buffers = free[stored.nbytes > LARGE]
            if not stored.keep and not buffers.any_left:
                break
            remaining.popleft()
            buffer = _fresh(stored.nbytes) if stored.keep else buffers.take()
            starts = range(0, max(1, stored.nbytes), PART)
            pending.append((name, buffer, [pool.submit(_read, stored, buffer, start) for start in starts]))
        name, buffer, parts = pending.popleft()
        for part in parts:
            part.result()
        yield name, _as_tensor(wanted[name], buffer)
        if not wanted[name].keep:
            free[wanted[name].nbytes > LARGE].give(buffer)


class _Buffers:
    """Equal buffers, made when they are first needed: page-locking them takes a while, and the workers read meanwhile."""

    def __init__(self, nbytes: int, most: int, pinned: bool) -> None:
        self._nbytes, self._most, self._pinned = nbytes, most, pinned
        self._free: list[torch.Tensor] = []

    @property
    def any_left(self) -> bool:
        return bool(self._free) or self._most > 0

    def take(self) -> torch.Tensor:
        if self._free:
            return self._free.pop()
        self._most -= 1
        return torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)


def _fresh(nbytes: int) -> torch.Tensor:
    """Memory of huge pages where the system has them, for which NumPy asks: touching it for the first time page by page
    takes longer than reading into it."""
    return torch.from_numpy(np.empty(nbytes, dtype=np.uint8))


def read_now(stored: Stored) -> torch.Tensor:
    """One small tensor, in memory of its own."""
    buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
    for start in range(0, stored.nbytes, PART):
        _read(stored, buffer, start)
    return _as_tensor(stored, buffer)


def _read(stored: Stored, buffer: torch.Tensor, start: int) -> None:
    """The part of a tensor that begins at byte ``start``, to its place in ``buffer``."""
    view: Any = memoryview(buffer.numpy().data)[start : min(stored.nbytes, start + PART)]
    done = 0
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.offset + start)
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise OSError(f"{stored.path.name} ends inside {stored.name}.")
            done += count


def _as_tensor(stored: Stored, buffer: torch.Tensor) -> torch.Tensor:
    return buffer[: stored.nbytes].view(stored.dtype).view(stored.shape)
