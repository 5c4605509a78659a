"""LoRAs as extra channels of the products, or their addends: the same result as adding them to it afterwards, and no trace
without them."""

from pathlib import Path

import pytest
import torch
from test_linear import IN, OUT, TOKENS, error, exact, linear
from torch import nn

from qwen_edit.checkpoints import transformer_from_folder
from qwen_edit.extra_channels import ExtraChannels
from qwen_edit.filling import fill
from qwen_edit.kernels import REFERENCE
from qwen_edit.linear import LowRank, pack
from qwen_edit.lora import read_lora
from qwen_edit.quantize import INT8, QuantizedTensor, prepare, quantize_weight
from qwen_edit.transformer import Forward, QwenEditTransformer

DEMO = Path(__file__).resolve().parents[1] / "demo_model"

BOUNDS = {None: 1e-6, "fp8": 0.05, "int8": 0.015}
TERM_BOUNDS = {None: 1e-5, "fp8": 0.08, "int8": 0.015}


def weight_data(module) -> torch.Tensor:
    return module.weight._qdata if isinstance(module.weight, QuantizedTensor) else module.weight.data


def low_rank(rank: int, seed: int, scale: float = 1.0) -> LowRank:
    """One that changes the result by about a tenth."""
    generator = torch.Generator().manual_seed(100 + seed)
    a = torch.randn(rank, IN, generator=generator) / 8
    b = torch.randn(OUT, rank, generator=generator) / 100
    return LowRank(a, b, scale)


def product(x, channels: ExtraChannels, adapters, *modules) -> torch.Tensor:
    forward = Forward(None, adapters=adapters, channels=channels)  # pyright: ignore[reportArgumentType]
    operands = forward.operands(*modules)
    prologue = forward.prologue(operands)
    doubled = REFERENCE.quantize_rows(x, prologue["quantize"], keep=prologue["keep"], room=prologue["room"])
    if prologue["quantize"] is None:  # as after a normalization, which has room also for floats
        doubled = REFERENCE.gelu(x, room=prologue["room"])
    return torch.cat([forward.multiply(o, doubled, x.dtype) for o in operands], dim=1)


def seen(x: torch.Tensor, form: str | None) -> torch.Tensor:
    return x if form is not None else nn.functional.gelu(x, approximate="tanh")


@pytest.fixture(params=[None, "fp8", "int8"], ids=["float", "fp8", "int8"])
def form(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def qkv(form) -> list:
    modules = [linear(form) for _ in range(3)]
    pack(modules)
    return modules


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1))


def test_adapters_of_any_number_and_rank(form, qkv, x):
    q, k, v = qkv
    channels = ExtraChannels()
    for adapters in (
        {q: [low_rank(4, 1)], k: [low_rank(4, 2)], v: [low_rank(4, 3)]},
        {q: [low_rank(4, 1, 0.5), low_rank(7, 4, -1.0)], v: [low_rank(32, 5, 2.0)]},
        {k: [low_rank(1, 6)]},
    ):
        got = product(x, channels, adapters, *qkv)
        assert error(got, exact(seen(x, form), *qkv, adapters=adapters)) < BOUNDS[form]
        term = got - product(x, channels, {}, *qkv)
        expected = exact(seen(x, form), *qkv, adapters=adapters) - exact(seen(x, form), *qkv)
        assert error(term, expected) < TERM_BOUNDS[form], "the adapters' term on its own"


def test_they_go_through_the_product_and_not_after_it(form, qkv, x, monkeypatch):
    monkeypatch.setattr("qwen_edit.linear.low_rank", lambda *_: pytest.fail("added afterwards"))
    product(x, ExtraChannels(), {qkv[0]: [low_rank(4, 1)]}, *qkv)


def test_no_trace_without_them(form, qkv, x):
    channels = ExtraChannels()
    names = [weight_data(m).clone() for m in qkv]
    product(x, channels, {qkv[0]: [low_rank(4, 1)]}, *qkv)  # makes room
    before = product(x, channels, {}, *qkv)
    for seed in range(20):
        product(x, channels, {qkv[seed % 3]: [low_rank(4 + seed, seed)]}, *qkv)
    assert torch.equal(product(x, channels, {}, *qkv), before)
    assert all(torch.equal(weight_data(m), n) for m, n in zip(qkv, names, strict=True))


def test_switching_back_gives_the_same_bits(form, qkv, x):
    channels = ExtraChannels()
    one, other = {qkv[0]: [low_rank(4, 1)]}, {qkv[0]: [low_rank(4, 2)], qkv[1]: [low_rank(9, 3)]}
    first = product(x, channels, one, *qkv)
    assert not torch.equal(product(x, channels, other, *qkv), first)
    assert torch.equal(product(x, channels, one, *qkv), first)


@pytest.mark.parametrize("count", [1, 37])
@pytest.mark.parametrize("ranks", [(4,), (160,), (64, 32, 7)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's; test_kernels.py has the kernel on a card")
@pytest.mark.usefixtures("interpreter")
def test_the_int8_kernel_has_them_all(monkeypatch, count, ranks):
    """Both halves in Triton, from int8 rows alone; the term is off by what rounding x and A to 8 bits costs."""
    int8_matmul = pytest.importorskip("qwen_edit.kernels.int8_matmul").int8_matmul
    monkeypatch.setattr("qwen_edit.quantize._product", lambda *_: int8_matmul)
    qkv = [linear("int8") for _ in range(3)]
    pack(qkv)
    x = torch.randn(count, IN, generator=torch.Generator().manual_seed(2))
    both = {qkv[2 - i]: [low_rank(rank, rank + i, 0.7) for rank in ranks[: 1 + i]] for i in range(2)}
    channels = ExtraChannels()
    forward = Forward(None, adapters=both, channels=channels)  # pyright: ignore[reportArgumentType]
    (op,) = forward.operands(*qkv)
    assert forward.prologue([op]) == {"quantize": INT8, "keep": False, "room": 0}
    without = product(x, channels, {}, *qkv)
    term = product(x, channels, both, *qkv) - without
    assert torch.equal(term[:, :OUT], torch.zeros(count, OUT)), "of the linear that has none"
    assert error(term, exact(x, *qkv, adapters=both) - exact(x, *qkv)) < TERM_BOUNDS["int8"]
    assert torch.equal(product(x, channels, {}, *qkv), without)


def test_strength(form, qkv, x):
    channels = ExtraChannels()
    adapter = low_rank(4, 1)
    for scale in (1.0, 0.25, -3.0, 1.0):
        adapters = {qkv[2]: [LowRank(adapter.a, adapter.b, scale, adapter.derived)]}
        assert error(product(x, channels, adapters, *qkv), exact(seen(x, form), *qkv, adapters=adapters)) < BOUNDS[form]


def test_a_weight_that_was_replaced(form, x):
    """As after a native LoRA patched it, or the model left the card and came back."""
    module = linear(form)
    channels, adapters = ExtraChannels(), {module: [low_rank(4, 1)]}
    product(x, channels, adapters, module)
    new = torch.randn(OUT, IN) / 20
    module.weight = nn.Parameter(new if form is None else quantize_weight(new, form), requires_grad=False)
    assert error(product(x, channels, adapters, module), exact(seen(x, form), module, adapters=adapters)) < BOUNDS[form]


def test_weights_can_be_moved_while_they_are_in_use(form, x):
    module = linear(form)
    channels, adapters = ExtraChannels(), {module: [low_rank(4, 1)]}
    before = product(x, channels, adapters, module)
    module._apply(torch.clone)  # what moving to another device does: swaps the tensors, or their data
    assert torch.equal(product(x, channels, adapters, module), before)
    channels.clear()
    assert torch.equal(product(x, channels, adapters, module), before)


def test_nothing_keeps_a_lora_that_has_left(x):
    module = linear("fp8")
    channels, adapter = ExtraChannels(), low_rank(4, 1)
    product(x, channels, {module: [adapter]}, module)
    adapter.derived.clear()
    assert all(source() is None for laid in channels._laid.values() for source in laid.sources)
    expected = exact(x, module, adapters={module: [adapter]})
    assert error(product(x, channels, {module: [adapter]}, module), expected) < BOUNDS["fp8"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rows_without_room_are_added_to_the_term(x, scale, monkeypatch):
    monkeypatch.setattr("qwen_edit.linear.low_rank", lambda *_: pytest.fail("added afterwards"))
    module = linear(None)
    adapters = {module: [low_rank(4, 1), low_rank(9, 2, scale)]}
    forward = Forward(None, adapters=adapters, channels=ExtraChannels())  # pyright: ignore[reportArgumentType]
    (op,) = forward.operands(module)
    rows = REFERENCE.quantize_rows(x, None, room=op.room)  # the attention's own output
    assert error(forward.multiply(op, rows, x.dtype), exact(x, module, adapters=adapters)) < 1e-6


def test_a_form_that_only_its_library_multiplies(x):
    module = linear(None)
    module.weight = nn.Parameter(quantize_weight(module.weight, "w4a4"), requires_grad=False)
    adapters = {module: [low_rank(4, 1)]}
    forward = Forward(None, adapters=adapters, channels=ExtraChannels())  # pyright: ignore[reportArgumentType]
    (op,) = forward.operands(module)
    assert op.channels is None
    assert forward.prologue([op])["room"] == 0


def test_an_adapter_that_the_input_follows_closely(x):
    """The channel is then far larger than a random input makes it, but still within fp8's range."""
    module = linear("fp8")
    x[0] += 0.6 * x[1]
    adapters = {module: [LowRank(x[1:2].clone() / 8, torch.randn(OUT, 1) / 50, 1.0)]}
    got = product(x, ExtraChannels(), adapters, module)
    assert error(got[:1], exact(x[:1], module, adapters=adapters)) < BOUNDS["fp8"]


def test_an_adapter_too_strong_for_fp8_is_added_afterwards(x):
    module = linear("fp8")
    adapters = {module: [LowRank(torch.randn(4, IN), torch.randn(OUT, 4), 1.0)]}
    forward = Forward(None, adapters=adapters, channels=ExtraChannels())  # pyright: ignore[reportArgumentType]
    (op,) = forward.operands(module)
    assert op.channels is None
    assert forward.prologue([op])["keep"]


@pytest.mark.parametrize("name", ["pencil_sketch", "warm_film"])
@torch.no_grad()
def test_trained_loras_are_as_exact_as_added_afterwards(name):
    """The demo model in 8 bits with its LoRAs, one forward, against the same in floats."""
    source = transformer_from_folder(DEMO)
    file = read_lora(DEMO / "loras" / f"qwen_edit_demo_{name}.safetensors", source.config)
    layers = {n: LowRank(layer.a.float(), layer.b.float(), layer.scale) for n, layer in file.layers.items()}
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2 * 64, 64, generator=generator)
    text = torch.randn(1, 20, source.config["joint_attention_dim"], generator=generator)
    results = {}
    for form in (None, "fp8", "int8"):
        with torch.device("meta"):
            model = QwenEditTransformer.from_config(dict(source.config))
        prepare(model, form)
        fill(model, source, torch.float32, torch.device("cpu"))
        for channels in (None, ExtraChannels()):
            model.channels = channels
            model.adapters = {model.get_submodule(name): [adapter] for name, adapter in layers.items()}
            shapes = [[(1, 8, 8), (1, 8, 8)]]
            results[form, channels is not None] = model(
                latents, text, None, torch.tensor([0.5]), shapes, return_dict=False
            )[0]
    exact = results[None, False].double()
    assert error(results[None, True], exact) < 1e-5
    for form in ("fp8", "int8"):
        assert error(results[form, False], exact) > 0.001
        assert error(results[form, True], exact) < 1.15 * error(results[form, False], exact)
