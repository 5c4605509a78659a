"""LoRAs in the weights: their sum to the last rounding, W back bit by bit, in every form and both ways of keeping W."""

import itertools
from pathlib import Path

import pytest
import torch

from qwen_edit.checkpoints import transformer_from_folder
from qwen_edit.extra_channels import ExtraChannels
from qwen_edit.filling import fill
from qwen_edit.fused_lora import FusedLoras, pays
from qwen_edit.host_memory import HostMemory
from qwen_edit.kernels import reference
from qwen_edit.linear import NO_ADAPTERS, HighRank, LowRank, pack
from qwen_edit.lora import read_lora
from qwen_edit.quantize import QuantizedTensor, in_its_form, prepare, quantize_weight
from qwen_edit.transformer import QwenEditTransformer

DEMO = Path(__file__).resolve().parents[1] / "demo_model"
SOURCE = transformer_from_folder(DEMO)
FILES = {
    name: read_lora(DEMO / "loras" / f"qwen_edit_demo_{name}.safetensors", SOURCE.config, torch.float32)
    for name in ("pencil_sketch", "warm_film")
}
FORMS = [None, "fp8", "int8"]


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of operations on small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Ram:
    """Plain memory; knows how much of it is held."""

    def __init__(self):
        self._memory = HostMemory()

    @property
    def held(self) -> int:
        return self._memory.nbytes

    def like(self, weight):
        return self._memory.allocate(weight.nbytes).view(weight.dtype).view(weight.shape)


def packed(model, channels: bool) -> QwenEditTransformer:
    for block in model.transformer_blocks:
        attn = block.attn
        pack([attn.to_q, attn.to_k, attn.to_v])
        pack([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
    model.channels = ExtraChannels() if channels else None
    return model


def demo(form: str | None) -> QwenEditTransformer:
    with torch.device("meta"):
        model = QwenEditTransformer.from_config(dict(SOURCE.config))
    prepare(model, form)
    fill(model, SOURCE, torch.float32, torch.device("cpu"))
    return packed(model, False)


def tiny(form: str | None, channels: bool = False) -> QwenEditTransformer:
    """Random weights, two blocks of width 64."""
    torch.manual_seed(0)
    model = QwenEditTransformer(
        num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(8, 12, 12)
    )
    state = model.state_dict()
    prepare(model, form)
    for name, parameter in state.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, torch.nn.Parameter(in_its_form(module, leaf, parameter), requires_grad=False))
    return packed(model.requires_grad_(False), channels)


def trained(model, *names: str, scale: float = 1.0) -> dict:
    """LoRAs of the demo model."""
    result: dict = {}
    for name in names:
        for module, term in FILES[name].layers.items():
            assert isinstance(term, LowRank)
            mine = LowRank(term.a.float(), term.b.float(), term.scale * scale)
            result.setdefault(model.get_submodule(module), []).append(mine)
    return result


def lora(model, seed: int, rank: int = 4) -> dict:
    """A random one on every linear of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, module in model.named_modules():
        if name.startswith("transformer_blocks.") and isinstance(module, torch.nn.Linear):
            a = torch.randn(rank, module.in_features, generator=generator) / 8
            b = torch.randn(module.out_features, rank, generator=generator) / 30
            result[module] = [LowRank(a, b, 1.0)]
    return result


def bits(model) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name, parameter in model.named_parameters():
        quantized = isinstance(parameter, QuantizedTensor)
        parts = (parameter._qdata, parameter._params.scale) if quantized else (parameter,)
        found[name] = [part.detach().contiguous().clone().view(torch.uint8) for part in parts]
    return found


def same(model, before) -> bool:
    now = bits(model)
    return all(torch.equal(a, b) for name, parts in before.items() for a, b in zip(now[name], parts, strict=True))


@torch.inference_mode()
def velocity(model, active=NO_ADAPTERS) -> torch.Tensor:
    model.adapters = active
    generator = torch.Generator().manual_seed(0)
    dtype = model.img_in.weight.dtype
    latents = torch.randn(1, 2 * 64, 64, generator=generator).to(dtype)
    text = torch.randn(1, 20, model.config.joint_attention_dim, generator=generator).to(dtype)
    shapes = [[(1, 8, 8), (1, 8, 8)]]
    return model(latents, text, None, torch.tensor([0.5]), shapes, return_dict=False)[0].float()


def beside(fused: FusedLoras, active: dict) -> dict:
    """What the forward still has to add."""
    return {module: each for module, each in active.items() if module not in fused.modules}


def change(got: torch.Tensor, without: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far the LoRAs' effect is from the wanted one, relative to it."""
    return ((got - wanted).norm() / (wanted - without).norm()).item()


@pytest.fixture(params=["on the card", "in RAM"])
def host(request) -> Ram | None:
    return Ram() if request.param == "in RAM" else None


# Requantized weights round the whole weight once more: the demo LoRAs' effect is of the size of that rounding.
@pytest.mark.parametrize(("form", "off"), [(None, 1e-4), ("fp8", 0.35), ("int8", 0.15)])
def test_the_effect_is_that_of_adding_them(form, off, host):
    model = demo(form)
    fused, active = FusedLoras(model), trained(model, "pencil_sketch", "warm_film", scale=0.7)
    without, before = velocity(model), bits(model)
    wanted = velocity(model, active)
    fused.fuse("both", active, host)
    assert change(velocity(model, beside(fused, active)), without, wanted) < off
    assert len(beside(fused, active)) < len(active) / 3, "only the modulation stays"
    assert not same(model, before)
    fused.restore()
    assert same(model, before)
    assert torch.equal(velocity(model), without)


@pytest.mark.parametrize("form", FORMS)
def test_both_ways_of_keeping_give_the_same_bits(form):
    found = []
    for host in (None, Ram()):
        model = tiny(form)
        fused = FusedLoras(model)
        fused.fuse("one", lora(model, 2), host)
        found.append(bits(model))
    assert all(torch.equal(a, b) for name in found[0] for a, b in zip(found[0][name], found[1][name], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_switches_leave_no_trace(form, host):
    """Fused and beside the weights in turn, with channels, and each stack as on the first time."""
    model = tiny(form, channels=True)
    fused, without, before = FusedLoras(model), velocity(model), bits(model)
    sketch, film = lora(model, 1), lora(model, 2)
    first: dict = {}
    stacks = itertools.cycle(
        [("sketch", sketch), ("film", film), (None, film), ("sketch", sketch), (None, NO_ADAPTERS)]
    )
    for number, (key, active) in enumerate(itertools.islice(stacks, 1000)):
        if key is None:
            fused.restore()
        else:
            fused.fuse(key, active, host)
        if number % 100 < 5:  # a forward takes longer than the rest
            now = velocity(model, beside(fused, active))
            assert torch.equal(now, first.setdefault(number % 5, now))
    fused.restore()
    assert same(model, before)
    assert torch.equal(velocity(model), without)


@pytest.mark.parametrize("form", [None, "fp8"])
def test_others_may_lie_beside_the_weights_meanwhile(form, host):
    """One in the weights, another in their spare columns, which get memory when it comes."""
    model = tiny(form, channels=True)
    fused, before = FusedLoras(model), bits(model)
    sketch, film = lora(model, 1), lora(model, 2)
    without, wanted = velocity(model), velocity(model, {m: [*sketch[m], *film[m]] for m in sketch})
    only_film = velocity(model, film)
    fused.fuse("sketch", sketch, host)
    rest = {m: beside(fused, sketch).get(m, []) + film.get(m, []) for m in {**beside(fused, sketch), **film}}
    assert change(velocity(model, rest), without, wanted) < (1e-4 if form is None else 0.4)
    fused.fuse("none of it", {}, host)
    assert torch.equal(velocity(model, film), only_film)
    fused.restore()
    assert same(model, before)


def test_weights_in_other_forms_keep_their_adapters():
    model = tiny("w4a4")
    active = lora(model, 1)
    fused, before = FusedLoras(model), bits(model)
    fused.fuse("one", active)
    assert same(model, before)
    assert beside(fused, active) == active


def test_running_out_of_memory_in_the_middle_leaves_everything_as_it_was(monkeypatch):
    model = tiny("int8")
    fused, before = FusedLoras(model), bits(model)
    host, calls = Ram(), itertools.count()
    add = reference.add_to_quantized

    def runs_out(*args):
        if next(calls) == 20:
            args[4].zero_()  # in the middle of a weight
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        add(*args)

    monkeypatch.setattr(model, "kernels", type("Kernels", (), {"add_to_quantized": staticmethod(runs_out)})())
    with pytest.raises(torch.OutOfMemoryError):
        fused.fuse("one", lora(model, 1), host)
    assert fused.key is None
    assert host.held == 0
    assert same(model, before)


def test_weights_in_ram_are_read_once_and_let_go_of():
    model, host = tiny(None), Ram()
    fused = FusedLoras(model)
    fused.fuse("one", lora(model, 1), host)
    size = host.held
    fused.fuse("other", lora(model, 2), host)
    assert host.held == size > 0
    assert fused.nbytes == 0
    fused.drop()
    assert host.held == 0


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_full_rank(form, host):
    """LoKr and LoHa whose product is as large as the weight: in it they cost nothing, beside it they are right too."""
    model = tiny(form)
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        return torch.randn(shape, generator=generator) / 10

    active = {}
    for block in model.transformer_blocks:
        linear = block.attn.to_q
        rows, columns = linear.out_features, linear.in_features
        kronecker = HighRank((numbers(4, 4), numbers(rows // 4, columns // 4)), 2.0)
        hadamard = HighRank((numbers(rows, 20), numbers(20, columns), numbers(rows, 20), numbers(20, columns)), -3.0)
        active[linear] = [kronecker, LowRank(numbers(4, columns), numbers(rows, 4), 0.3), hadamard]
        active[block.img_mod[1]] = [HighRank((numbers(2, 4), numbers(6 * rows // 2, columns // 4)), 0.1)]
    before = bits(model)
    fused, without = FusedLoras(model), velocity(model)
    wanted = velocity(model, active)
    fused.fuse("high", active, host)
    off = change(velocity(model, beside(fused, active)), without, wanted)
    assert off < {None: 1e-4, "fp8": 0.4, "int8": 0.2}[form]
    assert len(beside(fused, active)) == len(model.transformer_blocks)
    fused.restore()
    assert same(model, before)


def test_what_a_kronecker_and_a_hadamard_product_are():
    f = [torch.randn(3, 4), torch.randn(5, 2)]
    torch.testing.assert_close(HighRank(tuple(f), 2.0).difference(), 2 * torch.kron(*f))
    g = [torch.randn(6, 2), torch.randn(2, 8), torch.randn(6, 3), torch.randn(3, 8)]
    torch.testing.assert_close(HighRank(tuple(g), 0.5).difference(), 0.5 * (g[0] @ g[1]) * (g[2] @ g[3]))


@pytest.mark.parametrize(("form", "size"), [("fp8", 0.005), ("int8", 0.002)])
def test_what_is_added_to_8_bits_is_there_on_average(form, size):
    """A difference far below a step of the weights, which rounding to the nearest would lose."""
    torch.manual_seed(0)
    weight = quantize_weight(torch.randn(256, 512) / 20, form)
    data, scale = weight._qdata, weight._params.scale
    a, b = torch.randn(1, 512), torch.randn(256, 1) * size / 20
    out, out_scale = torch.empty_like(data), torch.empty_like(scale)
    reference.add_to_quantized(data, scale, a, b, out, out_scale)

    def share(changed: torch.Tensor) -> float:
        return (torch.sum((changed - weight.dequantize()) * (b @ a)) / torch.sum((b @ a) ** 2)).item()

    assert share(out.float() * out_scale) == pytest.approx(1, abs=0.05)
    assert share(quantize_weight(weight.dequantize() + b @ a, form).dequantize()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_what_nothing_is_added_to_keeps_its_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 120, (64, 96), generator=generator).to(torch.int8)
    data = data if dtype == torch.int8 else data.view(torch.float8_e4m3fn)
    scale = torch.rand(64, 1, generator=generator)
    a, b = torch.randn(3, 96, generator=generator), torch.zeros(64, 3)
    out, out_scale = torch.empty_like(data), torch.empty_like(scale)
    reference.add_to_quantized(data, scale, a, b, out, out_scale)
    assert torch.equal(out.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(out_scale, scale)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_row_that_outgrows_its_range_gets_a_larger_scale(dtype):
    data = torch.ones(4, 64).to(dtype)
    scale = torch.full((4, 1), 0.5)
    a, b = torch.zeros(1, 64), torch.tensor([[0.0], [1.0], [-1.0], [0.1]])
    a[0, 3] = 2000.0
    out, out_scale = torch.empty_like(data), torch.empty_like(scale)
    reference.add_to_quantized(data, scale, a, b, out, out_scale)
    grown = out.float() * out_scale
    assert torch.isfinite(grown).all()
    assert grown[:, 3] == pytest.approx((0.5 + 2000 * b[:, 0]).tolist(), rel=0.07)
    assert out_scale[0] == scale[0]
    assert (out_scale[1:] > scale[1:]).all() or dtype == torch.float8_e4m3fn


def test_what_pays():
    assert pays(steps=40, rank=32, tokens=4096)
    assert not pays(steps=2, rank=16, tokens=4096)
    assert not pays(steps=40, rank=4, tokens=64)


def test_the_owner_is_asked_every_step_and_does_nothing():
    model = tiny(None)
    fused, active = FusedLoras(model), lora(model, 1)
    fused.fuse("one", active)
    pointers = [p.data_ptr() for p in model.parameters()]
    fused.fuse("one", active)
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("rows", "width", "rank"), [(19, 300, 5), (16, 256, 40)])
def test_the_kernel_does_as_its_reference(interpreter, dtype, rows, width, rank):
    """But for the last bits of the difference, which lets the noise decide otherwise now and then."""
    triton_kernel = pytest.importorskip("qwen_edit.kernels.requantize").add_to_quantized
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    quantized = reference.quantize_rows(torch.randn(rows, width, generator=generator), dtype)
    assert quantized.scale is not None
    a, b = torch.randn(rank, width, generator=generator), torch.randn(rows, rank, generator=generator) / 50
    b[3] *= 40  # outgrows its range
    results = []
    for add in (reference.add_to_quantized, triton_kernel):
        wide = torch.zeros(rows, width + 48, dtype=dtype)  # as with spare columns
        out, scale = wide[:, :width].copy_(quantized.data).to(device), torch.empty(rows, 1, device=device)
        add(out, quantized.scale.to(device), a.to(device), b.to(device), out, scale)
        results.append((out.float() * scale).cpu())
    assert (~torch.isclose(*results, rtol=1e-5)).float().mean() < 0.01
    assert (results[0] - results[1]).norm() < 0.01 * results[0].norm()
