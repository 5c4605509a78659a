"""The fused operations in plain PyTorch: what runs without Triton, and what the fused kernels are tested against.

Each function has a twin of the same name and contract in ``fused.py``.
"""

import torch
import torch.nn.functional as F

from .contract import Addend, Modulation, Rows, Update, padded_width

# Largest finite values; a row's scale maps its largest number onto them.
QUANTIZED_MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = 1e-12


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
    """``x += gate * y`` in place where an update is pending, then ``LayerNorm(x) * (1 + scale) + shift``.

    Args:
        x: the residual stream ``[B, L, C]``, each item's tokens contiguous.
        quantize: dtype of the result's rows; None: as ``x``.
        keep: with ``quantize``, also return the unquantized rows.
        room: for how many more channels there is to be room behind each row.

    Returns:
        ``[B * L, C]`` rows.
    """
    channels = x.shape[-1]
    if update is not None:
        for part, y, vectors in _parts(x, update.modulation, update.y):
            part.addcmul_(vectors[..., 2 * channels :], y)
        if x.dtype == torch.float16:  # as diffusers does: this family overflows in fp16
            x.clamp_(-65504, 65504)
    normalized = F.layer_norm(x, (channels,), eps=eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, target, vectors in _parts(normalized, modulation, out):
        shift, scale = vectors[..., :channels], vectors[..., channels : 2 * channels]
        torch.addcmul(shift, part, 1 + scale, out=target)
    return _rows(out.flatten(0, 1), quantize, keep, room)


def _parts(x: torch.Tensor, modulation: Modulation, other: torch.Tensor):
    """(x, other, vectors ``[B, 1, 3C]``) of the tokens before and after the split."""
    split = min(modulation.split, x.shape[1])
    parts = [(slice(0, split), modulation.rows[0]), (slice(split, x.shape[1]), modulation.rows[1])]
    return [(x[:, s], other[:, s], modulation.table[rows][:, None]) for s, rows in parts if s.start < s.stop]


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
    """RMS-normalize queries and keys over each head, rotate neighbouring channel pairs, and put all three into ``out``.

    Args:
        q, k, v: ``[B, L, H, D]`` of equal strides, heads contiguous; they may be the parts of ``out`` itself.
        norm_q, norm_k: ``[D]``.
        rope: cosines and sines ``[2, L, D / 2]``, float32.
        out: ``[B, L, 3, H, D]``, a part of the joint buffer.
    """
    cos, sin = rope[0].unsqueeze(1), rope[1].unsqueeze(1)
    for index, (x, weight) in enumerate(((q, norm_q), (k, norm_k))):
        first, second = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
        out[:, :, index] = rotated.flatten(-2).to(out.dtype)
    if v.data_ptr() != out[:, :, 2].data_ptr():
        out[:, :, 2] = v


def gelu(x: torch.Tensor, *, quantize: torch.dtype | None = None, keep: bool = False, room: int = 0) -> Rows:
    """GELU (tanh form) of ``[M, N]``, as rows for the next linear."""
    return _rows(F.gelu(x, approximate="tanh"), quantize, keep, room)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype | None, *, keep: bool = False, room: int = 0) -> Rows:
    """``x`` ``[M, K]`` as rows: each divided by its own scale, the largest magnitude mapped to the dtype's largest.
    Without ``dtype`` they are x itself, and there is no room behind them."""
    return Rows(x) if dtype is None else _rows(x, dtype, keep, room)


def _rows(x: torch.Tensor, dtype: torch.dtype | None, keep: bool, room: int) -> Rows:
    if dtype is None:
        return Rows(_with_room(x, room), room=room)
    largest = x.abs().amax(dim=1, keepdim=True).float()
    scale = largest.clamp(min=SMALLEST_SCALE) / QUANTIZED_MAX[dtype]
    scaled = x.float() / scale
    data = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return Rows(_with_room(data, room), scale, x if keep else None, room)


def _with_room(x: torch.Tensor, room: int) -> torch.Tensor:
    count, width = x.shape
    if room == 0:
        return x
    return x.new_empty((count, padded_width(width, room)))[:, :width].copy_(x)


def append_low_rank(x: torch.Tensor, down: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """``gain * (x @ down.T)`` behind each row of x, in the same memory.

    Args:
        x: ``[M, K]``, rows with room for R more; fp8 or a float.
        down: ``[R, K]`` of the same dtype; ``gain`` ``[R]``, float32; None: ones, for floats only.

    Returns:
        ``[M, K + R]``; what is too large for fp8 is its largest number.
    """
    count, width = x.shape
    extended = x.as_strided((count, width + len(down)), x.stride())
    columns, limit = extended[:, width:], QUANTIZED_MAX.get(x.dtype)
    if limit is not None:
        assert gain is not None
        columns.copy_(((x.float() @ down.float().T) * gain).clamp(-limit, limit))
        return extended
    torch.mm(x, down.T, out=columns)
    if gain is not None:
        columns.mul_(gain)
    return extended


def add_low_rank(y: torch.Tensor, addend: Addend) -> None:
    """Add the term to a product's result ``[M, N]`` in place, as the int8 product (``int8_matmul.py``) does on its own."""
    rank, width = addend.rank_of(y.shape[1]), addend.up.shape[1]
    for part, t, up in zip(y.split(width, dim=1), addend.t.split(rank, dim=1), addend.up.split(rank), strict=True):
        part.addmm_(t.to(y.dtype), up.to(y.dtype))


def add_to_quantized(
    data: torch.Tensor,
    scale: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor,
) -> None:
    """``data * scale + b a``, quantized again, into ``out`` and ``out_scale``.

    A difference is mostly smaller than the steps of 8-bit numbers, so rounding to the nearest would lose it: numbers are
    rounded up or down by a fixed noise, so that the weight is right on average. A row keeps its scale unless a number
    grows out of its range; what nothing is added to then keeps its bits.

    Args:
        data: ``[N, K]``, fp8 or int8, rows contiguous; ``scale`` ``[N, 1]``, float32. Neither is changed, unless ``out``
            is ``data`` itself.
        a: ``[R, K]`` and ``b`` ``[N, R]`` of one float dtype, rows contiguous.
    """
    store_quantized(data.float() + b.float() @ a.float() / scale, scale, out, out_scale)


def store_quantized(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, out_scale: torch.Tensor) -> None:
    """``values`` ``[N, K]`` (float32, changed) in units of ``scale``, as ``add_to_quantized`` stores them."""
    limit = QUANTIZED_MAX[out.dtype]
    growth = (values.abs().amax(dim=1, keepdim=True) / limit).clamp(min=1.0)
    values /= growth
    noise = _noise(values)
    if out.dtype == torch.int8:
        values = (values + (noise >> 8) * 2.0**-24).floor()
    else:  # float8_e4m3fn has 20 bits less than float32, and steps of 2^-9 below 2^-6
        size = values.abs()
        bits = (size.view(torch.int32) + (noise >> 12).int()) & -(1 << 20)
        tiny = (size * 512 + (noise >> 8) * 2.0**-24).floor() / 512
        values = torch.where(size < 2**-6, tiny, bits.view(torch.float32)).copysign(values)
    out.copy_(values.clamp(-limit, limit))
    out_scale.copy_(scale * growth)


def _noise(like: torch.Tensor) -> torch.Tensor:
    """For each place of a matrix 32 bits that look random: the finalizer of MurmurHash3 over its number."""
    x = torch.arange(like.numel(), device=like.device).view(like.shape)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
