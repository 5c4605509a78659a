"""4-bit weights to fp8, int8 or floats in one pass over memory (Triton); the layout is ``layouts.FourBitLayout``'s."""

# Triton takes literals for constexpr parameters.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..layouts import BLOCK, codebook
from .launch import launch

BLOCKS = 32  # of one program


@triton.jit
def _unpack_kernel(
    data_ptr, largest_ptr, codebook_ptr, out_ptr, scale_ptr, blocks,
    FACTOR: tl.constexpr, IS_INT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(blocks, BLOCKS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    largest = tl.load(largest_ptr + row)
    at = data_ptr + row * blocks * 18
    scale_at = at + blocks * 16 + block * 2
    bits = tl.load(scale_at, mask=inside, other=0).to(tl.uint16)
    bits |= tl.load(scale_at + 1, mask=inside, other=0).to(tl.uint16) << 8
    scale = bits.to(tl.float16, bitcast=True).to(tl.float32)
    both = tl.load(at + block[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    values = tl.interleave(tl.load(codebook_ptr + (both & 15)), tl.load(codebook_ptr + (both >> 4)))
    values *= scale[:, None] * (FACTOR if FACTOR > 0 else largest)
    if IS_INT:
        values = tl.where(values >= 0, tl.floor(values + 0.5), tl.ceil(values - 0.5))
    to = out_ptr + row * blocks * 32 + block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(to, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if FACTOR > 0:
        tl.store(scale_ptr + row, largest / FACTOR, mask=part == 0)


_codebook = lru_cache(maxsize=8)(codebook)


def unpack(
    data: torch.Tensor, largest: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None, factor: float
) -> None:
    """Data ``[N, 9 K / 16]`` of rows whose largest numbers are ``largest`` ``[N, 1]`` into ``out`` ``[N, K]``.

    Args:
        scale: ``[N, 1]``, filled with what the rows of ``out`` are to be multiplied with; None: ``out`` is of floats.
        factor: what a row's largest number becomes where there is a scale.
    """
    blocks = out.shape[1] // BLOCK
    launch(
        _unpack_kernel,
        out.shape[0] * triton.cdiv(blocks, BLOCKS),
        (data, largest, _codebook(data.device), out, largest if scale is None else scale),
        (blocks,),
        {"FACTOR": 0.0 if scale is None else factor, "IS_INT": out.dtype == torch.int8, "BLOCKS": BLOCKS},
        warps=4,
    )
