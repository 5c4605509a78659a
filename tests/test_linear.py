"""What a linear multiplies with, laid out singly or side by side, plain, quantized, adapted, replaced or hooked."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen_edit.kernels import REFERENCE, Rows
from qwen_edit.linear import (
    NO_ADAPTERS,
    RESIDENT,
    LowRank,
    Operand,
    multiply,
    multiply_gelu,
    operand,
    pack,
    packed,
    runs_itself,
)
from qwen_edit.quantize import QuantizedLinear, QuantizedTensor, plain_parts, quantize_weight, quantized_matmul
from qwen_edit.transformer import Forward

IN, OUT, TOKENS = 64, 48, 7
FORMS = [None, "fp8", "int8"]
BOUNDS = {None: 1e-6, "fp8": 0.05, "int8": 0.02}  # relative errors of quantized weights times quantized activations
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def linear(form: str | None, bias: bool = True) -> QuantizedLinear:
    module = QuantizedLinear(IN, OUT, bias=bias).requires_grad_(False)
    module.form = form
    if form is not None:
        module.weight = nn.Parameter(quantize_weight(module.weight, form), requires_grad=False)
    return module


@pytest.fixture
def attention():
    """Makes a module with three linears over one input, of given forms."""
    torch.manual_seed(0)
    return lambda *forms: nn.ModuleDict(dict(zip("qkv", map(linear, forms), strict=True)))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm()).item()


def exact(x: torch.Tensor, *modules, adapters=NO_ADAPTERS) -> torch.Tensor:
    """The modules' results side by side in float64, with the weights they hold."""
    results = []
    for module in modules:
        weight = module.weight.dequantize() if isinstance(module.weight, QuantizedTensor) else module.weight
        y = x.double() @ weight.double().T + (0 if module.bias is None else module.bias.double())
        for a in adapters.get(module, ()):
            y += a.scale * x.double() @ a.a.double().T @ a.b.double().T
        results.append(y)
    return torch.cat(results, dim=1)


def product(x: torch.Tensor, *modules, adapters=NO_ADAPTERS) -> torch.Tensor:
    """The modules' results side by side as the forward computes them."""
    forward = Forward(None, adapters=adapters)
    operands = forward.operands(*modules)
    prologue = forward.prologue(operands)
    rows = REFERENCE.quantize_rows(x, prologue["quantize"], keep=prologue["keep"])
    return torch.cat([multiply(o, rows, x.dtype, adapters, REFERENCE) for o in operands], dim=1)


def joint(modules) -> Operand | None:
    return packed([operand(RESIDENT, m) for m in modules])


def adapter(rank: int = 3) -> LowRank:
    return LowRank(torch.randn(rank, IN), torch.randn(OUT, rank), 0.5)


# Side by side


@pytest.mark.parametrize("form", FORMS)
def test_pack_changes_only_where_the_weights_lie(attention, x, form):
    attn = attention(form, form, form)
    modules = list(attn.values())
    before = {name: parameter.clone() for name, parameter in attn.state_dict().items()}
    parameters = [id(p) for p in attn.parameters()]
    assert joint(modules) is None
    pack(modules)
    assert [id(p) for p in attn.parameters()] == parameters
    after = attn.state_dict()
    assert list(after) == list(before)
    for now, then in zip(after.values(), before.values(), strict=True):
        assert (type(now), now.shape, now.dtype) == (type(then), then.shape, then.dtype)
        assert torch.equal(*(t.dequantize() if isinstance(t, QuantizedTensor) else t for t in (now, then)))
    one = joint(modules)
    assert one is not None
    assert (one.modules, one.widths, one.weight.shape) == (tuple(modules), (OUT,) * 3, (3 * OUT, IN))
    assert one.prologue == (None if form is None else plain_parts(modules[0].weight)[0].dtype)
    assert error(product(x, *modules), exact(x, *modules)) < BOUNDS[form]


@pytest.mark.parametrize("form", FORMS)
def test_packing_again_copies_nothing(attention, form):
    modules = list(attention(form, form, form).values())
    pack(modules)
    where = joint(modules).weight.data_ptr()
    pack(modules)
    assert joint(modules).weight.data_ptr() == where


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("replaced", "qkv")
def test_a_replaced_weight_is_seen(attention, x, form, replaced):
    """As by a native LoRA patch, which sets a new parameter; what is restored afterwards is one operand again."""
    attn = attention(form, form, form)
    modules = list(attn.values())
    pack(modules)
    kept = attn[replaced].weight
    if form is None:
        attn[replaced].weight = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)
    else:
        attn[replaced].set_weight(torch.randn(OUT, IN))
    assert joint(modules) is None
    assert error(product(x, *modules), exact(x, *modules)) < BOUNDS[form]
    attn[replaced].weight = kept
    assert joint(modules) is not None
    assert error(product(x, *modules), exact(x, *modules)) < BOUNDS[form]


@pytest.mark.parametrize("form", FORMS)
def test_moved_and_converted_modules_give_the_same_product(attention, x, form):
    attn = attention(form, form, form)
    pack(list(attn.values()))
    moved = attn.to("cpu").to(torch.float64)
    assert error(product(x.double(), *moved.values()), exact(x, *moved.values())) < BOUNDS[form]


def test_a_copy_is_independent(attention, x):
    """comfy-kitchen's quantized tensors can't be copied with deepcopy."""
    attn = attention(None, None, None)
    pack(list(attn.values()))
    copied = copy.deepcopy(attn)
    before = product(x, *attn.values())
    for module in copied.values():
        module.weight.mul_(2)
    assert torch.equal(product(x, *attn.values()), before)
    assert error(product(x, *copied.values()), exact(x, *copied.values())) < 1e-6


def test_neighbours_in_other_storages_are_not_one_operand():
    """What lies behind a weight's own storage may go away any time."""
    memory = torch.zeros(2 * OUT * IN)
    first, second = (nn.Linear(IN, OUT, bias=False, device="meta") for _ in range(2))
    pieces = [
        torch.frombuffer(memory.numpy(), dtype=torch.float32, count=OUT * IN, offset=4 * OUT * IN * i) for i in (0, 1)
    ]
    for module, piece in zip((first, second), pieces, strict=True):
        module.weight = nn.Parameter(piece.view(OUT, IN), requires_grad=False)
    assert first.weight.data_ptr() + first.weight.nbytes == second.weight.data_ptr()
    assert joint([first, second]) is None


def test_what_can_not_lie_side_by_side_stays_apart(attention, x):
    for forms in (("fp8", None, "fp8"), ("w4a4", "w4a4", "w4a4")):
        modules = list(attention(*forms).values())
        pack(modules)
        assert joint(modules) is None
    one_without_bias = [linear(None), linear(None, bias=False)]
    storage = torch.randn(2 * OUT, IN)
    for module, weight in zip(one_without_bias, storage.split(OUT), strict=True):
        module.weight.data = weight
    assert joint(one_without_bias) is None


def test_weights_with_one_scale_stay_apart(attention, x):
    """Files of ComfyUI have one scale a tensor, which can't be a part of a joint column of scales."""
    modules = list(attention(None, None, None).values())
    for module in modules:
        quantized = QuantizedTensor.from_float(module.weight.data, "TensorCoreFP8Layout")
        module.weight = nn.Parameter(quantized, requires_grad=False)
    pack(modules)
    assert joint(modules) is None
    assert error(product(x, *modules), exact(x, *modules)) < BOUNDS["fp8"]


# Products


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_multiply_writes_into_out(x, form, bias):
    torch.manual_seed(0)
    module = linear(form, bias)
    op = operand(RESIDENT, module)
    rows = REFERENCE.quantize_rows(x, op.prologue)
    out = torch.full((TOKENS, OUT), torch.nan)
    y = multiply(op, rows, torch.float32, NO_ADAPTERS, REFERENCE, out)
    assert y.data_ptr() == out.data_ptr()
    assert error(out, exact(x, module)) < BOUNDS[form]
    assert torch.equal(out, multiply(op, rows, torch.float32, NO_ADAPTERS, REFERENCE))


@pytest.mark.parametrize("form", [*FORMS, "w4a4"])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_an_adapter_adds_its_term_to_its_own_linear(attention, x, form, side_by_side):
    """From the unquantized rows: the term itself is as exact as the dtype."""
    attn = attention(form, form, form)
    modules = list(attn.values())
    if side_by_side:
        pack(modules)
    adapters = {attn["k"]: [adapter(), adapter(5)], attn["v"]: [adapter()]}
    without, added = product(x, *modules), product(x, *modules, adapters=adapters)
    terms = exact(x, *modules, adapters=adapters) - exact(x, *modules)
    assert torch.equal(added[:, :OUT], without[:, :OUT])
    assert error((added - without)[:, OUT:], terms[:, OUT:]) < 1e-5


def test_an_adapter_is_added_in_out_too(x):
    torch.manual_seed(0)
    for form in FORMS:
        module = linear(form)
        adapters = {module: [adapter()]}
        op = operand(RESIDENT, module)
        out = torch.full((TOKENS, OUT), torch.nan)
        multiply(op, REFERENCE.quantize_rows(x, op.prologue, keep=True), x.dtype, adapters, REFERENCE, out)
        assert error(out, exact(x, module, adapters=adapters)) < BOUNDS[form]


@pytest.mark.parametrize("forms", [(None, "fp8", None), ("int8", "int8", None), ("w4a4", "fp8", None)])
def test_linears_of_several_forms_over_one_input(attention, x, forms):
    """As in files where some layers were left in bf16: each multiplies with the rows of its own form."""
    modules = list(attention(*forms).values())
    y = product(x, *modules).split(OUT, dim=1)
    for form, module, part in zip(forms, modules, y, strict=True):
        assert error(part, exact(x, module)) < (BOUNDS | {"w4a4": 0.2})[form]


def test_4_bit_weights_go_through_their_librarys_product(x):
    torch.manual_seed(0)
    module = linear("w4a4")
    op = operand(RESIDENT, module)
    assert (op.weight, op.prologue) == (None, None)
    y = multiply(op, Rows(x), x.dtype, NO_ADAPTERS, REFERENCE)
    assert torch.equal(y, F.linear(x, module.weight, module.bias))
    weights_only = error(F.linear(x, module.weight.dequantize(), module.bias), exact(x, module))
    assert weights_only < 1e-6 < 0.01 < error(y, exact(x, module))  # its activations are of 4 bit too


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quantize", [None, torch.float8_e4m3fn, torch.int8])
def test_multiply_gelu(x, form, quantize):
    torch.manual_seed(0)
    module = linear(form)
    op = operand(RESIDENT, module)
    for adapters in ({}, {module: [adapter()]}):
        rows = REFERENCE.quantize_rows(x, op.prologue, keep=bool(adapters))
        got = multiply_gelu(op, rows, x.dtype, adapters, REFERENCE, quantize=quantize, keep=False)
        expected = F.gelu(exact(x, module, adapters=adapters), approximate="tanh")
        assert got.data.dtype == (quantize or x.dtype)
        dequantized = got.data.float() * (1 if got.scale is None else got.scale)
        assert error(dequantized, expected) < BOUNDS[form] + (0.04 if quantize else 0)


# Modules with a forward of their own


def doubled(module, args, output):
    return 2 * output


def halved_input(module, args):
    return (args[0] / 2,)


def replace_forward(module):
    original = module.forward
    module.forward = lambda x: original(x) + 1


CHANGES = {
    "forward replaced": (replace_forward, lambda y, bias: y + 1),
    "hook": (lambda m: m.register_forward_hook(doubled), lambda y, bias: 2 * y),
    "pre-hook": (lambda m: m.register_forward_pre_hook(halved_input), lambda y, bias: (y + bias) / 2),
}


@pytest.mark.parametrize("form", [*FORMS, "w4a4"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_somebody_changed_is_called(attention, x, form, change):
    attn = attention(form, form, form)
    modules = list(attn.values())
    pack(modules)
    before = product(x, *modules)
    apply, expected = CHANGES[change]
    apply(attn["k"])
    assert [runs_itself(m) for m in modules] == [False, True, False]
    after = product(x, *modules)
    q, k, v = after.split(OUT, dim=1)
    torch.testing.assert_close(torch.cat([q, v], 1), before[:, [*range(OUT), *range(2 * OUT, 3 * OUT)]])
    assert error(k, expected(before[:, OUT : 2 * OUT], attn["k"].bias).double()) < (BOUNDS | {"w4a4": 0.2})[form] + 1e-6
    out = torch.full((TOKENS, OUT), torch.nan)
    assert multiply(operand(RESIDENT, attn["k"]), Rows(x), x.dtype, NO_ADAPTERS, REFERENCE, out) is out
    torch.testing.assert_close(out, k)


def test_pefts_own_layers_are_called(attention, x):
    """As after a pipeline's ``load_lora_weights``: they have a ``weight``, which is the one without the LoRA."""
    attn = attention(None, None, None)
    pack(list(attn.values()))
    config = peft.LoraConfig(r=2, target_modules=["k"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, attn)
    expected = torch.cat([module(x) for module in adapted.values()], dim=1)
    assert error(product(x, *adapted.values()), expected.double()) < 1e-6


# On a card


@needs_card
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("biased", [True, False])
def test_on_a_card_the_quantized_product_is_that_of_its_operands(form, dtype, biased):
    """Rows that fill no tile; exact but for the rounding of the result and, for fp8, of its sums."""
    torch.manual_seed(0)
    x, weight = torch.randn(333, 1024, device="cuda", dtype=dtype), torch.randn(768, 1024, device="cuda", dtype=dtype)
    data, scale = plain_parts(quantize_weight(weight, form))
    rows = REFERENCE.quantize_rows(x, data.dtype)
    bias = torch.randn(768, device="cuda", dtype=dtype) if biased else None
    expected = (rows.data.double() * rows.scale) @ (data.double() * scale).T + (0 if bias is None else bias.double())
    for out in (None, torch.full((333, 768), torch.nan, device="cuda", dtype=dtype)):
        y = quantized_matmul(rows.data, rows.scale, data, scale, bias, dtype, out)
        assert out is None or y.data_ptr() == out.data_ptr()
        assert y.dtype == dtype
        assert error(y, expected) < 0.004


@needs_card
def test_on_a_card_gelu_is_part_of_the_product():
    torch.manual_seed(0)
    module = nn.Linear(1024, 768, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(333, 1024, device="cuda", dtype=torch.bfloat16)
    rows = multiply_gelu(operand(RESIDENT, module), Rows(x), x.dtype, {}, REFERENCE, quantize=None, keep=False)
    expected = F.gelu(exact(x, module), approximate="tanh")
    assert error(rows.data, expected) < 0.004
