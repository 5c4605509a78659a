"""The int8 product with its scales, bias and low-rank addend applied before the result leaves the registers (Triton).

comfy-kitchen's product of this form quantizes its activations itself, which would repeat what our fused kernels have
done; PyTorch's ``_int_mm`` writes int32, twice the bytes of the result.
"""

import torch
import triton
import triton.language as tl

from .contract import RANK_STEP, Addend
from .launch import launch

# Tiles of output rows and columns that programs of neighbouring numbers share, for the L2 cache.
GROUP = 8


# Rows, columns, depth, warps, stages of a tile by compute capability; integer sums are exact, so the choice changes
# no bit of the result.
TILES = {9: (128, 128, 128, 8, 3), 8: (128, 128, 64, 8, 3), 7: (128, 64, 64, 4, 2)}
# The same for products of few columns, as the first half of a LoRA is. Many rows: they are read as few times as possible.
# Few: the card's units get something to do, and each waits for its memory as rarely as possible.
NARROW = 512
MANY_ROWS = 2048
NARROW_TILES = {9: (64, 128, 128, 4, 4), 8: (64, 128, 128, 4, 3), 7: (64, 64, 64, 4, 2)}
FEW_ROWS_TILES = {9: (16, 64, 256, 4, 5), 8: (16, 64, 256, 4, 4), 7: (16, 64, 128, 4, 2)}


@triton.jit
def _int8_matmul_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, t_ptr, up_ptr, out_ptr,
    M, N, K, out_stride, t_stride, module_width, module_rank,
    HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = program // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    at_m = first + (program % (GROUP * columns)) % height
    at_n = (program % (GROUP * columns)) // height
    m = at_m * BM + tl.arange(0, BM)
    n = at_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        inside = k < K - start
        x = tl.load(x_at + start, mask=inside[None, :], other=0)
        w = tl.load(w_at + start, mask=inside[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
    out = total.to(tl.float32) * tl.load(x_scale_ptr + m % M)[:, None] * tl.load(w_scale_ptr + n % N)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n % N).to(tl.float32)[None, :]
    if HAS_ADDEND:  # of the modules that this tile has columns of, which mostly is one
        r = tl.arange(0, BR)
        t_at = t_ptr + (m % M).to(tl.int64)[:, None] * t_stride + r[None, :]
        last = tl.minimum(at_n * BN + BN, N) - 1
        first_rank, end = (at_n * BN // module_width) * module_rank, (last // module_width + 1) * module_rank
        # more stages would take more registers
        for start in tl.range(first_rank, end, BR, num_stages=2):  # pyright: ignore
            column = n - (start // module_rank) * module_width
            own = (column >= 0) & (column < module_width)
            up_at = up_ptr + (start + r)[:, None] * module_width + column[None, :]
            up = tl.load(up_at, mask=own[None, :], other=0.0)
            out = tl.dot(tl.load(t_at + start), up, out, input_precision="ieee")
    at_out = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def int8_matmul(x, x_scale, weight, weight_scale, bias, dtype, out=None, addend: Addend | None = None, tile=None):
    """See ``quantize.quantized_matmul``; ``tile`` is one of the values of ``TILES``."""
    (count, depth), width = x.shape, weight.shape[0]
    if out is None:
        out = torch.empty((count, width), dtype=dtype, device=x.device)
    t, up = (out, out) if addend is None else (addend.t, addend.up)
    m, n, k, warps, stages = tile or _tile_of(x.device, count, width)
    launch(
        _int8_matmul_kernel,
        triton.cdiv(count, m) * triton.cdiv(width, n),
        (x, x_scale, weight, weight_scale, out if bias is None else bias, t, up, out),
        (count, width, depth, out.stride(0), t.stride(0), up.shape[1], 0 if addend is None else addend.rank_of(width)),
        {
            "HAS_BIAS": bias is not None, "HAS_ADDEND": addend is not None, "GROUP": GROUP,
            "BM": m, "BN": n, "BK": k, "BR": RANK_STEP,
        },
        warps,
        stages,
        _most_registers(x.device) if addend is not None else None,
    )  # fmt: skip
    return out


def _most_registers(device: torch.device) -> int | None:
    """Hopper's units hold two of its tiles at up to 128 registers a thread, which is what the product without an addend
    takes; with one the compiler would take a few more (read from ptxas for Triton 3.8)."""
    return 128 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else None


def _tile_of(device: torch.device, rows: int, columns: int) -> tuple[int, int, int, int, int]:
    tiles = TILES if columns > NARROW else NARROW_TILES if rows > MANY_ROWS else FEW_ROWS_TILES
    card = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 7  # Triton's interpreter
    m, n, k, warps, stages = tiles[min(max(tiles), card)]
    return m, min(n, max(RANK_STEP, triton.next_power_of_2(columns))), k, warps, stages
