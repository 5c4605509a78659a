"""How much RAM this process may still take, and memory in it that a card reads at the bus's speed.

A container's limit counts as much as the machine's memory: page-locked memory can't be swapped or reclaimed, so a process
that locks more than its container has left is killed.
"""

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# Limit, use, and the name of what the use has of file pages that would be given back, of cgroup v2 and v1.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

# Locks bytes at an address; answers with what unlocks them, or None where they can't be locked.
Lock = Callable[[int, int], Callable[[], object] | None]


def page_lock(address: int, nbytes: int) -> Callable[[], object] | None:
    """A ``Lock`` for CUDA cards, all of them; the driver may refuse it. An error is of the calling thread."""
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, nbytes, 1)) != 0:
        return None
    return partial(runtime.cudaHostUnregister, address)


def available_memory(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Bytes of RAM that can still be taken: the machine's, or what the container has left, whichever is less."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups(root, own)])


def _left_in_cgroups(root: Path, own: Path) -> list[int]:
    """What each cgroup that this process is in has left, its parents too; none where there is no limit."""
    if not own.is_file():
        return []
    left = []
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, files = (root / "memory", V1) if controllers else (root, V2)
        here = top / path.lstrip("/")
        # a container may see its own cgroup as the root, under the name that it has outside
        for folder in (here, *here.parents) if here.is_dir() else (top,):
            left += _left(folder, *files)
            if folder == top:
                break
    return left


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> list[int]:
    try:
        wanted, taken = ((folder / name).read_text().strip() for name in (limit, used))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root of v2 has none of these files
        return []
    if wanted == "max":
        return []
    return [max(0, int(wanted) - int(taken) + int(statistics.get(reclaimable, 0)))]


class HostMemory:
    """Hands out memory in RAM, page-locked where ``lock`` allows it, for as long as any view of it lives."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = lock
        self._arrays: weakref.WeakValueDictionary[int, numpy.ndarray] = weakref.WeakValueDictionary()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 ``[nbytes]``. It is unlocked and freed with its last view."""
        array = numpy.empty(nbytes, dtype=numpy.uint8)
        unlock = None if self._lock is None else self._lock(array.ctypes.data, nbytes)
        if unlock is not None:
            weakref.finalize(array, unlock).atexit = False
        self._arrays[array.ctypes.data] = array
        with torch.inference_mode(False):  # or only in that mode could it be written
            return torch.from_numpy(array)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_contiguous() and tensor.untyped_storage().data_ptr() in self._arrays

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())
