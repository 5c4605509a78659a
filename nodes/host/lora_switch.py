"""What QwenEditLoraSwitch does: a MODEL that names its LoRAs."""

from collections.abc import Sequence
from pathlib import Path

from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter

from ...qwen_edit.errors import LORA
from ...qwen_edit.linear import HighRank
from ...qwen_edit.lora_files import MAX_RANK
from ...qwen_edit.values import check_choice
from .fused import explained, reserve
from .lora import LORAS, NOTHING, ActiveLora, LoraStack, LoraTarget, ResidentLora, pool_line, resident
from .model import HostTransformer
from .request import LORA_MODES


def switch(model, target: LoraTarget, wanted: Sequence[tuple[Path, float]], mode: str):
    """A clone of ``model`` with these LoRAs added to those it has already.

    Args:
        wanted: files and strengths; strength 0 leaves a LoRA resident but out of the forward.
        mode: one of ``LORA_MODES``.

    Returns:
        The clone, and a line for each LoRA: resident or read now, its size, what was skipped.

    Raises:
        ValueError: a file is no LoRA of this model (see ``read_lora``), or of too high a rank for mode resident.
    """
    check_choice("mode", mode, LORA_MODES)
    ours = isinstance(model.model.diffusion_model, HostTransformer)
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    stack: LoraStack = options.get(LORAS, NOTHING)
    patchers = list(clone.get_additional_models_with_key(LORAS))
    lines = []
    for path, strength in wanted:
        patcher, was_resident = resident(path, target)
        lora: ResidentLora = patcher.model
        if lora.high_rank and mode == "resident":
            raise ValueError(
                f"{LORA} {path.name}: {len(lora.high_rank)} of its layers (first: {next(iter(lora.high_rank))}) have a rank"
                f" above {MAX_RANK}; beside the weights that would cost as much as the model. Choose mode auto or fused."
            )
        lines.append(_line(lora, strength, was_resident, patcher.model_size()))
        if strength == 0:
            continue
        if not ours and (mode == "fused" or lora.high_rank):
            clone.add_patches(native_patches(lora, strength))
            lines[-1] += ", patched into the weights by ComfyUI"
            continue
        stack = LoraStack((*stack.active, ActiveLora(lora, strength, mode)))
        patchers.append(patcher.clone())
    options[LORAS] = stack
    clone.set_additional_models(LORAS, patchers)
    if ours and stack.active:
        if any(item.lora.high_rank for item in stack.active):
            mode = "fused"  # beside the weights they would cost as much as the model
        reserve(clone, mode)
        lines += explained(clone, mode)
    return clone, [*lines, pool_line()] if wanted else []


def _line(lora: ResidentLora, strength: float, was_resident: bool, size: int) -> str:
    state = "resident" if was_resident else "read from disk"
    line = f"{lora.path.stem}: strength {strength:g}, {len(lora.scales)} layers, {size / 2**20:.1f} MiB, {state}"
    if lora.skipped:
        line += f". Warning: {len(lora.skipped)} modules of the file are not applied (first: {lora.skipped[0]})"
    return line


def native_patches(lora: ResidentLora, strength: float) -> dict[str, object]:
    """A LoRA as patches of ComfyUI's own, for a MODEL that another loader made."""
    patches: dict[str, object] = {}
    for name, adapter in lora.adapters(strength):
        if not isinstance(adapter, HighRank):
            patch = LoRAAdapter(set(), (adapter.b, adapter.a, adapter.scale * len(adapter.a), None, None, None))
        elif len(adapter.factors) == 2:
            first, second = adapter.factors
            patch = LoKrAdapter(set(), (first * adapter.scale, second, *[None] * 7))
        else:
            first, *others = adapter.factors
            patch = LoHaAdapter(set(), (first * adapter.scale, others[0], None, *others[1:], None, None, None))
        patches[f"diffusion_model.{name}.weight"] = patch
    return patches
