"""Operands found again from one forward to the next, without looking at their modules anew.

What ``linear.operand`` and ``linear.packed`` find out takes the processor longer than a small picture's product takes the card, and in
nearly every forward they find the same. Here it is kept how the weights of some linears lie; the next forward compares
addresses. Nothing holds the weights themselves, so that they can move or go.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .linear import Operand, runs_itself
from .quantize import QuantizedTensor

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides


@dataclass(frozen=True)
class _Found:
    stamps: list[tuple]
    widths: tuple[int, ...]
    weight: Layout
    scale: Layout | None
    bias: Layout | None


class KnownOperands:
    """Of one transformer whose weights lie in its own modules (``linear.RESIDENT``)."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], _Found] = {}

    def operand(self, modules: tuple[Any, ...]) -> Operand | None:
        """The operand of linears over one input, if their weights are as they were when it was learnt."""
        found = self._found.get(modules)
        if found is None:
            return None
        for module, stamp in zip(modules, found.stamps, strict=True):
            if runs_itself(module) or _stamp(module) != stamp:
                return None
        weight, scale, bias = _tensors(modules[0])
        return Operand(
            modules,
            found.widths,
            weight.as_strided(*found.weight),
            None if scale is None or found.scale is None else scale.as_strided(*found.scale),
            None if bias is None or found.bias is None else bias.as_strided(*found.bias),
        )

    def learn(self, modules: tuple[Any, ...], operand: Operand) -> None:
        """Keep how the operand lies, if it is made of nothing but what lies in its modules."""
        weight, scale, bias = (None if t is None else (t.shape, t.stride()) for t in _parts(operand))
        own = _tensors(modules[0])
        if weight is None or any(
            (mine is None) != (theirs is None)
            or (mine is not None and theirs is not None and mine.data_ptr() != theirs.data_ptr())
            for mine, theirs in zip(_parts(operand), own, strict=True)
        ):
            return
        self._found[modules] = _Found([_stamp(m) for m in modules], operand.widths, weight, scale, bias)


def _parts(operand: Operand) -> tuple[torch.Tensor | None, ...]:
    return operand.weight, operand.scale, operand.bias


def _tensors(module: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Weight or its quantized numbers, their scale, bias."""
    parameters = module._parameters  # nn.Module's own look-up takes ten times as long
    weight, bias = parameters["weight"], parameters["bias"]
    if isinstance(weight, QuantizedTensor):
        return weight._qdata, weight._params.scale, bias
    return weight, None, bias


def _stamp(module: Any) -> tuple:
    """Equal if the module's weights are the same numbers in the same form at the same place."""
    weight, scale, bias = _tensors(module)
    return (
        id(module._parameters["weight"]),
        weight.data_ptr(),
        weight.dtype,
        weight.stride(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )
