"""Operands found again: as if they were looked at anew, whatever has happened to the weights meanwhile."""

import numpy
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from qwen_edit.known_operands import KnownOperands
from qwen_edit.linear import RESIDENT, Operand, operand, pack, packed
from qwen_edit.quantize import quantize_weight
from qwen_edit.transformer import QwenEditTransformer

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
    found.learn(modules, [looked_at(modules)])
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
    found = known(modules).operands(modules)
    assert found is not None
    assert same(*found, looked_at(modules))


def test_nothing_is_found_that_was_not_learnt():
    modules = linears(None)
    assert KnownOperands().operands(modules) is None
    assert known(modules).operands(modules[:2]) is None


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
    assert found.operands(modules) is None


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_requantized_weights_are_noticed(form):
    modules = linears(form)
    found = known(modules)
    again = modules[1].weight.dequantize() * 2
    modules[1].weight = nn.Parameter(quantize_weight(again, form), requires_grad=False)
    assert found.operands(modules) is None


def test_weights_that_only_their_module_applies_are_not_learnt():
    class Another(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    modules = (Another(64, 32),)
    found = known(modules)
    assert found.operands(modules) is None


def test_weights_at_the_same_place_in_storages_of_their_own_are_noticed():
    """As after a way to the processor and back: one product over all of them would read behind the first one's storage."""
    modules = linears(None)
    buffer = numpy.zeros((96, 64), dtype=numpy.int16)
    whole = torch.from_numpy(buffer).view(torch.bfloat16)
    for module, rows in zip(modules, whole.split(32), strict=True):
        module.weight.data = rows
    found = known(modules)
    assert found.operands(modules) is not None
    for module, rows in zip(modules, numpy.split(buffer, 3), strict=True):
        module.weight.data = torch.from_numpy(rows).view(torch.bfloat16)
    assert found.operands(modules) is None


def test_a_forward_with_pefts_layers_runs():
    """What a pipeline's load_lora_weights puts in: a layer whose weight is another module's."""
    torch.manual_seed(0)
    model = QwenEditTransformer(
        num_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 12, 12)
    ).eval()
    shapes = [[(1, 2, 2), (1, 2, 2)]]
    inputs = (torch.randn(1, 8, 64), torch.randn(1, 3, 16), None, torch.tensor([0.5]), shapes)

    def velocity() -> torch.Tensor:
        with torch.inference_mode():
            return model(*inputs, return_dict=False)[0]

    before = velocity()
    config = LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    first, second = velocity(), velocity()
    assert torch.equal(first, second)
    assert not torch.allclose(first, before, atol=1e-4)


def test_weights_with_one_scale_are_looked_at_each_time():
    """Their row scales are made for each product, so nothing of them lies anywhere."""
    modules = linears("fp8", 1)
    params = modules[0].weight._params
    one = type(params)(**{**vars(params), "scale": params.scale.flatten()[:1].reshape(())})
    modules[0].weight._params = one
    assert known(modules).operands(modules) is None
