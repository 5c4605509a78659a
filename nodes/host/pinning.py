"""Weights in page-locked RAM, from which copies to the card run at the bus's speed, within ComfyUI's budget.

Also within what the container has left (see ``host_memory``), because what is locked can't be taken back.
"""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import comfy.model_management
import torch

from ...qwen_edit.host_memory import HostMemory, available_memory

SHARE_OF_BUDGET = 0.9  # of what ComfyUI allows to be pinned
# Of the RAM that is left, what we have locked counted in. Blocks are read in every step, the modulation once.
SHARE_FOR_BLOCKS, SHARE_FOR_MODULATION = 0.85, 0.6

_locked = 0  # bytes, by us
_counting = threading.RLock()  # memory may be freed by the garbage collector in the middle


def _lock(address: int, nbytes: int, share: float) -> bool:
    with _counting:
        return _lock_and_count(address, nbytes, share)


def _lock_and_count(address: int, nbytes: int, share: float) -> bool:
    global _locked
    manager = comfy.model_management
    if manager.TOTAL_PINNED_MEMORY + nbytes > SHARE_OF_BUDGET * manager.MAX_PINNED_MEMORY:
        return False
    if _locked + nbytes > share * (available_memory() + _locked):
        return False
    # As comfy.model_management.pin_memory does, but without releasing cached outputs from this thread.
    runtime: Any = torch.cuda.cudart()
    if runtime.cudaHostRegister(address, nbytes, 1) != 0:
        comfy.model_management.discard_cuda_async_error()
        return False
    manager.PINNED_MEMORY[address] = nbytes
    manager.TOTAL_PINNED_MEMORY += nbytes
    _locked += nbytes
    return True


def _unlock(address: int) -> None:
    global _locked
    runtime: Any = torch.cuda.cudart()
    if runtime.cudaHostUnregister(address) != 0:
        logging.warning("Qwen Edit Fast: page-locked memory could not be unlocked.")
    with _counting:
        nbytes = comfy.model_management.PINNED_MEMORY.pop(address)
        comfy.model_management.TOTAL_PINNED_MEMORY -= nbytes
        _locked -= nbytes


def _can_lock() -> bool:
    return torch.cuda.is_available() and comfy.model_management.MAX_PINNED_MEMORY > 0


class PinnedBlocks(HostMemory):
    """Memory for streamed blocks. ``pageable`` is how many bytes of it could not be locked."""

    def __init__(self) -> None:
        super().__init__(self._lock_block)
        self.pageable = 0

    def _lock_block(self, address: int, nbytes: int):
        if _can_lock() and _lock(address, nbytes, SHARE_FOR_BLOCKS):
            return partial(_unlock, address)
        self.pageable += nbytes
        return partial(self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self.pageable -= nbytes


class BackgroundPins:
    """Pins tensors one after the other while other work goes on."""

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor] = []
        self._pending: list[Future] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qwen_edit_pin")

    def add(self, tensor: torch.Tensor) -> None:
        if _can_lock():
            self._pending.append(self._thread.submit(self._pin, tensor))

    def _pin(self, tensor: torch.Tensor) -> None:
        if not tensor.is_pinned() and _lock(tensor.data_ptr(), tensor.nbytes, SHARE_FOR_MODULATION):
            self._pinned.append(tensor)

    def release(self) -> None:
        """Unpin everything; the tensors may be dropped after this."""
        for pending in self._pending:
            if not pending.cancel():
                pending.result()
        self._pending.clear()
        for tensor in self._pinned:
            _unlock(tensor.data_ptr())
        self._pinned.clear()
