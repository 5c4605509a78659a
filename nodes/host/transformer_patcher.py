"""The transformer in ComfyUI's memory manager: whole on the card but for the modulation, or streamed block by block."""

from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch

from ...qwen_edit.errors import INPUT
from ...qwen_edit.linear import pack
from ...qwen_edit.packed import PackedLinear, unpatch
from ...qwen_edit.quantize import is_modulation, stored_bytes
from .memory import ShellPatcher


class Backup(NamedTuple):
    """What ComfyUI keeps of a weight that it patches."""

    weight: torch.Tensor
    inplace_update: bool


class TransformerPatcher(ShellPatcher):
    """Leaves the modulation in RAM and lays out what is on the card for the forward."""

    def model_size(self):
        if not self.size:  # ComfyUI asks often
            self.size = self._stored_bytes()
        return self.size

    def _stored_bytes(self) -> int:
        return stored_bytes(self.model.diffusion_model)

    def load(self, device_to=None, *args, **kwargs):
        super().load(device_to, *args, **kwargs)
        transformer = self.model.diffusion_model
        transformer.weights_version = self.patches_uuid
        for block in transformer.transformer_blocks:
            attn = block.attn
            pack([attn.to_q, attn.to_k, attn.to_v])
            pack([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        """ComfyUI's, with the modulation back in RAM after each weight that it has patched on the card. Weights in ggml's
        formats keep their bytes: the patches change each float copy, as ComfyUI's own do with weights in RAM."""
        module, _, parameter = key.rpartition(".")
        linear = comfy.utils.get_attr(self.model, module)
        if isinstance(linear, PackedLinear) and parameter == "weight" and not return_weight:
            linear.patch = LowVramPatch(key, self.patches) if key in self.patches else None
            return None
        if return_weight or key not in self.patches or not is_modulation(key):
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        weight = comfy.utils.get_attr(self.model, key)
        self.backup.setdefault(key, Backup(weight, False))
        super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        comfy.utils.set_attr_param(self.model, key, comfy.utils.get_attr(self.model, key).to("cpu"))
        return None

    def model_state_dict(self, filter_prefix=None):
        self.model.diffusion_model.fused.restore()  # for merging, saving and hooks: the weights themselves
        return super().model_state_dict(filter_prefix)

    def model_state_dict_for_saving(self, model=None, prefix=""):
        self.model.diffusion_model.fused.restore()
        return super().model_state_dict_for_saving(model, prefix)

    def patch_hooks(self, hooks):
        self.model.diffusion_model.fused.drop()  # the weights become others
        form = self.model.diffusion_model.precision.form
        if form is not None and self.get_combined_hook_patches(hooks):
            raise ValueError(  # it would put the numbers back, but not their scales
                f"{INPUT} A LoRA on conditioning changes weights while the sampler runs, which ComfyUI cannot undo for"
                f" weights in {form}. Put the LoRA on the MODEL, or choose precision bf16 on the loader."
            )
        super().patch_hooks(hooks)
        # a LoRA on conditioning changes weights in the middle of a sampling, each time to what has no name
        version = self.model.current_weight_patches_uuid if hooks is None else object()
        self.model.diffusion_model.weights_version = version

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.model.diffusion_model.fused.drop()  # our LoRAs lie on top of ComfyUI's patches
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            unpatch(self.model.diffusion_model)
            self.model.diffusion_model.weights_version = None
            if device_to is not None and not self._stay:  # the tables leave the card with the weights
                self.model.diffusion_model.forget()


class StreamingPatcher(TransformerPatcher):
    """Loads everything but the blocks onto the card; counts one block as loaded."""

    def _stored_bytes(self):
        transformer = self.model.diffusion_model
        blocks = transformer.transformer_blocks
        return stored_bytes(transformer) - stored_bytes(blocks) + stored_bytes(blocks[0])

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
