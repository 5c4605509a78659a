"""ggml's block formats to values in one pass over memory (Triton); the layouts are those of ``blocks.py``.

One kernel for all: a program takes a few blocks and computes each value from the bytes it needs. Only the decoding
differs by type. Neighbouring values need neighbouring bytes, so the loads of a warp meet in few cache lines.
"""

# Triton takes literals for constexpr parameters.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from ..blocks import BlockType
from .launch import launch

VALUES = 1024  # of one program


@triton.jit
def _half(at):
    bits = tl.load(at).to(tl.uint16) | (tl.load(at + 1).to(tl.uint16) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _signed(at):
    return tl.load(at).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _field(at, i, RUN: tl.constexpr, BITS: tl.constexpr):
    """Number ``i`` of BITS bits: of each RUN bytes first everyone's lowest bits, then the next higher ones."""
    byte = tl.load(at + i // (RUN * 8 // BITS) * RUN + i % RUN).to(tl.int32)
    return (byte >> (i // RUN % (8 // BITS) * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _of_8(at, j):
    """Scale and minimum ``j`` of 8, 6 bits each (see ``blocks._scales_of_8``)."""
    low = tl.load(at + j).to(tl.int32)
    high = tl.load(at + 4 + j).to(tl.int32)
    before = tl.load(at + tl.maximum(j - 4, 0)).to(tl.int32)
    scale = tl.where(j < 4, low & 63, (high & 15) | (before >> 6 << 4))
    minimum = tl.where(j < 4, high & 63, (high >> 4) | (low >> 6 << 4))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _decode(at, i, TYPE: tl.constexpr):
    """Values ``i`` ``[1, values]`` of the blocks ``at`` ``[blocks, 1]``."""
    if TYPE == "Q4_0":
        y = _half(at) * (_field(at + 2, i, 16, 4) - 8).to(tl.float32)
    elif TYPE == "Q4_1":
        y = _half(at) * _field(at + 4, i, 16, 4).to(tl.float32) + _half(at + 2)
    elif TYPE == "Q5_0":
        q = _field(at + 6, i, 16, 4) | (_field(at + 2, i, 1, 1) << 4)
        y = _half(at) * (q - 16).to(tl.float32)
    elif TYPE == "Q5_1":
        q = _field(at + 8, i, 16, 4) | (_field(at + 4, i, 1, 1) << 4)
        y = _half(at) * q.to(tl.float32) + _half(at + 2)
    elif TYPE == "Q8_0":
        y = _half(at) * _signed(at + 2 + i)
    elif TYPE == "Q2_K":
        both = tl.load(at + i // 16).to(tl.int32)
        q = _field(at + 16, i, 32, 2).to(tl.float32)
        y = _half(at + 80) * (both & 15).to(tl.float32) * q - _half(at + 82) * (both >> 4).to(tl.float32)
    elif TYPE == "Q3_K":
        scale = _field(at + 96, i // 16, 8, 4) | (_field(at + 104, i // 16, 4, 2) << 4)
        q = _field(at + 32, i, 32, 2) - 4 * (1 - _field(at, i, 32, 1))
        y = _half(at + 108) * (scale - 32).to(tl.float32) * q.to(tl.float32)
    elif TYPE == "Q4_K":
        scale, minimum = _of_8(at + 4, i // 32)
        y = _half(at) * scale * _field(at + 16, i, 32, 4).to(tl.float32) - _half(at + 2) * minimum
    elif TYPE == "Q5_K":
        scale, minimum = _of_8(at + 4, i // 32)
        q = _field(at + 48, i, 32, 4) | (_field(at + 16, i, 32, 1) << 4)
        y = _half(at) * scale * q.to(tl.float32) - _half(at + 2) * minimum
    else:
        tl.static_assert(TYPE == "Q6_K")
        q = _field(at, i, 64, 4) | (_field(at + 128, i, 32, 2) << 4)
        y = _half(at + 208) * _signed(at + 192 + i // 16) * (q - 32).to(tl.float32)
    return y


@triton.jit
def _unpack_kernel(
    blocks_ptr, out_ptr, count,
    TYPE: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    i = tl.arange(0, SIZE)[None, :]
    y = _decode(blocks_ptr + block % count * BYTES, i, TYPE)
    tl.store(out_ptr + block * SIZE + i, y.to(out_ptr.dtype.element_ty), mask=block < count)


def unpack(blocks: torch.Tensor, kind: BlockType, out: torch.Tensor) -> None:
    """Blocks ``[n, bytes]`` (uint8) to values ``[n, values]`` in the dtype of ``out``; both contiguous."""
    count, at_once = len(blocks), VALUES // kind.values
    launch(
        _unpack_kernel,
        triton.cdiv(count, at_once),
        (blocks, out),
        (count,),
        {"TYPE": kind.name, "BYTES": kind.nbytes, "SIZE": kind.values, "BLOCKS": at_once},
        warps=4,
    )
