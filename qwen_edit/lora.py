"""LoRA files for the transformer: read by diffusers, scaled by peft, applied by the forward.

diffusers converts the key styles in use (diffusers/peft, ``lora_down``/``lora_up`` with alpha, kohya); peft makes
its layers from them and so decides which linears they belong to and how they are scaled (alpha / rank,
rank-stabilized, per-layer patterns). peft's layers are made in a skeleton of the transformer without weights, never in the real one: injecting them there would rename its weights to
``….base_layer.weight`` and leak the adapter into every clone. The forward (``transformer.py``) adds them as
low-rank addends, so that switching touches no weight.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .checkpoints import read_header
from .errors import LORA
from .linear import LowRank
from .transformer import QwenEditTransformer

# Linears whose addend the forward honours; a LoRA on others (the timestep embedder) is counted as skipped.
HONOURED = ("img_in", "txt_in", "norm_out", "proj_out", "transformer_blocks.")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it matches one transformer. ``skipped``: modules in the file that this transformer lacks."""

    layers: Mapping[str, LowRank]
    skipped: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.a.nbytes + layer.b.nbytes for layer in self.layers.values())


def read_lora(path: Path, model_config: Mapping[str, object]) -> LoraFile:
    """Read a LoRA for a transformer with these arguments of ``QwenImageTransformer2DModel``.

    Raises:
        ValueError: the file is damaged, of another model, of another adapter kind, or holds bad numbers; the
            message names the key.
    """
    read_header(path)
    state = _convert(path)
    skeleton = _skeleton(model_config)
    linears = {name: m for name, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    kept, skipped = {}, set()
    for key, tensor in state.items():
        module, _, part = key.removeprefix("transformer.").rpartition(".lora_")
        if module not in linears or not module.startswith(HONOURED):
            skipped.add(module or key)
            continue
        _check(path, key, part, tensor, state, linears[module])
        kept[key] = tensor
    if not kept:
        example = next(iter(state), "nothing")
        raise ValueError(
            f"{LORA} {path.name}: none of its {len(state)} tensors belongs to Qwen-Image-Edit (for example {example})."
            " It is a LoRA of another model."
        )
    return LoraFile(_peft_layers(path, skeleton, kept), tuple(sorted(skipped)))


def _skeleton(model_config: Mapping[str, object]):
    with torch.device("meta"):
        return QwenEditTransformer.from_config(dict(model_config))


def _convert(path: Path) -> dict[str, torch.Tensor]:
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    state = load_file(path)
    other = next((k for k in state if any(kind in k for kind in ("hada_", "lokr_", "dora_scale", ".diff"))), None)
    if other is not None:
        raise ValueError(
            f"{LORA} {path.name}: {other} is of a kind that this node does not apply (LoHa, LoKr, DoRA or a full"
            " difference). Use ComfyUI's own LoRA loader for it."
        )
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{LORA} {path.name}: {key} holds NaN or infinity. The file is damaged.")
        if 0 in tensor.shape:
            raise ValueError(f"{LORA} {path.name}: {key} has rank zero ({list(tensor.shape)}).")
    try:
        converted = QwenImageLoraLoaderMixin.lora_state_dict(state)
    except (KeyError, ValueError, IndexError) as e:
        raise ValueError(f"{LORA} {path.name}: its keys are not those of a LoRA for this model ({e}).") from e
    return {k if k.startswith("transformer.") else f"transformer.{k}": v for k, v in converted.items()}


def _check(path: Path, key: str, part: str, tensor: torch.Tensor, state: Mapping, linear: torch.nn.Linear) -> None:
    twin = key.replace("lora_A", "lora_B") if part.startswith("A") else key.replace("lora_B", "lora_A")
    if twin == key or twin not in state:
        raise ValueError(f"{LORA} {path.name}: {key} has no counterpart {twin}.")
    rank = tensor.shape[0] if part.startswith("A") else tensor.shape[1]
    other_rank = state[twin].shape[1] if part.startswith("A") else state[twin].shape[0]
    size = tensor.shape[1] if part.startswith("A") else tensor.shape[0]
    wanted = linear.in_features if part.startswith("A") else linear.out_features
    if rank != other_rank:
        raise ValueError(f"{LORA} {path.name}: {key} has rank {rank}, its counterpart {other_rank}.")
    if size != wanted:
        raise ValueError(
            f"{LORA} {path.name}: {key} is {list(tensor.shape)}, the model's layer needs {wanted} features. It is a"
            " LoRA of another model of the same family."
        )


def _peft_layers(path: Path, skeleton, state: dict[str, torch.Tensor]) -> dict[str, LowRank]:
    from peft.tuners.lora import LoraLayer

    name = "file"
    metadata = _peft_metadata(path)
    skeleton.load_lora_adapter(state, adapter_name=name, metadata=metadata, low_cpu_mem_usage=True)
    layers = {}
    for module_name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            # peft's own copies follow the skeleton's base layers onto meta; the tensors are the file's.
            a, b = (state[f"transformer.{module_name}.lora_{part}.weight"] for part in "AB")
            layers[module_name] = LowRank(a, b, float(module.scaling[name]))
    return layers


def _peft_metadata(path: Path) -> dict | None:
    """The adapter configuration that diffusers stores with a LoRA (it holds alpha); None where there is none."""
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("lora_adapter_metadata")
    if stored is None:
        return None
    metadata = json.loads(stored)
    return {k if k.startswith("transformer.") else f"transformer.{k}": v for k, v in metadata.items()}
