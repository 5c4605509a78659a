"""Operands found again from one forward to the next, without looking at their modules anew.

What ``linear.operand`` and ``linear.packed`` find out takes the processor longer than a small picture's product takes the
card, and in nearly every forward they find the same. Here it is kept how the weights of some linears lie; the next forward
compares addresses. Nothing holds the weights themselves, so that they can move or go.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .linear import Operand, runs_itself
from .quantize import QuantizedTensor

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides


class Known(Protocol):
    """Finds operands again that an earlier forward has made."""

    def operands(self, modules: tuple[Any, ...]) -> list[Operand] | None:
        """Those of linears over one input, if their weights are as they were when they were learnt."""
        ...

    def learn(self, modules: tuple[Any, ...], operands: list[Operand]) -> None:
        """Keep them, if this can tell later whether they are still right."""
        ...


@dataclass(frozen=True)
class _Found:
    others: tuple[weakref.ref, ...]  # the modules behind the first
    stamps: list[tuple | None]
    widths: tuple[int, ...]
    weight: Layout
    scale: Layout | None
    bias: Layout | None


class KnownOperands:
    """Of one transformer whose weights lie in its own modules (``linear.RESIDENT``)."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[Any, _Found] = weakref.WeakKeyDictionary()  # by the first module

    def operands(self, modules: tuple[Any, ...]) -> list[Operand] | None:
        found = self._found.get(modules[0])
        if found is None or len(modules) != len(found.stamps):
            return None
        if any(other() is not module for other, module in zip(found.others, modules[1:], strict=True)):
            return None
        for module, stamp in zip(modules, found.stamps, strict=True):
            if runs_itself(module) or _stamp(module) != stamp:
                return None
        tensors = _tensors(modules[0])
        assert tensors is not None  # as when it was learnt
        weight, scale, bias = tensors
        operand = Operand(
            modules,
            found.widths,
            weight.as_strided(*found.weight),
            None if scale is None or found.scale is None else scale.as_strided(*found.scale),
            None if bias is None or found.bias is None else bias.as_strided(*found.bias),
        )
        return [operand]

    def learn(self, modules: tuple[Any, ...], operands: list[Operand]) -> None:
        """Keep how one operand lies, if it is made of nothing but what lies in its modules."""
        if len(operands) != 1:
            return
        (operand,) = operands
        parts, own = (operand.weight, operand.scale, operand.bias), _tensors(modules[0])
        if (
            operand.weight is None
            or own is None
            or any(_address(p) != _address(o) for p, o in zip(parts, own, strict=True))
        ):
            return
        weight, scale, bias = (None if t is None else (t.shape, t.stride()) for t in parts)
        assert weight is not None
        others = tuple(weakref.ref(module) for module in modules[1:])
        self._found[modules[0]] = _Found(others, [_stamp(m) for m in modules], operand.widths, weight, scale, bias)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _tensors(module: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """Weight or its quantized numbers, their scale, bias; None of a module that has no weight of its own."""
    parameters = module._parameters  # nn.Module's own look-up takes ten times as long
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if isinstance(weight, QuantizedTensor):
        return weight._qdata, weight._params.scale, bias
    return None if weight is None else (weight, None, bias)


def _stamp(module: Any) -> tuple | None:
    """Equal if the module's weights are the same numbers in the same form at the same place."""
    tensors = _tensors(module)
    if tensors is None:
        return None
    weight, scale, bias = tensors
    return (
        id(module._parameters["weight"]),
        weight.dtype,
        weight.stride(),
        *((None, None) if t is None else (t.data_ptr(), t.untyped_storage().data_ptr()) for t in (weight, scale, bias)),
    )
