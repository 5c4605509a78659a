"""Small transformers written as ComfyUI's quantized single files, by comfy-kitchen alone."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import comfy_kitchen.tensor as kitchen
import torch
from safetensors.torch import save_file

from qwen_edit.transformer import QwenEditTransformer

# Wide enough for rotations of 256 channels.
CONFIG = dict(num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=256)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
State = dict[str, torch.Tensor]

LAYOUTS = {
    "int8 tensorwise": ("int8_tensorwise", "TensorWiseINT8Layout", {}, {}),
    "int8 rowwise": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8_convrot": (
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True},
        {"convrot": True, "convrot_groupsize": 256},
    ),
    "int8_convrot 64": (
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"params": {"convrot": True, "convrot_groupsize": 64}},
    ),
    "w4a4": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {}, {"convrot_groupsize": 256}),
    "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout", {}, {}),
    "mxfp8": ("mxfp8", "TensorCoreMXFP8Layout", {}, {}),
}


def float_state() -> State:
    """Of the small transformer."""
    return dict(_float_state())


@cache
def _float_state() -> State:
    return random_state(CONFIG)


def random_state(config: Mapping[str, int]) -> State:
    """Random weights with the spread of trained ones, in bf16, for ``QwenEditTransformer(**config)``."""
    with torch.device("meta"):
        model = QwenEditTransformer(**config)
    spread = 0.64 / (config["num_attention_heads"] * config["attention_head_dim"]) ** 0.5
    generator, state = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        gain = name.endswith("weight") and tensor.ndim == 1
        state[name] = (torch.randn(tensor.shape, generator=generator) * spread + gain).bfloat16()
    return state


@cache
def state_of(variant: str) -> State:
    return VARIANTS[variant](float_state())


def in_block(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("transformer_blocks.") and tensor.ndim == 2


def without_modulation(name: str, tensor: torch.Tensor) -> bool:
    return in_block(name, tensor) and "_mod." not in name


def described(layer: str, state: State, **description) -> None:
    text = json.dumps(description).encode()
    state[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)


def scaled(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale = tensor.float().abs().amax() / torch.finfo(dtype).max
    return (tensor.float() / scale).to(dtype), scale


def _plain(state: State, dtype=E4M3, which=lambda name, tensor: True) -> State:
    return {n: t.to(dtype) if which(n, t) else t for n, t in state.items()}


def _old_scaled(state: State, marker: torch.Tensor) -> State:
    result = {"scaled_fp8": marker}
    for name, tensor in state.items():
        result[name] = tensor
        if in_block(name, tensor):
            layer = name.removesuffix(".weight")
            result[name], result[f"{layer}.scale_weight"] = scaled(tensor, E4M3)
            result[f"{layer}.scale_input"] = torch.tensor(1.0)
    return result


def in_fp8(state: State, which, dtype=E4M3, describe=True, **description) -> State:
    result = {}
    for name, tensor in state.items():
        result[name] = tensor
        if which(name, tensor):
            layer = name.removesuffix(".weight")
            result[name], result[f"{layer}.weight_scale"] = scaled(tensor, dtype)
            result[f"{layer}.input_scale"] = torch.tensor(0.02)
            if describe:
                described(layer, result, format=str(dtype).removeprefix("torch."), **description)
    return result


def in_layout(state: State, kind: str, which=in_block) -> State:
    format, layout, options, description = LAYOUTS[kind]
    result = {}
    for name, tensor in state.items():
        if not which(name, tensor):
            result[name] = tensor
            continue
        quantized = kitchen.QuantizedTensor.from_float(tensor, layout, **options)
        result |= quantized.state_dict(name)
        described(name.removesuffix(".weight"), result, format=format, **description)
    return result


def _attention(name: str, tensor: torch.Tensor) -> bool:
    return in_block(name, tensor) and ".attn." in name


def _mlp(name: str, tensor: torch.Tensor) -> bool:
    return without_modulation(name, tensor) and ".attn." not in name


def _smoothed(state: State) -> State:
    """As ModelOpt's AWQ writes them: the weight takes an input that was multiplied by these factors."""
    factors = {}
    for name, tensor in state.items():
        if without_modulation(name, tensor):
            factors[name] = torch.rand(tensor.shape[1]) + 0.5
            state = state | {name: (tensor.float() / factors[name]).bfloat16()}
    result = in_layout(state, "nvfp4", without_modulation)
    return result | {f"{n.removesuffix('.weight')}.pre_quant_scale": f.bfloat16() for n, f in factors.items()}


VARIANTS = {
    "fp8 plain": _plain,
    "fp8 plain, some": lambda state: _plain(state, which=without_modulation),
    "e5m2 plain": lambda state: _plain(state, E5M2),
    "fp8 scaled, old": lambda state: _old_scaled(state, torch.zeros(0, dtype=E4M3)),
    "fp8 scaled, old, full precision": lambda state: _old_scaled(state, torch.zeros(2, dtype=E4M3)),
    "fp8 scaled": lambda state: in_fp8(state, in_block),
    "e5m2 scaled": lambda state: in_fp8(state, in_block, E5M2),
    "fp8 full precision": lambda state: in_fp8(state, in_block, full_precision_matrix_mult=True),
    "fp8 mixed": lambda state: in_fp8(state, _mlp),
    "fp8 by metadata": lambda state: in_fp8(state, in_block, describe=False),
    **{kind: (lambda state, kind=kind: in_layout(state, kind)) for kind in LAYOUTS},
    "nvfp4 and fp8": lambda state: in_layout(in_fp8(state, _attention), "nvfp4", _mlp),
    "nvfp4 smoothed": _smoothed,
    "int8 and fp8": lambda state: in_layout(in_fp8(state, _attention), "int8 rowwise", _mlp),
}


def metadata_of(variant: str, state: State) -> dict[str, str] | None:
    if variant != "fp8 by metadata":
        return None
    layers = [n.removesuffix(".weight_scale") for n in state if n.endswith(".weight_scale")]
    return {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}})}


def write(path: Path, variant: str, prefix: str = "", **more: torch.Tensor) -> None:
    """The variant of the small transformer as one file, marked as 2511."""
    write_state(path, variant, state_of(variant), prefix, **more)


def write_state(path: Path, variant: str, state: State, prefix: str = "", **more: torch.Tensor) -> None:
    """A state that is in this variant already, as one file, marked as 2511."""
    state = state | {"__index_timestep_zero__": torch.zeros(0)}
    state = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state | more, path, metadata=metadata_of(variant, state))
