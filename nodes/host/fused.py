"""LoRAs of QwenEditLoraSwitch in the weights of our transformer: when, where the weights are kept meanwhile, what is said.

The engine's ``FusedLoras`` changes the weights; each forward says which LoRAs its MODEL wants in them, so a MODEL without
gets the weights as they were, whoever ran before it.
"""

from collections.abc import Mapping
from functools import lru_cache

import comfy.model_management
import torch
from comfy_execution.utils import get_executing_context

from ...qwen_edit.fused_lora import PAYS_FROM, pays
from ...qwen_edit.host_memory import HostMemory
from ...qwen_edit.linear import Adapters
from ...qwen_edit.precision import ROOM_FOR_ACTIVATIONS
from . import notes
from .lora import LORAS, NOTHING, ActiveLora, LoraStack, active_adapters, adapters_of
from .memory import ShellPatcher
from .pinning import page_lock

ROOM = "qwen_edit_fused"  # key among the patcher's additional models
FUSIBLE = (None, "fp8", "int8")  # forms of ``Precision``
# Card memory, in sizes of the transformer, that auto asks for: both copies, the text encoder and the VAE.
AUTO_SIZES = 2.6


STREAMED = "blocks are streamed from RAM"


def problem(transformer) -> str | None:
    """Why LoRAs can't be in the weights of this transformer as it is now, or None."""
    if transformer.streamed:
        return STREAMED
    form = transformer.precision.form
    return None if form in FUSIBLE else f"weights in {form} would lose most of them"


def auto_problem(transformer, device: torch.device) -> str | None:
    """Why mode auto leaves LoRAs beside the weights however long the run is, or None. A table of card and precision, so
    that equal machines make equal pictures."""
    if (found := problem(transformer)) is not None:
        return found
    form = transformer.precision.form
    if form is not None:
        return f"weights in {form} would be rounded once more"
    return (
        None if _sizes(transformer, device) >= AUTO_SIZES else "the card has no room for a second copy of the weights"
    )


def _sizes(transformer, device: torch.device) -> float:
    """How often the transformer would fit into the device's memory."""
    return (_total_memory(device) - ROOM_FOR_ACTIVATIONS) / transformer.nbytes


@lru_cache(maxsize=8)
def _total_memory(device: torch.device) -> int:
    return comfy.model_management.get_total_memory(device)


def on_card(transformer, device: torch.device) -> bool:
    return _sizes(transformer, device) >= 2


class SecondCopy(torch.nn.Module):
    """Stands for what ``FusedLoras`` has on the card, in ComfyUI's memory manager; a shell (see ``memory.py``)."""

    def __init__(self, transformer):
        super().__init__()
        self.device: torch.device | None = None
        self._transformer = (transformer,)  # not a part of this module

    @property
    def transformer(self):
        return self._transformer[0]

    @property
    def is_empty(self) -> bool:
        return self.transformer.fused.nbytes == 0

    def fill(self, device: torch.device) -> None:
        """The first forward does."""

    def empty(self) -> None:
        self.transformer.fused.drop()


class SecondCopyPatcher(ShellPatcher):
    """Asks ComfyUI for the room before sampling; goes when ComfyUI wants it back."""

    def model_size(self):
        transformer = self.model.transformer
        return transformer.nbytes if on_card(transformer, self.load_device) else 0

    def loaded_size(self):
        return self.model.transformer.fused.nbytes

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        self.model.device = device_to
        return 0

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.model.empty()


class PinnedMemory:
    """RAM for the engine's copies of weights, page-locked as far as ComfyUI's budget and the container's limit go."""

    def __init__(self) -> None:
        self._locked, self._plain = HostMemory(page_lock), HostMemory()

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        memory = self._locked if weight.is_cuda else self._plain
        return memory.allocate(weight.nbytes).view(weight.dtype).view(weight.shape)


def reserve(clone, mode: str) -> None:
    """Have ComfyUI make room for the second copy when it loads this MODEL."""
    transformer = clone.model.diffusion_model
    device = clone.load_device
    if clone.model.offload == "stream" or problem(transformer) is not None:
        return
    if mode == "fused" or auto_problem(transformer, device) is None:
        clone.set_additional_models(ROOM, [clone.model.second_copy.clone()])


def explained(model, mode: str) -> list[str]:
    """What ``mode`` means for this MODEL, as lines for the node."""
    transformer, device = model.model.diffusion_model, model.load_device
    if mode == "resident":
        return []
    if mode == "auto":
        found = auto_problem(transformer, device)
        if found is not None:
            return [f"auto: beside the weights, because {found}."]
        return [f"auto: in the weights where steps x rank x output tokens reach {PAYS_FROM:,}, else beside them."]
    found = STREAMED if model.model.offload == "stream" else problem(transformer)
    if found is not None:
        return [f"fused is not possible here, because {found}: the LoRAs stay beside the weights."]
    where = "on the card" if on_card(transformer, device) else "in RAM"
    rounded = " The 8-bit weights are rounded once more." if transformer.precision.form is not None else ""
    return [f"fused: in the weights; the originals are kept {where}.{rounded}"]


def adapters_for(transformer, x: torch.Tensor, transformer_options: Mapping) -> Adapters:
    """The addends that this forward has to apply, once the weights have in them what its MODEL wants there.

    Args:
        x: noisy latents ``[B, 16, 1, h, w]``.
    """
    stack: LoraStack = transformer_options.get(LORAS, NOTHING)
    if any(item.mode == "fused" for item in stack.active) and (found := problem(transformer)) is not None:
        _say_refused(transformer, f"The LoRAs stay beside the weights, because {found}.")
    chosen = [item for item in stack.active if _goes_in(transformer, item, stack, x, transformer_options)]
    if not chosen:
        transformer.fused.restore()
        return active_adapters(transformer, transformer_options)
    wanted = adapters_of(transformer, chosen)
    key = tuple((item.lora.fingerprint, item.strength) for item in chosen)
    if key != transformer.fused.key:
        where = _fuse(transformer, key, wanted, x.device)
        notes.say(f"{len(chosen)} LoRAs are in the weights now; the originals are kept {where}.")
    adapters = {module: each for module, each in wanted.items() if module not in transformer.fused.modules}
    for module, each in adapters_of(transformer, [item for item in stack.active if item not in chosen]).items():
        adapters[module] = adapters.get(module, []) + each
    return adapters


def _say_refused(transformer, text: str) -> None:
    """Once for each node that samples, not at every step."""
    context = get_executing_context()
    run = None if context is None else (context.prompt_id, context.node_id)
    if run != transformer.refused_in:
        transformer.refused_in = run
        notes.say(text)


def _fuse(transformer, key, wanted: Adapters, device: torch.device) -> str:
    if on_card(transformer, device):
        try:
            transformer.fused.fuse(key, wanted)
            return "on the card"
        except torch.OutOfMemoryError:
            comfy.model_management.soft_empty_cache()
    transformer.fused.fuse(key, wanted, transformer.host_memory)
    return "in RAM"


def _goes_in(transformer, item: ActiveLora, stack: LoraStack, x: torch.Tensor, transformer_options: Mapping) -> bool:
    if item.mode == "resident" or problem(transformer) is not None:
        return False
    if item.mode == "fused" or item.lora.high_rank:
        return True
    sigmas = transformer_options.get("sample_sigmas")
    if sigmas is None:
        return False
    rank = sum(other.lora.rank for other in stack.active if other.mode == "auto")
    tokens = -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)  # of one picture: how many run together is ComfyUI's choice
    return pays(len(sigmas) - 1, rank, tokens) and auto_problem(transformer, x.device) is None
