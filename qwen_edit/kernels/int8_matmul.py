"""The int8 product with its scales and bias applied before the result leaves the registers (Triton).

comfy-kitchen's product of this form quantizes its activations itself, which would repeat what our fused kernels have
done; PyTorch's ``_int_mm`` writes int32, twice the bytes of the result.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

# Tiles of output rows and columns that programs of neighbouring numbers share, for the L2 cache.
GROUP = 8


# Rows, columns, depth, warps, stages of a tile by compute capability; integer sums are exact, so the choice changes
# no bit of the result.
TILES = {9: (128, 128, 128, 8, 3), 8: (128, 128, 64, 8, 3), 7: (128, 64, 64, 4, 2)}


@triton.jit
def _int8_matmul_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, K, out_stride,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
    at_out = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def int8_matmul(x, x_scale, weight, weight_scale, bias, dtype, out=None, tile=None):
    """See ``quantize.quantized_matmul``; ``tile`` is one of the values of ``TILES``."""
    (count, depth), width = x.shape, weight.shape[0]
    if out is None:
        out = torch.empty((count, width), dtype=dtype, device=x.device)
    m, n, k, warps, stages = tile or _tile_of(x.device)
    launch(
        _int8_matmul_kernel,
        triton.cdiv(count, m) * triton.cdiv(width, n),
        (x, x_scale, weight, weight_scale, out if bias is None else bias, out),
        (count, width, depth, out.stride(0)),
        {"HAS_BIAS": bias is not None, "GROUP": GROUP, "BM": m, "BN": n, "BK": k},
        warps,
        stages,
    )
    return out


def _tile_of(device: torch.device) -> tuple[int, int, int, int, int]:
    if device.type != "cuda":  # Triton's interpreter
        return TILES[7]
    return TILES[min(max(TILES), torch.cuda.get_device_capability(device)[0])]
