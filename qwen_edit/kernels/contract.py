"""What the fused operations exchange. Plain tensors; nothing here knows a model library."""

from dataclasses import dataclass

import torch

LINE = 128  # elements: rows that begin on a cache line of their own multiply faster

RANK_STEP = 32  # products take steps of 16; of fewer shapes, fewer are new to them


def padded_width(width: int, room: int) -> int:
    """From one row to the next, if each of ``width`` elements has at least ``room`` more behind it."""
    return width if room == 0 else -(-(width + room) // LINE) * LINE


@dataclass(frozen=True)
class Rows:
    """Activations of a linear, one row a token.

    ``data`` is ``[M, K]`` in the model's dtype, or quantized (float8_e4m3fn, int8) with ``scale`` ``[M, 1]`` in
    float32. ``full`` is the unquantized twin where an adapter needs it. Behind each row of ``data`` there is ``room`` for
    more channels, which ``append_low_rank`` fills.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    full: torch.Tensor | None = None
    room: int = 0

    @property
    def unquantized(self) -> torch.Tensor:
        if self.full is not None:
            return self.full
        assert self.scale is None, "the prologue was not asked to keep the unquantized rows"
        return self.data

    def split(self, count: int | None) -> "list[Rows]":
        """Parts of at most ``count`` rows (None: one)."""
        if count is None:
            return [self]
        data = self.data.split(count)
        missing = [None] * len(data)
        scales = missing if self.scale is None else self.scale.split(count)
        fulls = missing if self.full is None else self.full.split(count)
        return [Rows(*parts, room=self.room) for parts in zip(data, scales, fulls, strict=True)]


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of half a block for every token.

    ``table`` is ``[T, 3C]`` (shift, scale, gate; the gate may be missing: ``[T, 2C]``), a row a timestep, rows
    strided. ``rows`` ``[2, B]`` (int64) names the rows of each item: ``rows[0]`` for tokens before ``split``, ``rows[1]``
    for those from it on.
    """

    table: torch.Tensor
    rows: torch.Tensor
    split: int


@dataclass(frozen=True)
class Update:
    """A gated change of the residual stream that is still to be added: ``x += gate * y``. ``y`` ``[B, L, C]``."""

    y: torch.Tensor
    modulation: Modulation


@dataclass(frozen=True)
class Addend:
    """A low-rank term of a product's result, of whose columns several modules of one width have their own, side by side.

    Each module has R ranks: module i adds ``t[:, i R : (i + 1) R] @ up[i R : (i + 1) R]`` to its columns. ``t`` is
    ``[M, modules * R]`` and ``up`` ``[modules * R, width]``, both contiguous and of the result's dtype; R is a multiple of
    ``RANK_STEP``.
    """

    t: torch.Tensor
    up: torch.Tensor

    def rank_of(self, columns: int) -> int:
        """R, if the result has this many columns."""
        ranks, width = self.up.shape
        return ranks * width // columns
