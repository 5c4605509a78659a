"""The log file: one JSON object per line, bounded in size, never in the way of the picture. And whole files beside it."""

import json
import logging
import os
import tempfile
import threading
from pathlib import Path

_lock = threading.Lock()
_warned: set[str] = set()


def append_record(path: Path, record: dict, max_bytes: int = 5 * 2**20, files: int = 3) -> bool:
    """Append a record to `path` as one line; True when it is on the way to the disk.

    The line is written by one call in append mode, so neither readers nor other processes see half a line.
    When the file would pass `max_bytes`, it is renamed to `path`.1, and older ones onwards, `files` in all. A
    full disk or a folder that cannot be written costs one warning per path and process, and nothing else.
    """
    line = (json.dumps(record, separators=(",", ":")) + "\n").encode("ascii")
    try:
        with _lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            _rotate(path, len(line), max_bytes, files)
            _append(path, line)
    except OSError as error:
        if str(path) not in _warned:
            _warned.add(str(path))
            logging.warning("Qwen Edit Fast: the performance log %s cannot be written (%s).", path, error)
        return False
    _warned.discard(str(path))
    return True


def read_records(path: Path) -> list[dict]:
    """The records of one log file, oldest first; lines that a crash left incomplete are passed over."""
    records = []
    if path.is_file():  # a device could be read for ever
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def write_whole(path: Path, text: str) -> None:
    """Write a file that nobody sees half: under another name in the same folder first. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's own lets nobody else read
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _rotate(path: Path, incoming: int, max_bytes: int, files: int) -> None:
    if not path.exists() or path.stat().st_size + incoming <= max_bytes:
        return
    for number in range(files - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
        if newer.exists():
            os.replace(newer, older)


def _append(path: Path, line: bytes) -> None:
    binary = getattr(os, "O_BINARY", 0)  # Windows would turn \n into \r\n
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o644)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                line = b"\n" + line
        if os.write(descriptor, line) != len(line):
            os.ftruncate(descriptor, size)
            raise OSError("the disk is full")
    finally:
        os.close(descriptor)
