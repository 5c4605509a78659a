"""Weights that stay in RAM, pinned in the background so that their copies to the card run at the bus's speed."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import comfy.model_management
import torch

SHARE_OF_BUDGET = 0.9  # of what ComfyUI allows to be pinned


class BackgroundPins:
    """Pins tensors one after the other while other work goes on; counted in ComfyUI's own budget."""

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor] = []
        self._pending: list[Future] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qwen_edit_pin")

    def add(self, tensor: torch.Tensor) -> None:
        if torch.cuda.is_available() and comfy.model_management.MAX_PINNED_MEMORY > 0:
            self._pending.append(self._thread.submit(self._pin, tensor))

    def _pin(self, tensor: torch.Tensor) -> None:
        manager = comfy.model_management
        if (
            tensor.is_pinned()
            or manager.TOTAL_PINNED_MEMORY + tensor.nbytes > SHARE_OF_BUDGET * manager.MAX_PINNED_MEMORY
        ):
            return
        # As comfy.model_management.pin_memory does, but without releasing cached outputs from this thread.
        runtime: Any = torch.cuda.cudart()
        if runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1) == 0:
            manager.PINNED_MEMORY[tensor.data_ptr()] = tensor.nbytes
            manager.TOTAL_PINNED_MEMORY += tensor.nbytes
            self._pinned.append(tensor)

    def release(self) -> None:
        """Unpin everything; the tensors may be dropped after this."""
        for pending in self._pending:
            if not pending.cancel():
                pending.result()
        self._pending.clear()
        for tensor in self._pinned:
            comfy.model_management.unpin_memory(tensor)
        self._pinned.clear()
