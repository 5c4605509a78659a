"""The Triton twin of ``reference.add_to_quantized``: one program for a few rows of a weight, which it reads twice."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .reference import QUANTIZED_MAX

ROWS, COLUMNS = 16, 256
RANKS = 32  # of a step; products take at least 16


@triton.jit
def _in_units_of_the_scale(
    q_ptr, a_ptr, b_ptr, m, k, N, K, R, q_stride, b_stride, inverse,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Weight and difference, divided by the rows' old scales, ``[BM, BK]``."""
    difference = tl.zeros((BM, BK), dtype=tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        b = tl.load(b_ptr + m[:, None] * b_stride + r[None, :], mask=(m < N)[:, None] & (r < R)[None, :], other=0.0)
        a = tl.load(a_ptr + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        difference = tl.dot(b, a, difference, input_precision="ieee")
    inside = (m < N)[:, None] & (k < K)[None, :]
    q = tl.load(q_ptr + m[:, None].to(tl.int64) * q_stride + k[None, :], mask=inside, other=0.0)
    return tl.where(inside, q.to(tl.float32) + difference * inverse[:, None], 0.0)


@triton.jit
def _add_to_quantized_kernel(
    q_ptr, scale_ptr, a_ptr, b_ptr, out_ptr, out_scale_ptr, N, K, R, q_stride, b_stride, out_stride,
    LIMIT: tl.constexpr, IS_INT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = tl.load(scale_ptr + m, mask=m < N, other=1.0)
    inverse = 1.0 / scale
    largest = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        v = _in_units_of_the_scale(q_ptr, a_ptr, b_ptr, m, k, N, K, R, q_stride, b_stride, inverse, BM, BK, BR)
        largest = tl.maximum(largest, tl.max(tl.abs(v), axis=1))
    growth = tl.maximum(largest / LIMIT, 1.0)
    tl.store(out_scale_ptr + m, scale * growth, mask=m < N)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        v = _in_units_of_the_scale(q_ptr, a_ptr, b_ptr, m, k, N, K, R, q_stride, b_stride, inverse, BM, BK, BR)
        v = v / growth[:, None]
        x = (m[:, None] * K + k[None, :]).to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        x = x ^ (x >> 16)
        if IS_INT:
            v = tl.floor(v + (x >> 8).to(tl.float32) * 0.000000059604644775390625)  # 2^-24
            v = tl.maximum(v, -LIMIT)
        else:
            size = tl.abs(v)
            bits = (size.to(tl.int32, bitcast=True) + (x >> 12).to(tl.int32)) & -1048576  # all but the last 20 bits
            normal = bits.to(tl.float32, bitcast=True)
            tiny = tl.floor(size * 512.0 + (x >> 8).to(tl.float32) * 0.000000059604644775390625) / 512.0
            size = tl.where(size < 0.015625, tiny, normal)
            v = tl.where(v < 0.0, -tl.minimum(size, LIMIT), tl.minimum(size, LIMIT))
        v = tl.minimum(v, LIMIT)
        inside = (m < N)[:, None] & (k < K)[None, :]
        at = out_ptr + m[:, None].to(tl.int64) * out_stride + k[None, :]
        tl.store(at, v.to(out_ptr.dtype.element_ty), mask=inside)


def add_to_quantized(
    data: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor,
) -> None:
    (rows, width), rank = data.shape, len(a)
    launch(
        _add_to_quantized_kernel,
        triton.cdiv(rows, ROWS),
        (data, scale, a, b, out, out_scale),
        (rows, width, rank, data.stride(0), b.stride(0), out.stride(0)),
        {
            "LIMIT": QUANTIZED_MAX[data.dtype], "IS_INT": data.dtype == torch.int8, "BM": ROWS, "BK": COLUMNS,
            "BR": RANKS,
        },
        warps=4,
    )  # fmt: skip
