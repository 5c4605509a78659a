"""Quantized weights of a file as tensors, and the linears that keep them as they are stored.

fp8 and int8 without rotation take the form of our own kernels, with their numbers untouched: data ``[N, K]`` and one
scale for each row. Everything else is comfy-kitchen's to multiply; where it does not on this device, the weight is
dequantized for each product, which is exact and slow.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import layouts, quantize
from .blocks import BlockType
from .quantize import (
    FP8,
    INT8_LAYOUT,
    ROWWISE_FP8,
    W4A4_LAYOUT,
    FourBitLinear,
    QuantizedLinear,
    QuantizedTensor,
    StaysInRam,
    is_modulation,
    with_data,
)
from .stored_formats import SMOOTHING, StoredWeight

LAYOUTS = {
    "float8_e4m3fn": ROWWISE_FP8,
    "float8_e5m2": ROWWISE_FP8,
    "int8_tensorwise": INT8_LAYOUT,
    "convrot_w4a4": W4A4_LAYOUT,
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
}
LEAST_CAPABILITY = {
    "fp8": (8, 9),
    "int8": (7, 5),
    "int8_convrot": (7, 5),
    "w4a4": (7, 5),
    "nvfp4": (10, 0),
    "mxfp8": (10, 0),
}
OURS = ("fp8", "int8")  # families that our kernels multiply
BOTH_SIDES = ("nvfp4", "mxfp8")  # families whose product wants activations in the same form
SCALE_DTYPES = {"nvfp4": torch.float8_e4m3fn, "mxfp8": torch.float8_e8m0fnu}  # of blocks; some files call them uint8


def as_quantized(
    stored: StoredWeight,
    data: torch.Tensor,
    scales: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Any:
    """The weight ``[N, K]`` as a ``QuantizedTensor`` that dequantizes to ``dtype``.

    Args:
        data: as it is in the file; ``scales`` by the parameters of the layout. All on one device.
    """
    layout, rows = LAYOUTS[stored.format], shape[0]
    options: dict[str, Any] = dict(scales)
    if stored.format in SCALE_DTYPES:
        blocks = "block_scale" if "block_scale" in scales else "scale"
        options[blocks] = scales[blocks].view(SCALE_DTYPES[stored.format])
    else:
        scale = scales.get("scale", torch.ones((), device=data.device)).float().reshape(-1, 1)
        options["scale"] = scale.expand(rows, 1).contiguous()
    if stored.format == "float8_e5m2":
        data, options["scale"] = _as_e4m3(data, options["scale"])
    elif stored.format == "convrot_w4a4":
        # 8-bit activations on the same weights are the more exact product, see ``quantize``
        options |= {"scale": options["scale"].flatten(), "convrot_groupsize": stored.rotation, "linear_dtype": "int8"}
    elif stored.rotation:
        options |= {"convrot": True, "convrot_groupsize": stored.rotation}
    params = layouts.kitchen.get_layout_class(layout).Params(orig_dtype=dtype, orig_shape=tuple(shape), **options)
    return QuantizedTensor(data, layout, params)


def _as_e4m3(data: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e5m2 as float8_e4m3fn: that has a bit more, and a row scaled by a power of two fits into its range but for
    numbers below 2^-15 of the row's largest."""
    values = data.float()
    largest = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float8_e5m2).smallest_normal)
    factor = torch.exp2(torch.floor(torch.log2(448 / largest)))
    return (values * factor).to(FP8), scale / factor


def dequantized(weight: Any, smoothing: torch.Tensor | None) -> torch.Tensor:
    """The float weight that multiplies plain activations."""
    full = weight.dequantize()
    return full if smoothing is None else full * smoothing.to(full)


class KitchenLinear(QuantizedLinear):
    """One whose stored weight comfy-kitchen multiplies.

    ``smoothing``: factors ``[K]`` of the input that the weight expects, or None.
    """

    smoothing: torch.Tensor | None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("smoothing", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        rows = (x if self.smoothing is None else x * self.smoothing.to(x)).flatten(0, -2)
        if self.form in BOTH_SIDES:
            rows = QuantizedTensor.from_float(rows, weight._layout_cls)
        return F.linear(rows, weight, self.bias).view(*x.shape[:-1], self.out_features)

    def convert_weight(self, weight, inplace=False, **_):
        return dequantized(weight, self.smoothing) if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **_):
        if self.smoothing is not None:
            weight = weight / self.smoothing.to(weight)
        return super().set_weight(weight, inplace_update, seed, return_weight)


class DequantizedLinear(KitchenLinear):
    """One whose stored weight nothing multiplies on this device, or whose file asks for a product in full precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantized(self.weight, self.smoothing), self.bias)


class StoredInRam(StaysInRam):
    """One that stays in RAM as it is stored, and is dequantized where it is used."""

    stored_nbytes = 0  # on the card
    convert_weight = QuantizedLinear.convert_weight
    set_weight = QuantizedLinear.set_weight

    def floats(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return with_data(self.weight, data).dequantize()


def families(stored: Mapping[str, StoredWeight | BlockType]) -> Counter[str]:
    """How many of the blocks' linears a file holds in each family, those of the modulation left out."""
    return Counter(
        w.family for name, w in stored.items() if name.startswith("transformer_blocks.") and not is_modulation(name)
    )


def keep_stored(
    model: nn.Module,
    stored: Mapping[str, StoredWeight],
    device: torch.device,
    products: str | None,
    *,
    modulation_only: bool = False,
    full_precision: bool = True,
) -> None:
    """After ``quantize.prepare``: linears of the blocks that keep the weights which a file has quantized.

    Args:
        model: on meta.
        device: where it will run.
        products: which of ``OURS`` our kernels multiply; one, because the rows that linears share have one form.
        modulation_only: the other linears are made of dequantized weights.
        full_precision: do as a file says that asks for products in full precision.
    """
    for name, weight in stored.items():
        path = name.removesuffix(".weight")
        module: Any = model.get_submodule(path)
        options = {"bias": module.bias is not None, "device": "meta", "dtype": module.weight.dtype}
        sizes = module.in_features, module.out_features
        if isinstance(module, StaysInRam):
            if weight.smoothing is None:
                model.set_submodule(path, StoredInRam(*sizes, **options).requires_grad_(False))
        elif name.startswith("transformer_blocks.") and not modulation_only:
            linear = _kind(weight, sizes, device, products, full_precision)(*sizes, **options)
            linear.form, linear.stored_nbytes = weight.family, weight.nbytes(module.weight.shape)
            model.set_submodule(path, linear.requires_grad_(False))


def _kind(
    weight: StoredWeight, sizes: tuple[int, int], device: torch.device, products: str | None, full_precision: bool
):
    asked = weight.full_precision and full_precision
    if weight.family == products and not asked and all(size % 16 == 0 for size in sizes):
        return QuantizedLinear
    if asked or weight.family in OURS or product_problem(weight.family, device) is not None:
        return DequantizedLinear
    return FourBitLinear if weight.family == "w4a4" else KitchenLinear


def for_module(
    module: Any, stored: StoredWeight, data: torch.Tensor, beside: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """What was read of a weight: as stored where ``keep_stored`` has chosen the module for it, else as floats.

    Args:
        beside: the weight's scales, and smoothing if it has one; on the device of ``data``.
    """
    scales = {what: tensor for what, tensor in beside.items() if what != SMOOTHING}
    weight = as_quantized(stored, data, scales, (module.out_features, module.in_features), dtype)
    if isinstance(module, KitchenLinear):
        module.smoothing = beside.get(SMOOTHING)
    elif not isinstance(module, QuantizedLinear | StoredInRam) or module.stored_nbytes is None:
        return dequantized(weight, beside.get(SMOOTHING))
    return weight


def product_problem(family: str, device: torch.device) -> str | None:
    """Why weights of this family are not multiplied in their form here, or None. On the CPU all but ``BOTH_SIDES`` are,
    as float products with activations rounded as on a card."""
    if quantize.MISSING is not None:
        return quantize.MISSING
    if family == "w4a8":
        return None  # as floats, where the device has no product of 8-bit numbers
    if device.type == "cpu":
        return f"no product of {family} is known for the CPU" if family in BOTH_SIDES else None
    if device.type != "cuda":
        return f"no product of 8-bit numbers is known for {device.type}"
    capability, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY[family]
    if capability < least:
        return f"it needs compute capability {least[0]}.{least[1]}, this card has {capability[0]}.{capability[1]}"
    if family == "fp8":
        return quantize.fp8_problem(device)
    return _block_product_problem(family, device) if family in BOTH_SIDES else None


@lru_cache(maxsize=8)
def _block_product_problem(family: str, device: torch.device) -> str | None:
    """Tried with a real call, because comfy-kitchen's linear dequantizes without a word where its kernel fails."""
    import comfy_kitchen

    layout = layouts.kitchen.get_layout_class(LAYOUTS[family])
    x = QuantizedTensor.from_float(torch.ones((128, 128), dtype=torch.bfloat16, device=device), LAYOUTS[family])
    parts = layout.get_plain_tensors(x)
    try:
        if family == "nvfp4":
            data, scale, blocks = parts
            comfy_kitchen.scaled_mm_nvfp4(data, data, scale, scale, blocks, blocks, out_dtype=torch.bfloat16)
        else:
            data, blocks = parts
            comfy_kitchen.scaled_mm_mxfp8(data, data, blocks, blocks, out_dtype=torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        return f"comfy-kitchen refuses the product on this card ({next(iter(str(e).splitlines()), e)})"
    return None
