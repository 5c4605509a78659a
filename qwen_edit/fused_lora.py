"""LoRAs in the weights: ``W + sum of scale * B A`` in W's place, for runs that are long enough, and W back bit by bit.

Only what is multiplied in every step is changed: the linears of the blocks and those before and after them. The
modulation is computed once for a schedule and takes its LoRAs there. Weights are floats, or 8-bit numbers with a scale for
each row; what has another form keeps its adapters beside it.

W is kept in one of two ways, which give the same bits:

- Beside it on the card: the sum gets memory of its own, and W stays where it is, so that going back is taking it up again.
- In RAM: W is copied there once (as long as it stays the same), and the sum is written over it. Going back is a copy.

8-bit weights are rounded once more (see ``kernels.reference.add_to_quantized``), as by any patch of the weights.
"""

import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .extra_channels import FLOATS
from .kernels import REFERENCE
from .kernels.reference import QUANTIZED_MAX, store_quantized
from .linear import RESIDENT, Adapter, Adapters, HighRank, LowRank, Operand, operand, packed, put_weights
from .quantize import QuantizedTensor, replace_parts

# Steps * rank * output tokens of a run from which fusing takes less time than it saves, for weights in 16 and 32 bits that
# stay on the card: the row "pays from" of benchmarks/lora.py (one reference of the output's size), 550,656 in lora_h100.json,
# from 69 ms for fusing and going back and 16.5 ms a step for rank 32.
PAYS_FROM = 650_000


def pays(steps: int, rank: int, tokens: int) -> bool:
    """Whether a run is long enough.

    Args:
        rank: of all LoRAs together.
        tokens: of the output.
    """
    return steps * rank * tokens >= PAYS_FROM


class HostMemory(Protocol):
    """Where weights are kept in RAM, page-locked if it can be."""

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        """Memory of this shape and dtype, which goes with its last view."""
        ...


@dataclass(frozen=True)
class _Changed:
    """An operand as it was. ``weight``: its memory; ``kept``: the same in RAM, where the sum is written over it."""

    op: Operand
    weight: torch.Tensor
    kept: torch.Tensor | None


class FusedLoras:
    """The one owner of what LoRAs have added to a transformer's weights.

    Attributes:
        key: what is in the weights now, as ``fuse`` was told; None: nothing.
        modules: the linears that it is in.
    """

    def __init__(self, model) -> None:
        self._reference = weakref.ref(model)
        self._changed: list[_Changed] = []
        self._kept: dict[tuple, torch.Tensor] = {}
        self.key: Hashable = None
        self.modules: frozenset[torch.nn.Module] = frozenset()

    @property
    def _model(self) -> Any:
        return self._reference()

    @property
    def nbytes(self) -> int:
        """What is on the card besides the weights."""
        return sum(_nbytes(changed.weight) for changed in self._changed if changed.kept is None)

    @property
    def in_ram(self) -> bool:
        """Whether the weights are kept in RAM, because the card has no room for them twice."""
        return any(changed.kept is not None for changed in self._changed)

    @torch.inference_mode()  # weights that were made in it can be written to only in it, and ComfyUI unloads outside
    def fuse(self, key: Hashable, adapters: Adapters, host: HostMemory | None = None) -> None:
        """Bring the weights to their sum with these adapters; nothing is done if ``key`` is in them already.

        Args:
            host: where weights are kept in RAM; None: they stay on the card.

        Raises:
            torch.OutOfMemoryError: the weights are then as they were.
        """
        if key == self.key:
            return
        self.restore()
        try:
            for op in _operands(self._model, adapters):
                self._fuse(op, [adapters.get(module, ()) for module in op.modules], host)
        except BaseException:
            self.drop()
            raise
        self.key = key
        self.modules = frozenset(module for changed in self._changed for module in changed.op.modules)
        self._forget_channels()

    def _fuse(self, op: Operand, adapters: Sequence[Sequence[Adapter]], host: HostMemory | None) -> None:
        assert op.weight is not None
        weight, kept = op.weight.detach(), None  # a parameter itself would follow what is put into it
        if host is not None:
            kept = self._kept.get(op.modules)
            if kept is None:
                kept = host.like(weight).copy_(weight, non_blocking=True)
                self._kept[op.modules] = kept
        target = weight if host is not None else _alike(weight)
        scale = None if op.scale is None else torch.empty_like(op.scale)
        self._changed.append(_Changed(op, weight, kept))  # from here on the weight is no longer sure to be W
        sources = _parts(weight, op)
        results = sources if target is weight else _parts(target, op)
        if op.scale is None or scale is None:
            for source, each, out in zip(sources, adapters, results, strict=True):
                _add_to_float(source, each, out)
            put_weights(op.modules, results)
            return
        kernels = self._model.kernels or REFERENCE
        scales = zip(_parts(op.scale, op), _parts(scale, op), strict=True)
        for source, each, out, (before, after) in zip(sources, adapters, results, scales, strict=True):
            _add_to_quantized(source, before, each, out, after, kernels)
        _put(op, target, scale)

    @torch.inference_mode()
    def restore(self) -> None:
        """Put the weights back as they were; those in RAM stay there, for the next time."""
        if not self._changed:
            return
        for changed in self._changed:
            if changed.kept is not None:
                changed.weight.copy_(changed.kept, non_blocking=True)
            _put(changed.op, changed.weight, changed.op.scale)
        self._changed.clear()
        self.key, self.modules = None, frozenset()
        self._forget_channels()

    def drop(self) -> None:
        """``restore``, and let go of the copies: the weights are about to leave, or to become others."""
        self.restore()
        if not self._kept:
            return
        if self._model.img_in.weight.is_cuda:
            torch.cuda.synchronize(self._model.img_in.weight.device)  # copies out of this memory may be under way
        self._kept.clear()

    def _forget_channels(self) -> None:
        if self._model.channels is not None:  # they are known by the weights' addresses, which may come again
            self._model.channels.clear()


def _operands(model, adapters: Adapters) -> Iterator[Operand]:
    """The operands of the forward that adapters belong to and whose form takes them."""
    groups: list[tuple[Any, ...]] = [(model.img_in,), (model.txt_in,), (model.proj_out,)]
    for block in model.transformer_blocks:
        attn = block.attn
        groups += [(attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        groups += [(attn.to_out[0],), (attn.to_add_out,)]
        groups += [(part,) for mlp in (block.img_mlp, block.txt_mlp) for part in (mlp.net[0].proj, mlp.net[2])]
    for modules in groups:
        if not any(module in adapters for module in modules):
            continue
        each = [operand(RESIDENT, module) for module in modules]
        joined = packed(each) if len(each) > 1 else each[0]
        for op in each if joined is None else [joined]:
            if any(module in adapters for module in op.modules) and _takes(op):
                yield op


def _takes(op: Operand) -> bool:
    if op.weight is None or op.weight.stride(-1) != 1:
        return False
    if op.scale is None:
        return op.weight.dtype in FLOATS
    one_scale_a_row = all(module.weight._params.scale.ndim == 2 for module in op.modules)  # pyright: ignore
    return op.weight.dtype in QUANTIZED_MAX and one_scale_a_row


def _nbytes(weight: torch.Tensor) -> int:
    return len(weight) * weight.stride(0) * weight.element_size()


# A fuse is 720 of these, which the processor has to ask for faster than the card adds.


def _parts(tensor: torch.Tensor, op: Operand) -> Sequence[torch.Tensor]:
    """The rows of each module."""
    return (tensor,) if len(op.widths) == 1 else tensor.split(op.widths)


def _alike(weight: torch.Tensor) -> torch.Tensor:
    """Memory of the same shape and row stride: what follows the columns may be used, too."""
    rows, columns = weight.shape
    stride = weight.stride(0)
    return weight.new_empty((rows, stride)) if stride == columns else weight.new_empty((rows, stride))[:, :columns]


def _put(op: Operand, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is None:
        put_weights(op.modules, _parts(weight, op))
        return
    for module, data, its_scale in zip(op.modules, _parts(weight, op), _parts(scale, op), strict=True):
        assert isinstance(module.weight, QuantizedTensor)
        replace_parts(module.weight, data, its_scale)


def _factors(adapters: Sequence[Adapter]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All low-rank adapters as one: ``a`` ``[R, K]``, ``b`` ``[N, R]`` with their scales; None: there are none."""
    terms = [adapter for adapter in adapters if not isinstance(adapter, HighRank)]
    if not terms:
        return None
    dtype = terms[0].a.dtype
    if len(terms) == 1 and terms[0].scale == 1:
        return terms[0].a, terms[0].b
    a = torch.cat([term.a.to(dtype) for term in terms])
    return a, torch.cat([(term.b * term.scale).to(dtype) for term in terms], dim=1)


def _high_rank(adapters: Sequence[Adapter]) -> list[HighRank]:
    return [adapter for adapter in adapters if isinstance(adapter, HighRank)]


def _add_to_float(weight: torch.Tensor, adapters: Sequence[Adapter], out: torch.Tensor) -> None:
    if len(adapters) == 1 and isinstance(
        adapters[0], LowRank
    ):  # nothing to join: at 720 linears, each operation counts
        (term,) = adapters
        torch.addmm(weight, term.b.to(weight.dtype), term.a.to(weight.dtype), alpha=term.scale, out=out)
        return
    factors, whole = _factors(adapters), _high_rank(adapters)
    if whole:
        total = weight.to(torch.float32, copy=True)
        for adapter in whole:
            total += adapter.difference()
        if factors is not None:
            total.addmm_(factors[1].float(), factors[0].float())
        out.copy_(total)
    elif factors is not None:
        a, b = (factor.to(weight.dtype) for factor in factors)
        torch.addmm(weight, b, a, out=out)
    elif out is not weight:
        out.copy_(weight)


def _add_to_quantized(
    weight: torch.Tensor,
    scale: torch.Tensor,
    adapters: Sequence[Adapter],
    out: torch.Tensor,
    out_scale: torch.Tensor,
    kernels,
) -> None:
    factors, whole = _factors(adapters), _high_rank(adapters)
    if whole:
        total = weight.float()
        if factors is not None:
            total += factors[1].float() @ factors[0].float() / scale
        for adapter in whole:
            total += adapter.difference() / scale
        store_quantized(total, scale, out, out_scale)
    elif factors is not None:
        kernels.add_to_quantized(weight, scale, *factors, out, out_scale)
    else:
        out.copy_(weight)
        out_scale.copy_(scale)
