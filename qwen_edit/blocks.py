"""ggml's block formats: what their bytes mean, and weights made of them.

A weight of ``[N, K]`` is cut along K into blocks of 32 or 256 values, each with scales of its own. The layouts are
facts read from ggml (``ggml.h`` for the numbers, ``ggml-common.h`` for the structs, ``dequantize_row_*`` in ``ggml-quants.c`` for their order of
operations, which float32 keeps here); the tests compare with the ``gguf`` package's ``quants.py``. What
``dequantize`` says in PyTorch, ``kernels/unpack.py`` does in one pass on a card.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch


@dataclass(frozen=True)
class BlockType:
    """One format: ggml's number of it, how many values a block holds, in how many bytes."""

    name: str
    number: int
    values: int
    nbytes: int

    @property
    def family(self) -> str:
        """As of ``StoredWeight``."""
        return self.name


# By the names that files and people use.
BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ4_XS", 23, 256, 136),
    )
}
# What the 4 bits of the IQ4 formats stand for (kvalues_iq4nl in ggml-common.h).
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
VALUES_AT_ONCE = 2**20  # of the float32 intermediates in PyTorch


def packed_shape(shape: Sequence[int], kind: BlockType) -> tuple[int, int]:
    """How the bytes of a tensor of ``shape`` lie: ``[N, bytes of a row]``, or one row where blocks cross the rows' ends
    (files hold such narrow weights reshaped)."""
    rows = prod(shape[:-1]) if shape[-1] % kind.values == 0 else 1
    return rows, prod(shape) // rows // kind.values * kind.nbytes


def dequantize(
    blocks: torch.Tensor, kind: BlockType, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The values of ``blocks`` in their order, computed in float32 and rounded once to ``dtype``.

    Args:
        blocks: uint8 ``[rows, bytes of a row]``, contiguous.
        out: of ``dtype``, contiguous, any shape with as many values; filled and returned.

    Returns:
        ``out``, or a new tensor ``[rows, values of a row]``.
    """
    if out is None:
        shape = (blocks.shape[0], blocks.shape[1] // kind.nbytes * kind.values)
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    unpack = _kernel(blocks.device, kind) if blocks.is_cuda else None
    (unpack or unpack_reference)(blocks.view(-1, kind.nbytes), kind, out.view(-1, kind.values))
    return out


def unpack_reference(blocks: torch.Tensor, kind: BlockType, out: torch.Tensor) -> None:
    """Blocks ``[n, bytes]`` to values ``[n, values]``, in plain PyTorch."""
    count = VALUES_AT_ONCE // kind.values
    for part, target in zip(blocks.split(count), out.split(count), strict=True):
        target.copy_(_DECODE[kind.name](part))


@lru_cache(maxsize=64)
def _kernel(device: torch.device, kind: BlockType):
    """The Triton kernel, tried against PyTorch with small finite blocks; None where it does not run."""
    blocks = (torch.arange(4 * kind.nbytes, device=device) % 64).to(torch.uint8).view(4, -1)
    expected, found = (torch.empty((4, kind.values), device=device) for _ in range(2))
    unpack_reference(blocks, kind, expected)
    try:
        from .kernels.unpack import unpack

        for _ in range(2):  # a second launch takes another way
            unpack(blocks, kind, found.fill_(torch.nan))
            torch.testing.assert_close(found, expected)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the note on the node says that Triton does not run, and why
        return None
    return unpack


def _half(b: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte ``at`` of each block, ``[n, 1]``."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _signed(b: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return b[:, start:end].contiguous().view(torch.int8).float()


def _fields(b: torch.Tensor, start: int, end: int, run: int, bits: int) -> torch.Tensor:
    """Numbers of ``bits`` bits: of each ``run`` bytes first everyone's lowest bits, then the next higher ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=b.device).view(1, 1, -1, 1)
    return ((b[:, start:end].reshape(len(b), -1, 1, run) >> shifts) & (2**bits - 1)).flatten(1)


def _scaled(d: torch.Tensor, q: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
    """``d q - minimum`` with a scale (and minimum) ``[n, groups]`` for equal parts of each block; q ``[n, values]``."""
    y = d[:, :, None] * q.float().view(*d.shape, -1)
    return (y if minimum is None else y - minimum[:, :, None]).flatten(1)


def _scales_of_8(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima ``[n, 8]`` of Q4_K and Q5_K: 6 bits each in bytes 4 to 16, the upper two of the last four each
    in the top bits of the bytes of the first four."""
    first, minima, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([first & 63, (both & 15) | (first >> 6 << 4)], dim=1)
    minimum = torch.cat([minima & 63, (both >> 4) | (minima >> 6 << 4)], dim=1)
    return _half(b, 0) * scale, _half(b, 2) * minimum


def _q4_0(b):
    return _half(b, 0) * (_fields(b, 2, 18, 16, 4).float() - 8)


def _q4_1(b):
    return _half(b, 0) * _fields(b, 4, 20, 16, 4) + _half(b, 2)


def _q5_0(b):
    return _half(b, 0) * ((_fields(b, 6, 22, 16, 4) | _fields(b, 2, 6, 1, 1) << 4).float() - 16)


def _q5_1(b):
    return _half(b, 0) * (_fields(b, 8, 24, 16, 4) | _fields(b, 4, 8, 1, 1) << 4) + _half(b, 2)


def _q8_0(b):
    return _half(b, 0) * _signed(b, 2, 34)


def _q2_k(b):
    scales = b[:, :16]
    return _scaled(_half(b, 80) * (scales & 15), _fields(b, 16, 80, 32, 2), _half(b, 82) * (scales >> 4))


def _q3_k(b):
    scales = (_fields(b, 96, 104, 8, 4) | _fields(b, 104, 108, 4, 2) << 4).float() - 32
    q = _fields(b, 32, 96, 32, 2).float() - 4 * (1 - _fields(b, 0, 32, 32, 1).float())
    return _scaled(_half(b, 108) * scales, q)


def _q4_k(b):
    scale, minimum = _scales_of_8(b)
    return _scaled(scale, _fields(b, 16, 144, 32, 4), minimum)


def _q5_k(b):
    scale, minimum = _scales_of_8(b)
    return _scaled(scale, _fields(b, 48, 176, 32, 4) | _fields(b, 16, 48, 32, 1) << 4, minimum)


def _q6_k(b):
    q = (_fields(b, 0, 128, 64, 4) | _fields(b, 128, 192, 32, 2) << 4).float() - 32
    return _scaled(_half(b, 208) * _signed(b, 192, 208), q)


def _nonlinear(q: torch.Tensor) -> torch.Tensor:
    return torch.tensor(NONLINEAR, dtype=torch.float32, device=q.device)[q.long()]


def _iq4_nl(b):
    return _half(b, 0) * _nonlinear(_fields(b, 2, 18, 16, 4))


def _iq4_xs(b):
    scales = (_fields(b, 4, 8, 1, 4) | _fields(b, 2, 4, 1, 2) << 4).float() - 32
    return _scaled(_half(b, 0) * scales, _nonlinear(_fields(b, 8, 136, 16, 4)))


_DECODE = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
