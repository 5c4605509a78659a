"""How our own quantized weights lie in memory, as layouts of comfy-kitchen's ``QuantizedTensor``."""

from dataclasses import dataclass
from typing import Any

import torch

from .kernels.reference import SMALLEST_SCALE

try:
    import comfy_kitchen.tensor as kitchen

    MISSING = None
    QuantizedTensor: Any = kitchen.QuantizedTensor
    BaseLayoutParams: Any = kitchen.BaseLayoutParams
    QuantizedLayout: Any = kitchen.QuantizedLayout
except ImportError as e:
    MISSING = f"the package comfy-kitchen is not installed ({e})"
    QuantizedTensor = type("QuantizedTensor", (), {})  # so that isinstance answers no
    BaseLayoutParams = QuantizedLayout = object

ROWWISE_FP8 = "QwenEditRowwiseFP8Layout"
FOUR_BIT = "QwenEditFourBitLayout"
LARGEST_WEIGHT = 56.0  # of our fp8; 2**-6, below which e4m3 loses digits, is a 3584th of it
# ggml's kvalues_iq4nl (ggml-common.h)
CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BLOCK = 32  # values that share a scale
PEAKS = (0.9, 1.0, 1.1)  # how far a block's largest number may lie from the code that it would have
VALUES_AT_ONCE = 2**22  # of the float32 intermediates


class RowwiseFP8Layout(QuantizedLayout):
    """float8_e4m3fn with one float32 scale ``[N, 1]`` for each row.

    A row's largest number becomes ``LARGEST_WEIGHT``, not fp8's 448: floating-point numbers are as precise there, and the
    B of LoRAs, which share the scale, may be larger (see ``extra_channels.py``).
    """

    MIN_SM_VERSION = (8, 9)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        pass

    @classmethod
    def quantize(cls, tensor, **_):
        largest = tensor.abs().amax(dim=1, keepdim=True).float()
        scale = largest.clamp(min=SMALLEST_SCALE) / LARGEST_WEIGHT
        params = cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))
        return (tensor.float() / scale).to(torch.float8_e4m3fn), params

    @classmethod
    def dequantize(cls, qdata, params):
        return (qdata.float() * params.scale).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}


class FourBitLayout(QuantizedLayout):
    """Codes of ggml's IQ4_NL, 16 unevenly spaced numbers, which suit weights' bell curve better than even steps.

    The data are uint8 ``[N, 9 K / 16]``: of each row first the codes, two in a byte (the lower half first), then a float16
    for each 32 of them. The value is code times that times the row's largest number, ``scale`` ``[N, 1]`` in float32: so
    a row becomes fp8 or int8 with one scale without a look at its other blocks. At 4.5 bits random normal weights are
    off by 7.5 % (NF4 with blocks of 64, 4.25 bits: 9.2 %).
    """

    MIN_SM_VERSION = (0, 0)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        pass

    @classmethod
    def quantize(cls, tensor, **_):
        rows, width = tensor.shape
        data = torch.empty((rows, width // 16 * 9), dtype=torch.uint8, device=tensor.device)
        largest = tensor.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_SCALE)
        at_once = max(1, VALUES_AT_ONCE // width)
        for part, scale, out in zip(*(t.split(at_once) for t in (tensor, largest, data)), strict=True):
            codes, scales = _nearest_codes((part.float() / scale).unflatten(1, (-1, BLOCK)))
            out[:, : width // 2] = codes[:, 0::2] | codes[:, 1::2] << 4
            out[:, width // 2 :] = scales.view(torch.uint8)
        return data, cls.Params(scale=largest, orig_dtype=tensor.dtype, orig_shape=(rows, width))

    @classmethod
    def dequantize(cls, qdata, params):
        return (cls.relative(qdata, params.orig_shape[1]) * params.scale).to(params.orig_dtype)

    @classmethod
    def relative(cls, qdata: torch.Tensor, width: int) -> torch.Tensor:
        """The values as shares of each row's largest number, float32 ``[N, K]``."""
        packed, scales = qdata[:, : width // 2], qdata[:, width // 2 :].contiguous().view(torch.float16)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(len(qdata), -1, BLOCK)
        return (codebook(qdata.device)[codes.int()] * scales.float()[:, :, None]).flatten(1)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}


def codebook(device: torch.device) -> torch.Tensor:
    return torch.tensor(CODES, dtype=torch.float32, device=device)


def _nearest_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[N, K]`` (uint8) and scales ``[N, blocks]`` (float16) of ``x`` ``[N, blocks, 32]``.

    Each of ``PEAKS`` gives codes; the codes to which x is most nearly parallel win, and the scale with the least squared
    error for them is kept.
    """
    table = codebook(x.device)
    between = (table[1:] + table[:-1]) / 2
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    peak = torch.where(peak == 0, 1.0, peak) / CODES[0]
    best, scale = torch.full_like(peak, -1.0), peak
    for share in PEAKS:
        q = table[torch.bucketize(x / (peak * share), between)]
        along, length = (q * x).sum(-1, keepdim=True), q.square().sum(-1, keepdim=True)
        better = along.square() / length > best
        best, scale = torch.where(better, along.square() / length, best), torch.where(better, along / length, scale)
    half = scale.half()
    divisor = torch.where(half == 0, 1.0, half.float())
    codes = torch.bucketize(x / divisor, between, out_int32=True).to(torch.uint8)
    return codes.flatten(1), half.squeeze(-1)


if MISSING is None:
    kitchen.register_layout_class(ROWWISE_FP8, RowwiseFP8Layout)
    kitchen.register_layout_class(FOUR_BIT, FourBitLayout)
