"""Weights in page-locked RAM, from which copies to the card run at the bus's speed, within ComfyUI's budget.

Also within what the container has left (see ``host_memory``), because what is locked can't be taken back.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import torch

from ...qwen_edit import host_memory

SHARE_OF_BUDGET = 0.9  # of what ComfyUI allows to be pinned
SHARE_OF_MEMORY = 0.85  # of the RAM that is left, what we have locked counted in

_locked = 0  # bytes, by us
_counting = threading.RLock()  # memory may be freed by the garbage collector in the middle


def page_lock(address: int, nbytes: int) -> Callable[[], object] | None:
    """The engine's ``Lock``, from any thread; None where ComfyUI pins nothing, its budget or the RAM that is left has no room,
    or the driver refuses."""
    if not torch.cuda.is_available() or not _reserve(nbytes):
        return None
    # As comfy.model_management.pin_memory does, but without releasing cached outputs from this thread.
    unlock = host_memory.page_lock(address, nbytes)
    if unlock is None:
        comfy.model_management.discard_cuda_async_error()
        _give_back(nbytes)
        return None
    comfy.model_management.PINNED_MEMORY[address] = nbytes
    return partial(_unlock, address, unlock)


def _reserve(nbytes: int) -> bool:
    global _locked
    manager = comfy.model_management
    with _counting:
        if manager.TOTAL_PINNED_MEMORY + nbytes > SHARE_OF_BUDGET * manager.MAX_PINNED_MEMORY:
            return False
        if _locked + nbytes > SHARE_OF_MEMORY * (host_memory.available_memory() + _locked):
            return False
        manager.TOTAL_PINNED_MEMORY += nbytes
        _locked += nbytes
        return True


def _give_back(nbytes: int) -> None:
    global _locked
    with _counting:
        comfy.model_management.TOTAL_PINNED_MEMORY -= nbytes
        _locked -= nbytes


def _unlock(address: int, unlock: Callable[[], Any]) -> None:
    if int(unlock()) != 0:
        logging.warning("Qwen Edit Fast: page-locked memory could not be unlocked.")
    _give_back(comfy.model_management.PINNED_MEMORY.pop(address))


class PinnedBlocks(host_memory.HostMemory):
    """Memory for streamed blocks. ``pageable`` is how many bytes of it could not be locked."""

    def __init__(self) -> None:
        super().__init__(self._lock_block)
        self.pageable = 0

    def _lock_block(self, address: int, nbytes: int):
        unlock = page_lock(address, nbytes)
        if unlock is not None:
            return unlock
        self.pageable += nbytes
        return partial(self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self.pageable -= nbytes
