"""Streaming in ComfyUI's memory manager: the blocks stay in RAM, everything else is on the card."""

import comfy.model_management

from .memory import ShellPatcher


class StreamingPatcher(ShellPatcher):
    """Loads everything but the blocks onto the card; counts one block as loaded."""

    def model_size(self):
        transformer = self.model.diffusion_model
        size = comfy.model_management.module_size
        return size(transformer) - size(transformer.transformer_blocks) + size(transformer.transformer_blocks[0])

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if self.model.model_loaded_weight_memory and self.model.current_weight_patches_uuid == self.patches_uuid:
            self.unpatch_model(None, unpatch_weights=False)  # object patches of the clone before
            self.patch_model(load_weights=False)
            return 0
        super().partially_load(self.offload_device, extra_memory, force_patch_weights)
        for name, child in self.model.diffusion_model.named_children():
            if name != "transformer_blocks":
                child.to(device_to)
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        return self.model_size()
