"""The transformer in ComfyUI's memory manager: as many blocks on the card as it leaves room for, the others streamed."""

from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from ...qwen_edit.errors import INPUT
from ...qwen_edit.file_weights import FileWeights
from ...qwen_edit.linear import pack
from ...qwen_edit.packed import PackedLinear, unpatch
from ...qwen_edit.quantize import is_modulation, stored_bytes
from ...qwen_edit.streaming import BUFFERS, spread, streamed_blocks
from . import notes
from .memory import ShellPatcher

BLOCKS = "diffusion_model.transformer_blocks."
# What is free is never the same twice; another number of streamed blocks moves most of them.
NOT_WORTH_MOVING = 1 / 20  # of all blocks
Offload = Literal["auto", "none", "stream"]  # as many blocks in RAM as need be, none, all


class Backup(NamedTuple):
    """What ComfyUI keeps of a weight that it patches."""

    weight: torch.Tensor
    inplace_update: bool


@dataclass(frozen=True)
class Sizes:
    """Bytes on the card, those of the modulation left out: of each block, and of everything else."""

    blocks: tuple[int, ...]
    others: int

    @classmethod
    def of(cls, transformer: torch.nn.Module) -> "Sizes":
        blocks = tuple(stored_bytes(block) for block in transformer.get_submodule("transformer_blocks").children())
        return cls(blocks, stored_bytes(transformer) - sum(blocks))

    @property
    def buffers(self) -> int:
        return BUFFERS * max(self.blocks)

    def with_resident(self, streamed: tuple[int, ...]) -> int:
        """With all blocks on the card but those streamed."""
        return self.others + sum(self.blocks) - sum(self.blocks[index] for index in streamed)


class TransformerPatcher(ShellPatcher):
    """Decides at each load which blocks stay on the card, gives them back one by one, leaves the modulation in RAM, and lays
    out what is on the card for the forward."""

    def model_size(self):
        if not self.size:  # ComfyUI asks often
            sizes: Sizes = self.model.sizes
            whole = sizes.with_resident(())
            self.size = sizes.others + sizes.buffers if self.model.offload == "stream" else whole
        return self.size

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        model, stream = self.model, self.model.diffusion_model.stream
        before = stream.streamed
        room = model.model_loaded_weight_memory + extra_memory
        wanted = self._choice(room)
        if moved := (wanted != before or torch.device(device_to) != stream.device):
            model.diffusion_model.fused.drop()  # LoRAs are only in weights that stay where they are
            stream.choose(wanted, device_to)
        self._placed = False
        gained = super().partially_load(device_to, extra_memory, force_patch_weights)
        if not self._placed:  # ComfyUI found it loaded, as it should be but for where
            loaded = model.model_loaded_weight_memory
            try:
                if moved:
                    self._place(device_to)
                stream.open()
            except BaseException:
                self.detach()
                raise
            model.model_loaded_weight_memory = self._on_card()
            gained = model.model_loaded_weight_memory - loaded
        if moved:
            model.said = self._said(room) if wanted or before else ""
        if model.said:
            notes.say(model.said)
        if not wanted:
            model.said = ""
        return gained

    _placed = False

    def _choice(self, room: float) -> tuple[int, ...]:
        """Which blocks to stream if the model may take ``room`` bytes of the card."""
        sizes: Sizes = self.model.sizes
        if self.model.offload == "auto":
            wanted, now = streamed_blocks(sizes.blocks, room - sizes.others), self.model.diffusion_model.stream.streamed
            fits = sizes.with_resident(now) + sizes.buffers <= room
            few = len(now) - len(wanted) <= NOT_WORTH_MOVING * len(sizes.blocks)
            return now if wanted and fits and few else wanted
        return tuple(range(len(sizes.blocks))) if self.model.offload == "stream" else ()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        model, stream, sizes = self.model, self.model.diffusion_model.stream, self.model.sizes
        resident = [index for index in range(len(sizes.blocks)) if index not in stream.streamed]
        missing = memory_to_free - stream.buffer_bytes
        leaving: list[int] = []
        for count in range(len(resident) + 1):
            leaving = [resident[i] for i in spread(len(resident), count)]
            if sum(sizes.blocks[index] for index in leaving) >= missing:
                break
        else:
            return 0  # ComfyUI then detaches the whole model
        if model.offload == "none" or model.is_empty:
            return 0
        loaded = model.model_loaded_weight_memory
        model.diffusion_model.fused.drop()
        stream.choose(sorted({*stream.streamed, *leaving}), model.device)
        self._place(model.device)
        model.model_loaded_weight_memory = self._on_card()
        comfy.model_management.soft_empty_cache()
        return loaded - model.model_loaded_weight_memory

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        """ComfyUI's, for weights of which some stay in RAM, patched too."""
        model, transformer = self.model, self.model.diffusion_model
        with self.use_ejected():
            self.unpatch_hooks()
            transformer.stream.reset()
            for index, keys in groupby(sorted(self.patches, key=_block_of), _block_of):
                for key in keys:
                    self.patch_weight_to_device(key, device_to)
                if index in transformer.stream.streamed:
                    transformer.stream.lay(index)
            for part in (*model.children(), *transformer.children()):
                if part not in (transformer, transformer.transformer_blocks):
                    part.to(device_to)
            self._place(device_to)
            transformer.stream.open()
            transformer.weights_version = self.patches_uuid
            model.model_lowvram = False
            model.device = device_to
            model.model_loaded_weight_memory = self._on_card()
            model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)
        self._placed = True

    def _place(self, device) -> None:
        """Every block where it is to be; first what leaves the card."""
        transformer = self.model.diffusion_model
        if transformer.channels is not None:
            transformer.channels.clear()  # weights come to lie elsewhere, and others at their addresses
        for index in transformer.stream.streamed:
            transformer.stream.lay(index)
        for index, block in enumerate(transformer.transformer_blocks):
            if index not in transformer.stream.streamed:
                attn = block.to(device).attn
                pack([attn.to_q, attn.to_k, attn.to_v])
                pack([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])

    def _on_card(self) -> int:
        stream = self.model.diffusion_model.stream
        return self.model.sizes.with_resident(stream.streamed) + stream.buffer_bytes

    def _said(self, room: float) -> str:
        stream, sizes = self.model.diffusion_model.stream, self.model.sizes
        count, streamed = len(sizes.blocks), len(stream.streamed)
        if not streamed:
            return "The whole transformer is on the card."
        copied, rate = stream.bytes_per_forward, stream.bandwidth()
        said = f"{streamed} of the transformer's {count} blocks are streamed from RAM, {copied / 2**30:.2f} GiB in each forward"
        if rate is not None:
            said += (
                f": {copied / rate:.2f} s at the {rate / 2**30:.0f} GiB/s measured, while the blocks before them compute; no"
                " forward takes less"
            )
        if self.model.offload == "auto":
            said += (
                f". ComfyUI leaves {room / 2**30:.1f} GiB of the card for its {sizes.with_resident(()) / 2**30:.1f} GiB"
            )
        if stream.memory.pageable and stream.device.type != "cpu":
            said += (
                f". Warning: {stream.memory.pageable / 2**30:.1f} GiB of them could not be page-locked (ComfyUI's or the"
                " container's limit), so their copies are slow"
            )
        return said + "."

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
        if hooks is not None or self.hook_backup:  # ComfyUI also calls this after each sampling, for no hooks at all
            self.model.diffusion_model.fused.drop()  # the weights become others
            self.model.diffusion_model.stream.reset()
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

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *args, **kwargs):
        """ComfyUI's, which writes into the weight itself: it is no longer what its file holds."""
        weights = self.model.diffusion_model.weights
        if is_modulation(key) and isinstance(weights, FileWeights):
            weights.forget(comfy.utils.get_attr(self.model, key.rpartition(".")[0]))
        super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def unpatch_hooks(self, whitelist_keys_set=None):
        if self.hook_backup:
            self.model.diffusion_model.fused.drop()  # before the weights below our LoRAs become others
            self.model.diffusion_model.stream.reset()
        super().unpatch_hooks(whitelist_keys_set)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.model.diffusion_model.fused.drop()  # our LoRAs lie on top of ComfyUI's patches
            self.model.diffusion_model.stream.reset()
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            unpatch(self.model.diffusion_model)
            self.model.diffusion_model.weights_version = None
            if device_to is not None and not self._stay:  # the tables leave the card with the weights
                self.model.diffusion_model.forget()
                self.model.diffusion_model.stream.close()


def _block_of(key: str) -> int:
    """The index of a weight's block; -1: it is in none."""
    return int(key.removeprefix(BLOCKS).split(".")[0]) if key.startswith(BLOCKS) else -1
