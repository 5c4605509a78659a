"""Weights in page-locked RAM, from which copies to the card run at the bus's speed, within ComfyUI's budget.

Also within what the container has left (see ``host_memory``), because what is locked can't be taken back.
"""

import logging
import threading
from functools import partial
from typing import Any

import comfy.model_management
import torch

from ...qwen_edit.host_memory import HostMemory, available_memory

SHARE_OF_BUDGET = 0.9  # of what ComfyUI allows to be pinned
SHARE_OF_MEMORY = 0.85  # of the RAM that is left, what we have locked counted in

_locked = 0  # bytes, by us
_counting = threading.RLock()  # memory may be freed by the garbage collector in the middle


def _lock(address: int, nbytes: int) -> bool:
    with _counting:
        return _lock_and_count(address, nbytes)


def _lock_and_count(address: int, nbytes: int) -> bool:
    global _locked
    manager = comfy.model_management
    if manager.TOTAL_PINNED_MEMORY + nbytes > SHARE_OF_BUDGET * manager.MAX_PINNED_MEMORY:
        return False
    if _locked + nbytes > SHARE_OF_MEMORY * (available_memory() + _locked):
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
        if _can_lock() and _lock(address, nbytes):
            return partial(_unlock, address)
        self.pageable += nbytes
        return partial(self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self.pageable -= nbytes
