"""Memory in RAM that parts of files pass through on their way to a device.

It is page-locked for a CUDA device, so that a copy out of it is only queued: the next part is read, and the one before
quantized, while the bus is busy. Each piece is locked by the thread that has read into it for the first time. Locking all
of it before anything is read takes longer than reading a gigabyte.
"""

from collections import deque
from typing import Any

import numpy as np
import torch

from .host_memory import Lock, page_lock

PAGE = 4096  # bytes


class Slab:
    """One piece: ``memory`` is uint8 ``[nbytes]``, ``view`` the same for a file to read into."""

    def __init__(self, nbytes: int, device: torch.device, lock: Lock) -> None:
        array = np.empty(nbytes + PAGE, dtype=np.uint8)  # NumPy asks for huge pages, which are touched faster
        array = array[-array.ctypes.data % PAGE :][:nbytes]  # a page that two slabs share can't be locked twice
        self.memory, self.view = torch.from_numpy(array), memoryview(array.data)
        self._lock: Lock | None = lock if device.type == "cuda" else None
        self._device, self._unlock = device, None

    def lock(self) -> None:
        """Page-lock it, if that was not tried yet and there is a use for it. Where it fails, copies are slower."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        with torch.cuda.device(self._device):
            self._unlock = lock(self.memory.data_ptr(), self.memory.nbytes)

    def unlock(self) -> None:
        if self._unlock is not None:
            self._unlock()
            self._unlock = None


class Staging:
    """At most ``count`` slabs of ``nbytes``, made when they are needed; of one thread but for ``Slab.lock``.

    A slab is handed out again when the copies out of it, queued in the current stream, have ended.
    """

    def __init__(self, device: torch.device, count: int, nbytes: int, lock: Lock = page_lock) -> None:
        self._device, self._count, self._nbytes, self._lock = device, count, nbytes, lock
        self._made: list[Slab] = []
        self._free: list[Slab] = []  # the last one given back leaves first: its memory has been touched
        self._leaving: deque[tuple[Any, Slab]] = deque()  # with the event after which it is free, in their order

    def take(self) -> Slab | None:
        """A slab to be filled; None: all are in use."""
        while self._leaving and self._leaving[0][0].query():
            self._free.append(self._leaving.popleft()[1])
        if not self._free and len(self._made) < self._count:
            self._made.append(Slab(self._nbytes, self._device, self._lock))
            return self._made[-1]
        return self._free.pop() if self._free else None

    def copy(self, out: torch.Tensor, slab: Slab, begin: int) -> None:
        """Fill ``out`` (uint8, on the device) from byte ``begin`` of a slab, in the current stream."""
        out.copy_(slab.memory[begin : begin + len(out)], non_blocking=self._device.type == "cuda")

    def give_back(self, slab: Slab) -> None:
        """The copies queued so far are the last out of it."""
        if self._device.type != "cuda":
            self._free.append(slab)
            return
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._leaving.append((copied, slab))

    def wait(self) -> None:
        """Until the next ``take`` finds a slab that was given back."""
        self._leaving[0][0].synchronize()

    def close(self) -> None:
        """When the copies have ended, let go of everything. Nobody may be filling a slab."""
        if self._device.type == "cuda":  # where somebody stopped early, also those out of slabs not given back yet
            torch.cuda.current_stream(self._device).synchronize()
        for slab in self._made:
            slab.unlock()
        self._leaving.clear()
        self._free.clear()
        self._made.clear()
