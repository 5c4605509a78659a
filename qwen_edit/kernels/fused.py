"""The fused operations as Triton kernels: one pass over memory each, the row in registers.

Contracts and names are those of ``reference.py``. All arithmetic is float32; results are rounded once, on store.
"""

import torch
import triton
import triton.language as tl

from . import reference
from .contract import Modulation, Rows, Update, padded_width
from .launch import launch
from .reference import QUANTIZED_MAX, SMALLEST_SCALE
from .requantize import add_to_quantized as add_to_quantized

_QUANTIZATION = {
    dtype: {
        "QUANTIZE": dtype is not None,
        "SMALLEST": SMALLEST_SCALE,
        "LARGEST": 1.0 if dtype is None else QUANTIZED_MAX[dtype],
        "IS_INT": dtype == torch.int8,
    }
    for dtype in (None, *QUANTIZED_MAX)
}
MANY_ROWS = 2048
HEAD_ROWS = 32  # heads of tokens that one program of qk_norm_rope takes


@triton.jit
def _quantized(values, scale_ptr, row, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, IS_INT: tl.constexpr):
    """The row divided by its scale, which is stored."""
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), SMALLEST) / LARGEST
    tl.store(scale_ptr + row, scale)
    values = values / scale
    if IS_INT:
        values = tl.where(values >= 0, tl.floor(values + 0.5), tl.ceil(values - 0.5))
    return values


@triton.jit
def _norm_modulate_kernel(
    x_ptr, y_ptr, out_ptr, full_ptr, scale_ptr,
    table_ptr, rows_ptr, gate_table_ptr, gate_rows_ptr,
    table_stride, split, gate_table_stride, gate_split,
    tokens, batch, x_batch_stride, y_batch_stride, out_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, HAS_UPDATE: tl.constexpr, CLAMP: tl.constexpr, KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, IS_INT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    item = row // tokens
    token = row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    at_x = x_ptr + item * x_batch_stride + token * C + columns
    x = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        which = tl.load(gate_rows_ptr + tl.where(token >= gate_split, batch, 0) + item)
        gate = tl.load(gate_table_ptr + which * gate_table_stride + 2 * C + columns, mask=inside, other=0.0)
        y = tl.load(y_ptr + item * y_batch_stride + token * C + columns, mask=inside, other=0.0)
        x += gate.to(tl.float32) * y.to(tl.float32)
        if CLAMP:
            x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(at_x, rounded, mask=inside)
        x = rounded.to(tl.float32)

    mean = tl.sum(x, axis=0) / C
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    which = tl.load(rows_ptr + tl.where(token >= split, batch, 0) + item)
    at_table = table_ptr + which * table_stride + columns
    shift = tl.load(at_table, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(at_table + C, mask=inside, other=0.0).to(tl.float32)
    out = centred * rstd * (1.0 + scale) + shift

    if KEEP:
        tl.store(full_ptr + row * C + columns, out.to(full_ptr.dtype.element_ty), mask=inside)
    if QUANTIZE:
        out = _quantized(tl.where(inside, out, 0.0), scale_ptr, row, SMALLEST, LARGEST, IS_INT)
    tl.store(out_ptr + row * out_stride + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def norm_modulate(
    x: torch.Tensor,
    modulation: Modulation,
    update: Update | None = None,
    *,
    eps: float,
    quantize: torch.dtype | None = None,
    keep: bool = False,
    room: int = 0,
) -> Rows:
    batch, tokens, channels = x.shape
    rows = _empty_rows(batch * tokens, channels, x, quantize, keep, room)
    gates = update.modulation if update is not None else modulation
    y = update.y if update is not None else x
    launch(
        _norm_modulate_kernel,
        batch * tokens,
        (x, y, rows.data, _or(rows.full, rows.data), _or(rows.scale, rows.data),
         modulation.table, modulation.rows, gates.table, gates.rows),
        (modulation.table.stride(0), modulation.split, gates.table.stride(0), gates.split,
         tokens, batch, x.stride(0), y.stride(0), rows.data.stride(0), eps),
        {
            "C": channels, "BLOCK": triton.next_power_of_2(channels), "HAS_UPDATE": update is not None,
            "CLAMP": x.dtype == torch.float16, "KEEP": rows.full is not None, **_QUANTIZATION[quantize],
        },
        warps=8,
    )  # fmt: skip
    return rows


@triton.jit
def _activation_kernel(
    x_ptr, out_ptr, full_ptr, scale_ptr, x_stride, out_stride,
    N: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, IS_INT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if KEEP:
        tl.store(full_ptr + row * N + columns, x.to(full_ptr.dtype.element_ty), mask=inside)
    if QUANTIZE:
        x = _quantized(x, scale_ptr, row, SMALLEST, LARGEST, IS_INT)
    tl.store(out_ptr + row * out_stride + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


def gelu(x: torch.Tensor, *, quantize: torch.dtype | None = None, keep: bool = False, room: int = 0) -> Rows:
    return _activation(x, True, quantize, keep, room)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype | None, *, keep: bool = False, room: int = 0) -> Rows:
    if dtype is None:
        return Rows(x)
    rows = _activation(x, False, dtype, False, room)
    return Rows(rows.data, rows.scale, x, room) if keep else rows


def _activation(x: torch.Tensor, apply_gelu: bool, quantize: torch.dtype | None, keep: bool, room: int) -> Rows:
    count, width = x.shape
    rows = _empty_rows(count, width, x, quantize, keep, room)
    launch(
        _activation_kernel,
        count,
        (x, rows.data, _or(rows.full, rows.data), _or(rows.scale, rows.data)),
        (x.stride(0), rows.data.stride(0)),
        {
            "N": width, "BLOCK": triton.next_power_of_2(width), "GELU": apply_gelu, "KEEP": rows.full is not None,
            **_QUANTIZATION[quantize],
        },
        warps=8,
    )  # fmt: skip
    return rows


@triton.jit
def _normed_rotated(x, weight, cos, sin, eps, ROWS: tl.constexpr, D: tl.constexpr):
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight[None, :]
    first, second = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (ROWS, D))


@triton.jit
def _qk_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, norm_q_ptr, norm_k_ptr, rope_ptr,
    count, tokens, batch_stride, token_stride, out_batch_stride, out_token_stride, eps,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COPY_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < count)[:, None]
    head = row % H
    token = (row // H) % tokens
    item = row // (H * tokens)
    channels = tl.arange(0, D)
    pairs = tl.arange(0, D // 2)
    at = (item * batch_stride + token * token_stride + head * D)[:, None] + channels[None, :]
    at_out = (item * out_batch_stride + token * out_token_stride + head * D)[:, None] + channels[None, :]
    at_rope = (token * (D // 2))[:, None] + pairs[None, :]
    cos = tl.load(rope_ptr + at_rope, mask=inside, other=0.0)
    sin = tl.load(rope_ptr + tokens * (D // 2) + at_rope, mask=inside, other=0.0)

    q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
    q = _normed_rotated(q, tl.load(norm_q_ptr + channels).to(tl.float32), cos, sin, eps, ROWS, D)
    k = _normed_rotated(k, tl.load(norm_k_ptr + channels).to(tl.float32), cos, sin, eps, ROWS, D)
    tl.store(out_ptr + at_out, q.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at_out + H * D, k.to(out_ptr.dtype.element_ty), mask=inside)
    if COPY_V:
        tl.store(out_ptr + at_out + 2 * H * D, tl.load(v_ptr + at, mask=inside), mask=inside)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    rope: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
) -> None:
    batch, tokens, heads, dim = q.shape
    count = batch * tokens * heads
    launch(
        _qk_norm_rope_kernel,
        triton.cdiv(count, HEAD_ROWS),
        (q, k, v, out, norm_q, norm_k, rope),
        (count, tokens, q.stride(0), q.stride(1), out.stride(0), out.stride(1), eps),
        {"H": heads, "D": dim, "ROWS": HEAD_ROWS, "COPY_V": v.data_ptr() != out[:, :, 2].data_ptr()},
        warps=4,
    )


@triton.jit
def _append_low_rank_kernel(
    x_ptr, down_ptr, gain_ptr, count, x_stride, K, R,
    LIMIT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(R, BR)
    m = (tl.program_id(0) // blocks) * BM + tl.arange(0, BM)
    r = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)
    rows = x_ptr + (m % count).to(tl.int64)[:, None] * x_stride
    ranks = down_ptr + (r % R)[None, :] * K
    total = tl.zeros((BM, BR), dtype=tl.float32)
    for start in range(0, K, BK):
        inside = k < K - start
        x = tl.load(rows + start + k[None, :], mask=inside[None, :], other=0.0)
        down = tl.load(ranks + start + k[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(x, down, total)
    total *= tl.load(gain_ptr + r % R)[None, :]
    total = tl.minimum(tl.maximum(total, -LIMIT), LIMIT)
    tl.store(rows + K + r[None, :], total.to(x_ptr.dtype.element_ty), mask=(m < count)[:, None] & (r < R)[None, :])


def append_low_rank(x: torch.Tensor, down: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    if x.dtype not in QUANTIZED_MAX:
        return reference.append_low_rank(x, down, gain)
    (count, width), rank = x.shape, len(down)
    # Many rows: x is read as few times as possible. Few: the card's units get something to do.
    rows, block = (16, 64) if count <= MANY_ROWS else (64, 64) if rank <= 64 else (64, 128)
    launch(
        _append_low_rank_kernel,
        triton.cdiv(count, rows) * triton.cdiv(rank, block),
        (x, down, gain),
        (count, x.stride(0), width, rank),
        {
            "LIMIT": QUANTIZED_MAX[x.dtype], "BM": rows, "BR": block,
            "BK": (128 if block > 64 else 256) // x.element_size(),
        },
        warps=4,
    )  # fmt: skip
    return x.as_strided((count, width + rank), x.stride())


def _empty_rows(
    count: int, width: int, like: torch.Tensor, quantize: torch.dtype | None, keep: bool, room: int
) -> Rows:
    data = torch.empty((count, padded_width(width, room)), dtype=quantize or like.dtype, device=like.device)[:, :width]
    if quantize is None:
        return Rows(data, room=room)
    scale = torch.empty((count, 1), dtype=torch.float32, device=like.device)
    full = torch.empty((count, width), dtype=like.dtype, device=like.device) if keep else None
    return Rows(data, scale, full, room)


def _or(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """Triton wants a pointer also where the kernel does not use it."""
    return placeholder if tensor is None else tensor
