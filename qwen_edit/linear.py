"""The linears of the forward: how each weight is multiplied, and what its activations have to look like.

A weight's form owns its activation prologue: fp8 and int8 weights want rows quantized to the same dtype, which the
kernel before the linear writes directly; everything else takes the rows as they are. Adapters are added to the
result as low-rank terms, so no weight is ever touched.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .four_bit import is_four_bit, unpacked_weights
from .kernels import Addend, FusedKernels, Rows
from .packed import PackedLinear, unpacked
from .quantize import QuantizedTensor, multiplies, plain_parts, quantized_matmul, replace_parts


@dataclass(frozen=True)
class LowRank:
    """An adapter on one linear: adds ``scale * (x A^T) B^T``. ``a`` is ``[r, in]``, ``b`` ``[out, r]``.

    What is derived from both is kept in ``derived``, which belongs to their owner and is emptied with them.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    derived: dict = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class HighRank:
    """An adapter whose rank is too high for a term beside the product: adds ``scale * x D^T``, D of the weight's shape.

    ``factors``: two matrices, whose Kronecker product D is (LoKr), or four, of which D is ``(f0 f1) ∘ (f2 f3)`` (LoHa).
    """

    factors: tuple[torch.Tensor, ...]
    scale: float

    def difference(self) -> torch.Tensor:
        """``scale * D`` ``[out, in]`` in float32; as large as the weight, so it is made where it is used."""
        f = [factor.float() for factor in self.factors]
        whole = torch.kron(f[0], f[1]) if len(f) == 2 else (f[0] @ f[1]).mul_(f[2] @ f[3])
        return whole.mul_(self.scale)


Adapter = LowRank | HighRank
# Active adapters by the linear that they add to.
Adapters = Mapping[nn.Module, Sequence[Adapter]]
NO_ADAPTERS: Adapters = {}


class WeightReader(Protocol):
    """Where the forward gets a module's weights from."""

    def read(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias, valid until ``release``; None: only the module itself knows how to apply them."""
        ...

    def release(self) -> None:
        """The weights read so far are not needed any more."""
        ...

    def ahead(self, modules: Sequence[nn.Module], like: torch.Tensor) -> AbstractContextManager[None]:
        """While these are about to be read, in this order, to be multiplied with rows of this dtype and device."""
        ...


def runs_itself(module: nn.Module) -> bool:
    """Whether somebody has replaced or hooked this one module's forward, which multiplying with its weight would skip."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


class Resident:
    """Weights that lie in their modules. Other classes than ``nn.Linear`` (peft's, after a pipeline's
    ``load_lora_weights``) may do more with theirs."""

    def read(self, module):
        plain = type(module).forward is nn.Linear.forward and not runs_itself(module)
        return (module.weight, module.bias) if plain else None

    def release(self) -> None:
        pass

    def ahead(self, modules: Sequence[nn.Module], like: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()


RESIDENT = Resident()


@dataclass(frozen=True)
class Channels:
    """Adapters as a part of a product: ``t = gain * (x @ down.T)`` goes behind x, and the weight has columns for it
    (see ``extra_channels.py``). ``down`` ``[R, K]`` in the rows' dtype, ``gain`` ``[R]`` in float32 (None: ones).

    With ``up`` (int8) x and the weight stay as they are, and t and ``up`` are the product's ``kernels.Addend``.
    """

    down: torch.Tensor
    gain: torch.Tensor | None
    up: torch.Tensor | None = None


@dataclass(frozen=True)
class Operand:
    """A linear, or several that share their input, ready to be multiplied with.

    ``weight`` ``[N, K]``; ``scale`` ``[N, 1]`` where it is quantized; without a weight the modules are called. ``widths``
    are the modules' output features, which lie side by side in the result. With ``channels`` that have no ``up`` the
    weight's rows go on behind their K columns.
    """

    modules: tuple[nn.Module, ...]
    widths: tuple[int, ...]
    weight: torch.Tensor | None
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    channels: Channels | None = None

    @property
    def room(self) -> int:
        """How many columns the rows need behind them."""
        return 0 if self.channels is None or self.channels.up is not None else len(self.channels.down)

    @property
    def prologue(self) -> torch.dtype | None:
        """What dtype the rows have to be quantized to; None: as they are."""
        return self.weight.dtype if self.weight is not None and self.scale is not None else None


def operand(weights: WeightReader, module: Any) -> Operand:
    width = module.out_features
    read = weights.read(module)
    if read is None:
        return Operand((module,), (width,), None)
    weight, bias = read
    if isinstance(weight, QuantizedTensor):
        parts = plain_parts(weight)
        # a form that only its own library multiplies, or that we can't multiply on this card
        if parts is None or not multiplies(parts[0].device, parts[0].dtype, weight.dtype):
            return Operand((module,), (width,), None)
        return Operand((module,), (width,), *parts, bias)
    return Operand((module,), (width,), weight, None, bias)


def unpacked_operand(modules: Sequence[Any]) -> Operand | None:
    """Linears over the same input whose weights are in ggml's formats or of 4 bits, as one: what is multiplied is made
    here, side by side, and goes with the operand. None if one of them is of another kind."""
    if any(runs_itself(m) for m in modules):
        return None
    widths = tuple(m.out_features for m in modules)
    if all(type(m) is PackedLinear for m in modules):
        weight, bias = unpacked(modules)
        return Operand(tuple(modules), widths, weight, None, bias)
    if all(is_four_bit(m.weight) for m in modules):
        bias = modules[0].bias if len(modules) == 1 else torch.cat([m.bias for m in modules])
        return Operand(tuple(modules), widths, *unpacked_weights([m.weight for m in modules], bias.dtype), bias)
    return None


def packed(operands: Sequence[Operand]) -> Operand | None:
    """Linears over the same input as one, if their weights lie side by side in memory (see ``pack``)."""
    columns = list(zip(*((o.weight, o.scale, o.bias) for o in operands), strict=True))
    if any(o.weight is None for o in operands) or any(len({p is None for p in column}) > 1 for column in columns):
        return None
    weight, scale, bias = (None if column[0] is None else _joined(column) for column in columns)
    if any(j is None and column[0] is not None for j, column in zip((weight, scale, bias), columns, strict=True)):
        return None
    modules = tuple(m for o in operands for m in o.modules)
    return Operand(modules, tuple(w for o in operands for w in o.widths), weight, scale, bias)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor ``[N, ...]`` of which the parts are the rows in this order, if there is one."""
    first = parts[0]
    row = first.stride(0)
    dense = first.shape[1:].numel() if first.ndim > 1 else 1
    at = first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != at or part.dtype != first.dtype:
            return None
        if part.stride() != first.stride() or row < dense or (part.ndim > 1 and part.stride(-1) != 1):
            return None
        at += part.shape[0] * row
    return first.as_strided((sum(p.shape[0] for p in parts), *first.shape[1:]), first.stride())


def pack(linears: Sequence[Any]) -> None:
    """Lay the weights (and scales, biases) of linears over the same input side by side, so that one product runs all.

    Names, shapes and values stay; each weight becomes a view of the joint storage.
    """
    if any(isinstance(m, PackedLinear) for m in linears):
        return  # unpacked side by side for each product
    weights = [m.weight for m in linears]
    if all(isinstance(w, QuantizedTensor) for w in weights):
        parts = [plain_parts(w) for w in weights]
        # a form of its own, or one scale for the whole weight, which can't be a part of a column
        if any(p is None or p[1].numel() != w._params.scale.numel() for w, p in zip(weights, parts, strict=True)):
            return
        data, scale = (_side_by_side(column) for column in zip(*parts, strict=True))
        for module, d, s in zip(linears, data, scale, strict=True):
            replace_parts(module.weight, d, s)
    elif not any(isinstance(w, QuantizedTensor) for w in weights):
        put_weights(linears, _side_by_side([w.data for w in weights]))
    else:
        return
    for module, view in zip(linears, _side_by_side([m.bias.data for m in linears]), strict=True):
        module.bias.data = view


def put_weights(linears: Sequence[Any], weights: Sequence[torch.Tensor]) -> None:
    """Give linears equal weights (of quantized ones: the data) that lie elsewhere in memory."""
    for module, weight in zip(linears, weights, strict=True):
        if isinstance(module.weight, QuantizedTensor):
            replace_parts(module.weight, weight, module.weight._params.scale)
        else:
            module.weight.data = weight


def _side_by_side(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    if _joined(tensors) is not None:
        return tensors
    return torch.cat(list(tensors)).split([t.shape[0] for t in tensors])


def multiply(
    op: Operand,
    rows: Rows,
    dtype: torch.dtype,
    adapters: Adapters,
    kernels: FusedKernels,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``rows @ weight.T + bias`` plus the adapters' terms, ``[M, N]`` in ``dtype``.

    Args:
        out: ``[M, N]`` contiguous, to write into.
    """
    op, x, in_channels = _with_channels(op, rows, kernels)
    if op.weight is None:
        (module,) = op.modules
        y = module(rows.unquantized)
        y = y if out is None else out.copy_(y)
    elif op.scale is None and op.channels is not None and not in_channels:
        y, in_channels = _upon_low_rank(op, x, op.channels, out), True
    elif op.scale is None:
        y = _plain(op, x, out)
    else:
        assert rows.scale is not None, "the prologue did not quantize these rows"
        addend = _addend(op, rows, dtype)
        y = quantized_matmul(x, rows.scale, op.weight, op.scale, op.bias, dtype, out, addend)
    if adapters and not in_channels:
        for module, part in zip(op.modules, y.split(op.widths, dim=1), strict=True):
            low_rank(part, rows.unquantized if module in adapters else rows.data, adapters.get(module, ()))
    return y


def _with_channels(op: Operand, rows: Rows, kernels: FusedKernels) -> tuple[Operand, torch.Tensor, bool]:
    """Weight and rows with the adapters' channels behind them, if both have room; and whether they have."""
    if op.channels is None or op.weight is None or rows.room < op.room:
        return op, rows.data if op.scale is not None else rows.unquantized, False
    if op.channels.up is not None:
        return op, rows.data, True
    x = kernels.append_low_rank(rows.data, op.channels.down, op.channels.gain)
    weight = op.weight.as_strided((op.weight.shape[0], x.shape[1]), op.weight.stride())
    return replace(op, weight=weight), x, True


def _addend(op: Operand, rows: Rows, dtype: torch.dtype) -> Addend | None:
    """The adapters' term of an int8 product, from the rows that the product itself takes."""
    if op.channels is None or op.channels.up is None:
        return None
    assert rows.scale is not None
    assert op.channels.gain is not None
    t = quantized_matmul(rows.data, rows.scale, op.channels.down, op.channels.gain[:, None], None, dtype)
    return Addend(t, op.channels.up)


def multiply_gelu(
    op: Operand, rows: Rows, dtype: torch.dtype, adapters: Adapters, kernels: FusedKernels, **prologue
) -> Rows:
    """The linear before a GELU and the GELU, as rows for the linear after it."""
    in_half = rows.data.is_cuda and prologue["quantize"] is None and dtype != torch.float32
    added = op.modules[0] in adapters and op.channels is None  # something is still to be added to the result
    if in_half and op.weight is not None and op.bias is not None and op.scale is None and not added:
        whole, x, in_channels = _with_channels(op, rows, kernels)
        assert whole.weight is not None
        assert in_channels == (op.channels is not None)  # rows in half precision always have room
        # cuBLASLt's epilogue, which is the tanh form
        return Rows(torch._addmm_activation(op.bias, x, whole.weight.t(), use_gelu=True))
    return kernels.gelu(multiply(op, rows, dtype, adapters, kernels), **prologue)


def _plain(op: Operand, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    assert op.weight is not None
    if out is None:
        return F.linear(x, op.weight, op.bias)
    if op.bias is None:
        return torch.mm(x, op.weight.t(), out=out)
    return torch.addmm(op.bias, x, op.weight.t(), out=out)


def _upon_low_rank(op: Operand, x: torch.Tensor, channels: Channels, out: torch.Tensor | None) -> torch.Tensor:
    """The product of rows that have no room: the adapters' term is written first and the product added to it, which reads
    the result once less than adding the term afterwards."""
    assert op.weight is not None
    t = F.linear(x, channels.down)
    t = t if channels.gain is None else t.mul_(channels.gain)
    rows, width = op.weight.shape
    up = op.weight.as_strided((rows, len(channels.down)), op.weight.stride(), op.weight.storage_offset() + width)
    return _plain(replace(op, weight=up), t, out).addmm_(x, op.weight.t())


def low_rank(y: torch.Tensor, x: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """``y += scale * (x A^T) B^T`` in place for all adapters; y ``[M, N]``, x ``[M, K]``. Those of low rank are one, so that
    y is read and written once; one of high rank costs as much as the linear itself."""
    terms = [adapter for adapter in adapters if isinstance(adapter, LowRank)]
    if len(terms) == 1:
        y.addmm_(F.linear(x, terms[0].a), terms[0].b.t(), alpha=terms[0].scale)
    elif terms:
        b = torch.cat([term.b if term.scale == 1 else term.b * term.scale for term in terms], dim=1)
        y.addmm_(F.linear(x, torch.cat([term.a for term in terms])), b.t())
    for adapter in adapters:
        if isinstance(adapter, HighRank):
            y.addmm_(x, adapter.difference().to(x.dtype).t())
    return y
