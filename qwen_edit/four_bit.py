"""Weights of 4 bits (``layouts.FourBitLayout``), unpacked for each product to the form that the card multiplies fastest.

Unpacking moves a few per cent of the bytes of a forward, so a card has the weights' size of 4 bits at nearly the speed
of 8, and activations keep 8 bits or more.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from .layouts import FOUR_BIT, LARGEST_WEIGHT, FourBitLayout, QuantizedTensor
from .quantize import unpacked_form

# What a row's largest number becomes. Others of the row may come out a little larger than it: their block's scale fits
# the block as a whole.
LARGEST = {torch.float8_e4m3fn: LARGEST_WEIGHT, torch.int8: 100.0}


def is_four_bit(weight: Any) -> bool:
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == FOUR_BIT


def unpacked_weights(weights: Sequence[Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights over the same input side by side: ``[sum of N, K]`` in fp8 or int8 and the rows' scales ``[sum of N, 1]``,
    or in ``dtype`` and None where the device multiplies neither (see ``quantize.unpacked_form``)."""
    parts = [(w._qdata, w._params.scale) for w in weights]
    device, width = parts[0][0].device, weights[0].shape[1]
    rows = [len(data) for data, _ in parts]
    form = unpacked_form(device, dtype)
    out = torch.empty((sum(rows), width), dtype=form or dtype, device=device)
    scale = None if form is None else torch.empty((sum(rows), 1), device=device)
    unpack = (_kernel(device, out.dtype) if device.type == "cuda" else None) or unpack_reference
    at = 0
    for (data, largest), count in zip(parts, rows, strict=True):
        own = slice(at, at + count)
        unpack(data, largest, out[own], None if scale is None else scale[own], LARGEST.get(out.dtype, 0.0))
        at += count
    return out, scale


def unpack_reference(
    data: torch.Tensor, largest: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None, factor: float
) -> None:
    """What ``kernels/four_bit.py`` does, in plain PyTorch."""
    values = FourBitLayout.relative(data, out.shape[1])
    if scale is None:
        out.copy_(values * largest)
        return
    scale.copy_(largest / factor)
    values *= factor
    out.copy_(values.round() if out.dtype == torch.int8 else values)


@lru_cache(maxsize=8)
def _kernel(device: torch.device, dtype: torch.dtype):
    """The Triton kernel, tried against PyTorch; None where it does not run."""
    weight = torch.linspace(-1, 1, 4 * 64, device=device).reshape(4, 64)
    data, params = FourBitLayout.quantize(weight)
    results = []
    try:
        from .kernels.four_bit import unpack

        for call in (unpack_reference, unpack, unpack):  # a second launch takes another way
            out = torch.zeros((4, 64), dtype=dtype, device=device)
            scale = torch.zeros((4, 1), device=device) if dtype in LARGEST else None
            call(data, params.scale, out, scale, LARGEST.get(dtype, 0.0))
            results.append(out.float() * (1.0 if scale is None else scale))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0.1, atol=0.02)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the note on the node says that Triton does not run, and why
        return None
    return unpack
