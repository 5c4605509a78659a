"""Operands found again: as if they were looked at anew, whatever has happened to the weights meanwhile."""

import pytest
import torch
from torch import nn

from qwen_edit.known_operands import KnownOperands
from qwen_edit.linear import RESIDENT, Operand, operand, pack, packed
from qwen_edit.quantize import quantize_weight

FORMS = (None, "fp8", "int8")


def linears(form: str | None, count: int = 3) -> tuple[nn.Linear, ...]:
    torch.manual_seed(0)
    made = tuple(nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False) for _ in range(count))
    for module in made:
        if form is not None:
            module.weight = nn.Parameter(quantize_weight(module.weight, form), requires_grad=False)
    if count > 1:
        pack(made)
    return made


def looked_at(modules: tuple[nn.Linear, ...]) -> Operand:
    operands = [operand(RESIDENT, m) for m in modules]
    found = packed(operands) if len(operands) > 1 else operands[0]
    assert found is not None
    return found


def known(modules: tuple[nn.Linear, ...]) -> KnownOperands:
    found = KnownOperands()
    found.learn(modules, looked_at(modules))
    return found


def same(one: Operand, other: Operand) -> bool:
    for a, b in ((one.weight, other.weight), (one.scale, other.scale), (one.bias, other.bias)):
        if (a is None) != (b is None):
            return False
        if (
            a is not None
            and b is not None
            and [a.data_ptr(), a.shape, a.stride(), a.dtype]
            != [
                b.data_ptr(),
                b.shape,
                b.stride(),
                b.dtype,
            ]
        ):
            return False
    return one.modules == other.modules and one.widths == other.widths and one.prologue == other.prologue


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 3])
def test_an_operand_is_found_as_it_lies(form, count):
    modules = linears(form, count)
    found = known(modules).operand(modules)
    assert found is not None
    assert same(found, looked_at(modules))


def test_nothing_is_found_that_was_not_learnt():
    modules = linears(None)
    assert KnownOperands().operand(modules) is None
    assert known(modules).operand(modules[:2]) is None


CHANGES = {
    "other numbers elsewhere": lambda m: setattr(m.weight, "data", m.weight.data.clone()),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.clone(), requires_grad=False)),
    "another bias": lambda m: setattr(m.bias, "data", m.bias.data.clone()),
    "spare columns": lambda m: setattr(m.weight, "data", torch.empty(32, 128, dtype=torch.bfloat16)[:, :64]),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_change_is_noticed(change, which):
    modules = linears(None)
    found = known(modules)
    CHANGES[change](modules[which])
    assert found.operand(modules) is None


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_requantized_weights_are_noticed(form):
    modules = linears(form)
    found = known(modules)
    again = modules[1].weight.dequantize() * 2
    modules[1].weight = nn.Parameter(quantize_weight(again, form), requires_grad=False)
    assert found.operand(modules) is None


def test_weights_that_only_their_module_applies_are_not_learnt():
    class Another(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    modules = (Another(64, 32),)
    found = known(modules)
    assert found.operand(modules) is None


def test_weights_with_one_scale_are_looked_at_each_time():
    """Their row scales are made for each product, so nothing of them lies anywhere."""
    modules = linears("fp8", 1)
    params = modules[0].weight._params
    one = type(params)(**{**vars(params), "scale": params.scale.flatten()[:1].reshape(())})
    modules[0].weight._params = one
    assert known(modules).operand(modules) is None
