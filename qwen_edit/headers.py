"""The headers of safetensors and GGUF files: what lies where, and why a file is no such file, without reading weights."""

import json
import struct
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import WEIGHTS
from .gguf import ARCHITECTURES, SUFFIX, read_gguf_header

# safetensors itself refuses headers over 100 MB; a 60-block transformer's is under 1 MB.
MAX_HEADER_BYTES = 100_000_000
KEPT = 16  # headers; loading asks each file for its own several times
SETTLED_S = 2.0  # how old a file must be: one that is written twice within a tick of the clock keeps its time

Contents = tuple[Mapping[str, Mapping], Mapping[str, str]]  # tensors and free entries


def read_header(path: Path, architectures: Sequence[str | None] = ARCHITECTURES) -> Mapping[str, Mapping]:
    """Tensor name -> {"dtype", "shape", "data_offsets"}, without reading weights; offsets are counted from the file's start.

    Files whose names end in .gguf are read as such, see ``gguf.py``. Parsed once for as long as size and times of the file
    stay; what is returned is everybody's and not to be changed.

    Args:
        architectures: what a GGUF file may be.

    Raises:
        ValueError: not a safetensors (or GGUF) file, with the likely cause, or a damaged one.
    """
    return _contents(path, tuple(architectures))[0]


def read_metadata(path: Path) -> Mapping[str, str]:
    """The free entries of a file that ``read_header`` has accepted, those that are text."""
    return _contents(path, tuple(ARCHITECTURES))[1]


def _contents(path: Path, architectures: tuple[str | None, ...]) -> Contents:
    state = path.stat()
    settled = time.time() - state.st_mtime > SETTLED_S
    written = (state.st_ino, state.st_mtime_ns, state.st_ctime_ns)  # copies may keep the times of what they copy
    return (_kept if settled else _parsed)(path, state.st_size, written, architectures)


def _parsed(path: Path, size: int, _written: tuple[int, ...], architectures: tuple[str | None, ...]) -> Contents:
    is_gguf = path.suffix.lower() == SUFFIX
    with path.open("rb") as file:
        start = file.read(512)
    cause = _no_weights(start) or (None if is_gguf else _not_safetensors(start, size))
    if cause is not None:
        kind = "GGUF" if is_gguf else "safetensors"
        raise ValueError(f"{WEIGHTS} {_shown(path)} ({size:,} bytes) is not a {kind} file: {cause}")
    if is_gguf:
        tensors, found = read_gguf_header(path, architectures)
        metadata = {key: value for key, value in found.items() if isinstance(value, str)}
    else:
        tensors, metadata = _safetensors_header(path, size)
    return MappingProxyType(tensors), MappingProxyType(metadata)


_kept = lru_cache(maxsize=KEPT)(_parsed)  # what raises is looked at anew each time


def _safetensors_header(path: Path, size: int) -> tuple[dict[str, dict], dict[str, str]]:
    try:
        # safetensors checks offsets, overlaps and trailing bytes; its own header gives shapes without reading.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{WEIGHTS} {_shown(path)} ({size:,} bytes) is damaged or was not downloaded to its end ({e}). Download it again."
        ) from e
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header, metadata


def _shown(path: Path) -> str:
    """The file's name, with its folders when it is part of a diffusers folder."""
    return "/".join(path.parts[-3:]) if (path.parent.parent / "model_index.json").is_file() else path.name


def _no_weights(start: bytes) -> str | None:
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer. Run 'git lfs pull', or download the file itself."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably an error page saved by the download. Download the file again."
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it is a zip or pickle file. This pack loads safetensors and GGUF only, because a pickle can run code."
    return None


def _not_safetensors(start: bytes, size: int) -> str | None:
    if start.startswith(b"GGUF"):
        return (
            "it is a GGUF file. This pack takes those as transformers and text encoders, under names that end in .gguf."
        )
    if size < 10:
        return "it is empty or cut off. Download it again."
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES or start[8:9] != b"{":
        return "its first bytes are no safetensors header. It is another kind of file, or damaged."
    if length + 8 > size:
        return "it ends inside its own header, so the download was cut off. Download it again."
    return None
