"""ggml's block formats to values in one pass over memory (Triton); the layouts are those of ``blocks.py``.

One kernel for all: a program takes a few blocks and computes each value from the bytes it needs. Only the decoding
differs by type. Neighbouring values need neighbouring bytes, so the loads of a warp meet in few cache lines.
"""

# Triton takes literals for constexpr parameters.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from ..blocks import NONLINEAR, BlockType
from .launch import launch

VALUES = 1024  # of one program
GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}  # how many values share a scale; else 32
# NONLINEAR as bytes of two 64-bit numbers, so that a look-up is a shift.
_LOW, _HIGH = (
    tl.constexpr(int.from_bytes(bytes(n & 255 for n in half), "little", signed=True))
    for half in (NONLINEAR[:8], NONLINEAR[8:])
)


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
def _nonlinear(q):
    """What the 4 bits ``q`` stand for in the IQ4 formats."""
    byte = (tl.where(q < 8, _LOW, _HIGH) >> ((q & 7) * 8)) & 255
    return ((byte ^ 128) - 128).to(tl.float32)


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
def _decode(at, i, j, TYPE: tl.constexpr):
    """Values ``i`` ``[groups, values]`` of the blocks at the pointers ``at`` ``[blocks]``; each group ``j`` ``[groups]`` has
    one scale. What belongs to a group is loaded once for it: a value's layout would load it for each value."""
    group = at[:, None]
    value = at[:, None, None]
    i = i[None, :, :]
    j = j[None, :]
    if TYPE == "Q4_0":
        y = _half(at)[:, None, None] * (_field(value + 2, i, 16, 4) - 8).to(tl.float32)
    elif TYPE == "Q4_1":
        q = _field(value + 4, i, 16, 4)
        y = _half(at)[:, None, None] * q.to(tl.float32) + _half(at + 2)[:, None, None]
    elif TYPE == "Q5_0":
        q = _field(value + 6, i, 16, 4) | (_field(value + 2, i, 1, 1) << 4)
        y = _half(at)[:, None, None] * (q - 16).to(tl.float32)
    elif TYPE == "Q5_1":
        q = _field(value + 8, i, 16, 4) | (_field(value + 4, i, 1, 1) << 4)
        y = _half(at)[:, None, None] * q.to(tl.float32) + _half(at + 2)[:, None, None]
    elif TYPE == "Q8_0":
        y = _half(at)[:, None, None] * _signed(value + 2 + i)
    elif TYPE == "Q2_K":
        both = tl.load(group + j).to(tl.int32)
        scale = _half(at + 80)[:, None] * (both & 15).to(tl.float32)
        minimum = _half(at + 82)[:, None] * (both >> 4).to(tl.float32)
        y = scale[:, :, None] * _field(value + 16, i, 32, 2).to(tl.float32) - minimum[:, :, None]
    elif TYPE == "Q3_K":
        six = _field(group + 96, j, 8, 4) | (_field(group + 104, j, 4, 2) << 4)
        scale = _half(at + 108)[:, None] * (six - 32).to(tl.float32)
        q = _field(value + 32, i, 32, 2) - 4 * (1 - _field(value, i, 32, 1))
        y = scale[:, :, None] * q.to(tl.float32)
    elif TYPE == "Q6_K":
        scale = _half(at + 208)[:, None] * _signed(group + 192 + j)
        q = _field(value, i, 64, 4) | (_field(value + 128, i, 32, 2) << 4)
        y = scale[:, :, None] * (q - 32).to(tl.float32)
    elif TYPE == "IQ4_NL":
        y = _half(at)[:, None, None] * _nonlinear(_field(value + 2, i, 16, 4))
    elif TYPE == "IQ4_XS":
        six = _field(group + 4, j, 1, 4) | (_field(group + 2, j, 1, 2) << 4)
        scale = _half(at)[:, None] * (six - 32).to(tl.float32)
        y = scale[:, :, None] * _nonlinear(_field(value + 8, i, 16, 4))
    else:
        scale, minimum = _of_8(group + 4, j)
        scale *= _half(at)[:, None]
        minimum *= _half(at + 2)[:, None]
        if TYPE == "Q4_K":
            q = _field(value + 16, i, 32, 4)
        else:
            tl.static_assert(TYPE == "Q5_K")
            q = _field(value + 48, i, 32, 4) | (_field(value + 16, i, 32, 1) << 4)
        y = scale[:, :, None] * q.to(tl.float32) - minimum[:, :, None]
    return y


@triton.jit
def _unpack_kernel(
    blocks_ptr, out_ptr, count,
    TYPE: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    j = tl.arange(0, SIZE // GROUP)
    i = j[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    y = _decode(blocks_ptr + block % count * BYTES, i, j, TYPE)
    at = out_ptr + block[:, None, None] * SIZE + i[None, :, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(block < count)[:, None, None])


def constants(kind: BlockType) -> dict[str, str | int]:
    return {
        "TYPE": kind.name,
        "BYTES": kind.nbytes,
        "SIZE": kind.values,
        "GROUP": GROUPS.get(kind.name, 32),
        "BLOCKS": VALUES // kind.values,
    }


def unpack(blocks: torch.Tensor, kind: BlockType, out: torch.Tensor) -> None:
    """Blocks ``[n, bytes]`` (uint8) to values ``[n, values]`` in the dtype of ``out``; both contiguous."""
    count = len(blocks)
    launch(_unpack_kernel, triton.cdiv(count, VALUES // kind.values), (blocks, out), (count,), constants(kind), warps=4)
