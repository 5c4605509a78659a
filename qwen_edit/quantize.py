"""8- and 4-bit weights: how they are made, what stays in full precision, and their products.

Weights are comfy-kitchen's ``QuantizedTensor`` (ComfyUI >= 0.30 brings it; so do files that ComfyUI's own loader
reads), in these forms:

- ``fp8``: float8_e4m3fn, one scale for each output channel; activations one scale for each token (Hopper, Ada, Blackwell).
- ``int8``: the same with int8 (Turing and later).
- ``w4a4``: comfy-kitchen's 4-bit weights with a rotation (ConvRot, arXiv 2512.03673), multiplied by comfy-kitchen with
  activations in 8 bits. Its 4-bit activations, which only cards with int4 units (7.5 to 8.9) multiply at all, would
  cost 6 dB.
- ``w4a8``: 4-bit weights in IQ4_NL's codes (``layouts.py``), unpacked for each product to what the card multiplies
  fastest: fp8, else int8, else floats.

Which layers keep bf16 is decided by ``keeps_full_precision``, measured on the small trained model
(``benchmarks/results/quantization_cpu.json``), not verified on the released weights.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .kernels import RANK_STEP, Addend
from .kernels.reference import add_low_rank, quantize_rows
from .layouts import FOUR_BIT, ROWWISE_FP8, QuantizedTensor
from .layouts import MISSING as MISSING  # asked for with the rest

FORMATS = ("fp8", "int8", "w4a4", "w4a8")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
FP8_LAYOUTS = (ROWWISE_FP8, "TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout")
INT8_LAYOUT = "TensorWiseINT8Layout"
W4A4_LAYOUT = "TensorCoreConvRotW4A4Layout"
ROTATIONS = (256, 64)  # sizes that comfy-kitchen's kernels know; it also has 16, but scales groups of 64
LEAST_INT_MM_ROWS = 17  # of torch._int_mm on CUDA


# What a weight takes in each form (None: bf16), as a share of its bf16 size.
SHARE = {None: 1.0, "fp8": 0.5, "int8": 0.5, "w4a4": 0.26, "w4a8": 4.5 / 16}


class StaysInRam(nn.Linear):
    """A linear whose weights stay in RAM wherever the model moves, in the dtype of their file or the model's: they are read once for a
    schedule, and each copy is made then."""

    def _apply(self, fn, recurse=True):
        leaves_ram = fn(torch.empty(0, dtype=self.weight.dtype)).device.type not in ("cpu", "meta")
        return self if leaves_ram else super()._apply(fn, recurse)

    def floats(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]``, made on another device of a copy of its data."""
        return data.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.device, non_blocking=True)
        return F.linear(x, self.floats(raw_data(self.weight).to(x.device, non_blocking=True), x.dtype), bias)


def raw_data(weight: Any) -> torch.Tensor:
    """A weight's numbers as they are stored, without the scales of a quantized one."""
    return weight._qdata if isinstance(weight, QuantizedTensor) else weight


def with_data(weight: Any, data: torch.Tensor) -> Any:
    """A quantized weight like this one, of a copy of its data, on the copy's device."""
    return QuantizedTensor(data, weight._layout_cls, weight._params.to_device(data.device))


class QuantizedLinear(nn.Linear):
    """A linear whose weight is to be, or is, quantized, under the usual names.

    ``convert_weight`` and ``set_weight`` are how a patcher edits it: a float copy out, requantized back in.
    ``stored_nbytes`` is the weight's size where it keeps the form of its file (see ``stored_weights``).
    """

    form: str
    stored_nbytes: int | None = None

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_) -> torch.Tensor:
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update: bool = False, seed=None, return_weight: bool = False, **_):
        requantized = self.weight.requantize_from_float(weight).to(self.weight.dtype)
        if return_weight:
            return requantized
        self.weight = nn.Parameter(requantized, requires_grad=False)


class FourBitLinear(QuantizedLinear):
    """One of form w4a4, always called: only comfy-kitchen multiplies with its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or not isinstance(self.weight, QuantizedTensor):
            return super().forward(x)
        # comfy-kitchen's product on the CPU has 4-bit activations, whatever linear_dtype says
        size = self.weight._params.convrot_groupsize
        rows = quantize_rows(_rotate(x.float().flatten(0, -2), size), INT8)
        assert rows.scale is not None
        rounded = _rotate(rows.data * rows.scale, size).view(x.shape)
        return F.linear(rounded.to(x.dtype), self.weight.dequantize(), self.bias)


def quantize_weight(weight: torch.Tensor, form: str) -> torch.Tensor:
    """A weight ``[N, K]`` in one of ``FORMATS``, on the weight's device."""
    if form == "fp8":
        return QuantizedTensor.from_float(weight, ROWWISE_FP8)
    if form == "int8":
        return QuantizedTensor.from_float(weight, INT8_LAYOUT, per_channel=True)
    if form == "w4a8":
        return QuantizedTensor.from_float(weight, FOUR_BIT)
    rotation = next(size for size in ROTATIONS if weight.shape[1] % size == 0)
    return QuantizedTensor.from_float(weight, W4A4_LAYOUT, convrot_groupsize=rotation, linear_dtype="int8")


def _rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """``x`` ``[M, K]`` with each ``size`` channels rotated as comfy-kitchen's weights are (ConvRot's regular Hadamard
    matrix, which is its own inverse)."""
    four = 0.5 * x.new_tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return (x.unflatten(1, (-1, size)) @ matrix).flatten(1)


def keeps_full_precision(name: str) -> bool:
    """Whether the linear of this name (``transformer_blocks.3.attn.to_q``) is never quantized: everything outside the
    blocks, and the modulation, whose errors every token would share.

    Measured on the small trained model (width 192; 20 steps, CFG 4; ``benchmarks/results/quantization_cpu.json``): the
    median PSNR against unquantized pictures is 50 dB in int8, 41 in fp8 and 30 in w4a4 (minima 46, 37, 25). The few
    linears outside the blocks would add about as much error in 4 bit as all of the blocks' together. In the blocks
    ``attn.to_out`` and ``attn.to_v`` cost most: without them the error of w4a4 falls by 26 % and 17 %, but each takes
    0.8 GiB more at full size, so they are quantized too. That order may be another at width 3072.
    """
    return not name.startswith("transformer_blocks.") or is_modulation(name)


def prepare(model: nn.Module, form: str | None) -> None:
    """Replace linears of a transformer without weights: the blocks' by ones that quantize what is read for them to
    ``form`` (none, if it is not one of ``FORMATS``), those of the modulation by ones that stay in RAM."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        # the products need channel counts of multiples of 16, groups with a scale of their own more
        group = {"w4a4": 64, "w4a8": 32}.get(form or "", 16)
        sizes_fit = module.in_features % group == module.out_features % 16 == 0
        if is_modulation(name):
            linear = StaysInRam(module.in_features, module.out_features, device="meta", dtype=module.weight.dtype)
        elif form in FORMATS and sizes_fit and not keeps_full_precision(name):
            kind = FourBitLinear if form == "w4a4" else QuantizedLinear
            linear = kind(module.in_features, module.out_features, device="meta", dtype=module.weight.dtype)
            linear.form = form
        else:
            continue
        model.set_submodule(name, linear.requires_grad_(False))


def drop_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the model back on meta, as ``prepare`` left it: what was quantized awaits weights of ``dtype`` again."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QuantizedTensor):
            weight = torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta")
            module.weight = nn.Parameter(weight, requires_grad=False)
    nn.Module.to(model, "meta")


def is_modulation(name: str) -> bool:
    return ".img_mod." in name or ".txt_mod." in name


def stored_bytes(model: nn.Module) -> int:
    """What the parameters take once they are read, those that stay in RAM left out."""
    total = 0
    for module in model.modules():
        if isinstance(module, StaysInRam):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, QuantizedLinear) or name != "weight":
                total += parameter.nbytes
            elif module.stored_nbytes is not None:
                total += module.stored_nbytes
            else:
                total += round(parameter.numel() * 2 * SHARE[module.form]) if parameter.is_meta else parameter.nbytes
    return total


def in_its_form(module: Any, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that was read for ``module``, quantized if that is how the module keeps it and it is not yet."""
    wanted = isinstance(module, QuantizedLinear) and parameter == "weight" and not isinstance(tensor, QuantizedTensor)
    return quantize_weight(tensor, module.form) if wanted else tensor


def activation_dtype(layout: str) -> torch.dtype | None:
    """What activations are quantized to before a product with weights of this layout; None: not by us."""
    return FP8 if layout in FP8_LAYOUTS else INT8 if layout == INT8_LAYOUT else None


def plain_parts(weight: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Data ``[N, K]`` and scales ``[N, 1]`` of a weight that ``quantized_matmul`` takes; None for other forms."""
    layout, params = weight._layout_cls, weight._params
    rotated = layout == INT8_LAYOUT and (params.convrot or params.transposed)
    if layout not in (*FP8_LAYOUTS, INT8_LAYOUT) or rotated:
        return None
    data, scale = weight._qdata, params.scale
    return data, scale if scale.ndim == 2 else scale.reshape(-1, 1).expand(data.shape[0], 1).contiguous()


def with_row_scales(weight: Any) -> Any:
    """The same weight with a scale for each row, where it has one for all of them: ``plain_parts`` then makes none."""
    parts = None if weight._params.scale.numel() != 1 else plain_parts(weight)
    if parts is None:
        return weight
    data, scale = parts
    return QuantizedTensor(data, weight._layout_cls, replace(weight._params, scale=scale))


def replace_parts(weight: Any, data: torch.Tensor, scale: torch.Tensor) -> None:
    """Put equal data and scales that lie elsewhere in memory into the weight."""
    weight._qdata = data
    weight._params = replace(weight._params, scale=scale.reshape(weight._params.scale.shape))


def quantized_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    addend: Addend | None = None,
) -> torch.Tensor:
    """``(x * x_scale) @ (weight * weight_scale).T + bias`` in ``dtype``.

    Args:
        x: ``[M, K]``, fp8 or int8; ``x_scale`` ``[M, 1]``.
        weight: ``[N, K]`` of the same dtype; ``weight_scale`` ``[N, 1]``.
        addend: of int8 products: what is added to the result before it is rounded.
    """
    assert addend is None or x.dtype == INT8
    multiply = _product(x.device, x.dtype, dtype, addend is not None)
    if multiply is not None:
        more = () if addend is None else (addend,)
        return multiply(x, x_scale, weight, weight_scale, bias, dtype, out, *more)
    y = F.linear(x.float() * x_scale, weight.float() * weight_scale, None if bias is None else bias.float())
    if addend is not None:
        add_low_rank(y, addend)
    return y.to(dtype) if out is None else out.copy_(y)


@lru_cache(maxsize=16)
def _product(device: torch.device, form: torch.dtype, dtype: torch.dtype, with_addend: bool = False):
    """The card's own product of this form, or None where it has none (the float product above is then exact)."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if form == FP8:
        runs = capability >= (8, 9) and dtype in (torch.bfloat16, torch.float16) and fp8_problem(device) is None
        return _scaled_mm if runs else None
    return _int8_product(device, dtype, with_addend) if capability >= (7, 5) else None


def unpacked_form(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """To what ``w4a8`` weights are unpacked for products in ``dtype`` on this device; None: to floats."""
    return next((form for form in (FP8, INT8) if multiplies(device, form, dtype)), None)


def activations(form: str | None, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """What activations in ``dtype`` are quantized to before our own products with weights of a form."""
    return unpacked_form(device, dtype) if form == "w4a8" else {"fp8": FP8, "int8": INT8}.get(form or "")


def multiplies(device: torch.device, form: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a product of this form runs as one here; on the CPU it is made of float ones."""
    return device.type == "cpu" or _product(device, form, dtype) is not None


@lru_cache(maxsize=4)
def fp8_problem(device: torch.device) -> str | None:
    """Why fp8 with a scale for each row does not run on a CUDA device that could, or None: not every build of torch has
    it for every card (Windows and early Blackwell among them), so it is tried."""
    x = torch.ones((32, 32), device=device).to(FP8)
    scale = torch.ones((32, 1), device=device)
    try:
        _scaled_mm(x, scale, x, scale, torch.ones(32, dtype=torch.bfloat16, device=device), torch.bfloat16, None)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        return f"torch {torch.__version__} refuses the product on this card ({next(iter(str(e).splitlines()), e)})"
    return None


def _scaled_mm(x, x_scale, weight, weight_scale, bias, dtype, out):
    arguments = {"scale_a": x_scale, "scale_b": weight_scale.t(), "out_dtype": dtype, "use_fast_accum": True}
    if bias is not None and dtype != torch.bfloat16:
        y = torch._scaled_mm(x, weight.t(), **arguments) + bias  # row-wise scales take a bf16 bias only
        return y if out is None else out.copy_(y)
    if out is None:
        return torch._scaled_mm(x, weight.t(), bias=bias, **arguments)
    return torch._scaled_mm(x, weight.t(), bias=bias, out=out, **arguments)


def _int8_product(device: torch.device, dtype: torch.dtype, with_addend: bool):
    """Our kernel, tried with a real call; PyTorch's where Triton or the card refuses it."""
    x = torch.ones((32, 32), dtype=torch.int8, device=device)
    scale = torch.ones((32, 1), device=device)
    factor = torch.ones((RANK_STEP, 32), dtype=dtype, device=device)
    try:
        from .kernels.int8_matmul import int8_matmul

        int8_matmul(x, scale, x, scale, None, dtype, None, Addend(factor, factor) if with_addend else None)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the note on the node says that Triton does not run, and why
        return _int_mm
    return int8_matmul


def _int_mm(x, x_scale, weight, weight_scale, bias, dtype, out, addend=None):
    count = len(x)
    x = F.pad(x, (0, 0, 0, max(0, LEAST_INT_MM_ROWS - count)))
    y = torch._int_mm(x, weight.t())[:count].float() * x_scale * weight_scale.t()
    if addend is not None:
        add_low_rank(y, addend)
    y = (y if bias is None else y + bias).to(dtype)
    return y if out is None else out.copy_(y)
