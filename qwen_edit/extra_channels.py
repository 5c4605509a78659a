"""LoRAs as a part of the products: extra input channels, or in int8 an addend of the result.

``x W^T + s (x A^T) B^T`` is one product ``[x, t] [W, B]^T`` with ``t = s x A^T``: the rank is only a few channels more for
the card's fastest kernels, where adding the term afterwards would read and write the whole result once more. For this the
kernels leave room behind each row of x (``Rows.room``), one kernel writes t into it, and weights get spare columns in
which the B of the active LoRAs lie. W itself is never written, and without LoRAs it is multiplied as if the columns
were not there.

fp8: t and B have to share the scales of their rows, of x and of W. t is scaled so that it stays within fp8's range however
closely a row of x follows one of A; what B then has too much for the range is spread over several channels. A product of two fp8 numbers is off by 4 %, and this is one of the LoRA's term only, where quantizing
the sum of weight and LoRA again is off by that much of the whole weight.

int8: a row of W has one scale for steps too coarse to share, so t and B stay floats, and our product adds t B^T to the sums
that it still holds in registers. t is an int8 product itself, of the rows that W is multiplied with and A in int8; each of
the two roundings moves the LoRA's term by about a per cent of itself. This needs no columns behind the weight, so weights
that lie in buffers (streamed blocks) or are made for each product (4 bits, unpacked to int8) have it, too.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .kernels import RANK_STEP, padded_width
from .linear import Adapters, Channels, LowRank, Operand, put_weights
from .quantize import FP8, INT8, quantize_rows

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Of channels behind the joint rows of several modules. An H100 takes 751 µs for 3072 + 512 channels of bf16 (M 8192, N 9216),
# 810 for 3072 + 480.
JOINT_STEP = 64
LARGEST = 448.0  # of fp8
# Of t: 448, fp8's largest, is what a row of x whose numbers reach 448 and are a third to a quarter of it in the mean square
# gives at a cosine of 0.6 to 0.8 with the row of A.
REACH = 4.0
MOST_CHANNELS = 4  # for each rank; an adapter that needs more is added to the result


@dataclass(frozen=True)
class _Prepared:
    """One adapter as the product takes it, in c channels: ``a`` ``[c, K]``, ``b`` ``[N, c]`` (for int8 ``[c, N]``), ``gain``
    ``[c]``. In fp8 made for one weight, known by its ``scale``, and for strengths up to ``level``."""

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor
    scale: torch.Tensor | None = None  # held, so that no other can come to lie at its address
    level: int = 0


@dataclass
class _Laid:
    """What lies in the spare columns of one operand's weight, or is added to its product."""

    at: int  # the weight's address
    counts: list[list[int]]  # channels of each module's adapters
    sources: list[weakref.ref[_Prepared]]  # gone when its LoRA has left the card
    scales: list[float]
    channels: Channels
    asked: list[weakref.ref[LowRank]] = field(default_factory=list)  # the adapters that it was last found right for
    scaled_by: int = 0  # the address of the weight's scale then

    def serves(self, op: Operand, adapters: Sequence[LowRank]) -> bool:
        """Whether nothing has changed since, which is so in nearly every step."""
        assert op.weight is not None
        if not self.fits(op) or len(adapters) != len(self.asked):
            return False
        if self.channels.up is None and self.scaled_by != _address(op.scale):
            return False
        dtype = op.weight.dtype
        return all(
            asked() is adapter and source() is adapter.derived.get(dtype)
            for asked, adapter, source in zip(self.asked, adapters, self.sources, strict=True)
        )

    def fits(self, op: Operand) -> bool:
        """Whether the operand's weight is the one behind which it lies, or one that needs nothing behind it."""
        assert op.weight is not None
        if self.channels.up is not None or _is_added(op):
            return self.channels.up is not None and _is_added(op)
        return self.at == op.weight.data_ptr() and _room(op.weight) >= len(self.channels.down)


class ExtraChannels:
    """The one owner of the spare columns of a transformer's weights, and of what is added to its products. They are laid
    out when a product needs them, while the card is still busy with the one before, so switching LoRAs costs no waiting."""

    def __init__(self) -> None:
        self._laid: weakref.WeakKeyDictionary[torch.nn.Module, _Laid] = weakref.WeakKeyDictionary()

    def extended(self, op: Operand, adapters: Adapters, in_columns: bool = True) -> Operand:
        """``op`` with the adapters of its modules as channels; as it is without adapters, or where its weight's form does
        not allow it (the adapters are then added to the result).

        Args:
            in_columns: whether spare columns may lie behind the weight, and be found there by the next product.
        """
        given = [adapters.get(module, ()) for module in op.modules]
        mine = [[a for a in each if isinstance(a, LowRank)] for each in given]
        some_do_not = sum(map(len, mine)) < sum(map(len, given))
        if not any(mine) or some_do_not or op.weight is None or not _suits(op, in_columns):
            return op
        adapters_in_order = [a for each in mine for a in each]
        laid = self._laid.get(op.modules[0])
        if laid is not None and laid.serves(op, adapters_in_order):
            return replace(op, channels=laid.channels)
        prepared = _prepared(op, mine)
        if prepared is None:
            return op
        parts = [p for each in prepared for p in each]
        scales = [a.scale for a in adapters_in_order]
        groups = prepared if _is_added(op) else [parts]
        if laid is not None and not laid.fits(op):
            laid = None
        if laid is None or not _same(laid.sources, parts):
            self._laid.pop(op.modules[0], None)  # until the end nothing is certain
            step = JOINT_STEP if len(op.widths) > 1 and op.weight.dtype in FLOATS else RANK_STEP
            total = -(-max(sum(len(p.gain) for p in group) for group in groups) // step) * step
            down = _side_by_side([[p.a for p in group] for group in groups], total)
            gain = _gains(op, groups, scales, total)
            if _is_added(op):
                channels = Channels(down, gain, _side_by_side([[p.b for p in group] for group in groups], total))
            else:
                op = _write(op, prepared, total, laid)
                channels = Channels(down, gain)
            assert op.weight is not None
            counts = [[len(p.gain) for p in each] for each in prepared]
            laid = _Laid(op.weight.data_ptr(), counts, [weakref.ref(p) for p in parts], scales, channels)
            self._laid[op.modules[0]] = laid
        elif laid.scales != scales:
            total = len(laid.channels.down) // len(groups)
            laid.channels = replace(laid.channels, gain=_gains(op, groups, scales, total))
            laid.scales = scales
        laid.asked, laid.scaled_by = [weakref.ref(a) for a in adapters_in_order], _address(op.scale)
        return replace(op, channels=laid.channels)

    def clear(self) -> None:
        """Forget what was laid out; the weights have left, or were dropped."""
        self._laid.clear()


def _same(sources: Sequence[weakref.ref[_Prepared]], parts: Sequence[_Prepared]) -> bool:
    return len(sources) == len(parts) and all(s() is p for s, p in zip(sources, parts, strict=True))


def _address(scale: torch.Tensor | None) -> int:
    return 0 if scale is None else scale.data_ptr()


def _suits(op: Operand, in_columns: bool) -> bool:
    assert op.weight is not None
    if _is_added(op):
        return len(set(op.widths)) == 1
    dtype = op.weight.dtype
    return in_columns and ((dtype in FLOATS and op.scale is None) or (dtype == FP8 and op.scale is not None))


def _is_added(op: Operand) -> bool:
    """Whether this form's product adds the adapters to its result, and has no channels for them."""
    return op.prologue == INT8


def _room(weight: torch.Tensor) -> int:
    return weight.stride(0) - weight.shape[1]


def _write(op: Operand, prepared: Sequence[Sequence[_Prepared]], total: int, before: _Laid | None) -> Operand:
    """Write the adapters into ``total`` spare columns; ``before`` is what lies there now, if that is known."""
    counts = [[len(p.gain) for p in each] for each in prepared]
    op = _with_room(op, total)
    weight = op.weight
    assert weight is not None
    columns = weight.as_strided((len(weight), total), weight.stride(), weight.storage_offset() + weight.shape[1])
    if before is None or before.counts != counts or before.at != weight.data_ptr():
        columns.zero_()
    channel = row = 0
    for width, each in zip(op.widths, prepared, strict=True):
        for p in each:
            columns[row : row + width, channel : channel + len(p.gain)] = p.b
            channel += len(p.gain)
        row += width
    return op


def _with_room(op: Operand, channels: int) -> Operand:
    """``op`` with at least this many spare columns behind its weight, of which its modules' weights then are parts."""
    assert op.weight is not None
    if _room(op.weight) >= channels:
        return op
    rows, width = op.weight.shape
    weight = op.weight.new_zeros((rows, padded_width(width, channels)))[:, :width]
    weight.copy_(op.weight)
    put_weights(op.modules, weight.split(op.widths))
    return replace(op, weight=weight)


def _gains(
    op: Operand, groups: Sequence[Sequence[_Prepared]], scales: Sequence[float], total: int
) -> torch.Tensor | None:
    if op.scale is None and all(scale == 1 for scale in scales):
        return None
    scale = iter(scales)
    scaled = [[p.gain if (s := next(scale)) == 1 else p.gain * s for p in group] for group in groups]
    return _side_by_side(scaled, total)


def _side_by_side(groups: Sequence[Sequence[torch.Tensor]], total: int) -> torch.Tensor:
    """``[groups * total, ...]``, zeros behind each group's parts; each operation here counts a thousand times when LoRAs are
    switched."""
    like = next(part for group in groups for part in group)
    missing = [total - sum(map(len, group)) for group in groups]
    zeros = like.new_zeros((max(missing), *like.shape[1:])) if any(missing) else like
    parts = []
    for group, count in zip(groups, missing, strict=True):
        parts += [*group, zeros[:count]] if count else group
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _prepared(op: Operand, mine: Sequence[Sequence[LowRank]]) -> list[list[_Prepared]] | None:
    """The adapters of each module as channels; None if one of them would take too many."""
    assert op.weight is not None
    dtype = op.weight.dtype
    scales = op.scale.split(op.widths) if op.scale is not None and dtype == FP8 else [None] * len(op.modules)
    result = []
    for each, scale in zip(mine, scales, strict=True):
        result.append([_prepared_one(adapter, dtype, scale) for adapter in each])
        if any(len(p.gain) > MOST_CHANNELS * len(a.a) for p, a in zip(result[-1], each, strict=True)):
            return None
    return result


def _prepared_one(adapter: LowRank, dtype: torch.dtype, scale: torch.Tensor | None) -> _Prepared:
    """Kept with the adapter, because it takes a dozen operations.

    Args:
        scale: of the rows of the weight in fp8, ``[N, 1]``.
    """
    found: _Prepared | None = adapter.derived.get(dtype)
    if scale is None:
        if found is None:
            found = _in_int8(adapter) if dtype == INT8 else _in_floats(adapter, dtype)
    else:
        level = max(1, math.ceil(abs(adapter.scale)))
        made_for = None if found is None or found.scale is None else found.scale.data_ptr()
        if found is None or found.level != level or made_for != scale.data_ptr():
            found = _in_fp8(adapter, scale, level)
    adapter.derived[dtype] = found
    return found


def _in_floats(adapter: LowRank, dtype: torch.dtype) -> _Prepared:
    ones = torch.ones(len(adapter.a), device=adapter.a.device)
    return _Prepared(adapter.a.to(dtype), adapter.b.to(dtype), ones)


def _in_int8(adapter: LowRank) -> _Prepared:
    rows = quantize_rows(adapter.a, INT8)
    assert rows.scale is not None
    return _Prepared(rows.data, adapter.b.t().contiguous(), rows.scale.flatten())


def _in_fp8(adapter: LowRank, scale: torch.Tensor, level: int) -> _Prepared:
    rank, width = adapter.a.shape
    rows = quantize_rows(adapter.a, FP8)
    assert rows.scale is not None
    length = rows.data.float().norm(dim=1).clamp(min=1.0)
    gain = REACH / (width**0.5 * length)
    b = adapter.b.float() * (rows.scale.flatten() * level / gain) / scale
    share = (b.abs().amax(dim=0) / LARGEST).ceil().clamp(1, MOST_CHANNELS * rank + 1)
    if share.sum() > MOST_CHANNELS * rank:  # only its length is asked for
        return _Prepared(rows.data, rows.data, gain.new_zeros(MOST_CHANNELS * rank + 1), scale, level)
    of = torch.arange(rank, device=b.device).repeat_interleave(share.long())
    b = (b / share)[:, of].clamp(-LARGEST, LARGEST).to(FP8)
    return _Prepared(rows.data.view(torch.uint8)[of].view(FP8), b, (gain / level)[of], scale, level)
