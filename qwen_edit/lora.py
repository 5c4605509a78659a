"""LoRA files for the transformer: read without the model, applied by the forward.

Nothing is injected into the transformer: peft's layers there would rename its weights to ``….base_layer.weight`` and leak
the adapter into every clone. The forward (``transformer.py``) adds low-rank terms, so that switching touches no weight. The
formats are in ``lora_files.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .checkpoints import read_header
from .errors import LORA
from .linear import Adapter
from .lora_files import PeftScales, adapter, check_numbers, parts_by_module
from .transformer import QwenEditTransformer

# Linears whose addend the forward honours; a LoRA on others (the timestep embedder) is counted as skipped.
HONOURED = ("img_in", "txt_in", "norm_out", "proj_out", "transformer_blocks.")
# Before a module's name in the styles in use: diffusers, ComfyUI, kohya, LyCORIS as SimpleTuner names it.
PREFIXES = ("transformer.", "diffusion_model.", "lora_unet_", "lycoris_")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it matches one transformer. ``skipped``: modules in the file that this transformer lacks."""

    layers: Mapping[str, Adapter]
    skipped: tuple[str, ...]


def read_lora(path: Path, model_config: Mapping[str, object], dtype: torch.dtype = torch.float32) -> LoraFile:
    """Read a LoRA, LoHa or LoKr for a transformer with these arguments of ``QwenImageTransformer2DModel``.

    Args:
        dtype: what the terms of LoHa and LoKr are kept in, which are products of the file's tensors; those of a LoRA are
            the file's tensors themselves.

    Raises:
        ValueError: the file is damaged, of another model, of another adapter kind, or holds bad numbers; the
            message names the key.
    """
    read_header(path)
    state = load_file(path)
    check_numbers(path, state)
    scales = PeftScales(path)
    linears = _linears(model_config)
    flattened = {name.replace(".", "_"): name for name in linears}
    layers: dict[str, Adapter] = {}
    skipped = []
    for name, parts in parts_by_module(path, state).items():
        module = _module(name, parts, linears, flattened)
        if module is None:
            skipped.append(name.removeprefix("transformer."))
        elif module in layers:
            key = next(iter(parts.values())).key
            raise ValueError(
                f"{LORA} {path.name}: {key} is a second adapter on {module}. Save the two as files of their own."
            )
        else:
            layers[module] = adapter(path, module, parts, linears[module], scales, dtype)
    if not layers:
        example = next(iter(state), "nothing")
        raise ValueError(
            f"{LORA} {path.name}: none of its {len(state)} tensors belongs to Qwen-Image-Edit (for example {example})."
            " It is a LoRA of another model."
        )
    return LoraFile(layers, tuple(sorted(skipped)))


def _linears(model_config: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """The honoured linears of such a transformer and their shapes ``(out, in)``."""
    with torch.device("meta"):
        skeleton: Any = QwenEditTransformer.from_config(dict(model_config))
    modules = skeleton.named_modules()
    return {
        name: (m.out_features, m.in_features)
        for name, m in modules
        if isinstance(m, torch.nn.Linear) and name.startswith(HONOURED)
    }


def _module(name: str, parts: Mapping, linears: Mapping, flattened: Mapping[str, str]) -> str | None:
    """The linear that the file means by ``name``; a key of no known form belongs to the linear that it begins with."""
    while name.startswith(PREFIXES):  # diffusers may have put its own before one that was there
        name = name.removeprefix(next(prefix for prefix in PREFIXES if name.startswith(prefix)))
    while "" in parts and name not in linears and "." in name:
        name = name.rpartition(".")[0]
    return name if name in linears else flattened.get(name)
