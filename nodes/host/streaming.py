"""The transformer on cards that can't hold it: its blocks stay in RAM and come to the card one at a time.

This is the plain version: each copy waits for the block before it. It is exact, and slow by the time of the copies.
"""

import comfy.model_management
import torch

from .memory import ShellPatcher


class BlockStream:
    """Brings one block after the other to ``device`` and puts the one before back. A context manager."""

    def __init__(self, blocks: torch.nn.ModuleList, device: torch.device):
        self.blocks, self.device = blocks, device
        self._kept: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._release()

    def before(self, index: int) -> None:
        """Put the current block back and fetch block ``index``."""
        self._release()
        for module in self.blocks[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device != self.device:
                    self._kept.append((module, name, parameter))
                    module._parameters[name] = torch.nn.Parameter(parameter.to(self.device), requires_grad=False)

    def _release(self) -> None:
        for module, name, parameter in self._kept:
            module._parameters[name] = parameter
        self._kept.clear()


class StreamingPatcher(ShellPatcher):
    """Loads everything but the blocks onto the card; counts one block as loaded."""

    def model_size(self):
        transformer = self.model.diffusion_model
        size = comfy.model_management.module_size
        return size(transformer) - size(transformer.transformer_blocks) + size(transformer.transformer_blocks[0])

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if self.model.model_loaded_weight_memory and self.model.current_weight_patches_uuid == self.patches_uuid:
            self.patch_model(load_weights=False)
            return 0
        super().partially_load(self.offload_device, extra_memory, force_patch_weights)
        for name, child in self.model.diffusion_model.named_children():
            if name != "transformer_blocks":
                child.to(device_to)
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        return self.model_size()
