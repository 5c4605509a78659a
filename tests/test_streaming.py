"""Blocks that stay in RAM: which, in what order they come, and that the result is that of resident ones, bit for bit.

Runs on the CPU and, where there is one, on the card, where the copies really overlap.
"""

import gc
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from qwen_edit.attention import resolve
from qwen_edit.blocks import BLOCK_TYPES
from qwen_edit.extra_channels import ExtraChannels
from qwen_edit.host_memory import HostMemory
from qwen_edit.kernels import resolve_kernels
from qwen_edit.linear import RESIDENT, LowRank, operand, pack, packed
from qwen_edit.modulation import ModulationCache
from qwen_edit.packed import PACKED, PackedLinear, keep_packed
from qwen_edit.quantize import FORMATS, MISSING, QuantizedTensor, StaysInRam, activations, in_its_form, prepare
from qwen_edit.streaming import BUFFERS, BlockStream, spread, streamed_blocks
from qwen_edit.transformer import QwenEditTransformer

CARD = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"))
DEVICES = ["cpu", CARD]
FORMS = [None, *FORMATS, PACKED]
LAYERS = 4
CONFIG = dict(num_layers=LAYERS, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=64)
Q8_0 = BLOCK_TYPES["Q8_0"]


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI builds, moves and runs models; torch refuses weights that were made in it and moved outside of it."""
    with torch.inference_mode():
        yield


def model_of(form: str | None, device: str) -> Any:
    """All blocks on the device, nothing streamed."""
    model = random_model(form, device)
    model.stream, model.adapters, model.channels = None, {}, None
    for block in model.transformer_blocks:
        block.to(device)
    return model


@lru_cache
def random_model(form: str | None, device: str) -> QwenEditTransformer:
    """Random weights in this form on the device, ready to run; the modulation stays in RAM."""
    if form is not None and MISSING is not None:
        pytest.skip(MISSING)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options: dict[str, Any] = CONFIG
    with torch.device("meta"):
        model = QwenEditTransformer(**options, zero_cond_t=True).eval()
    nn.Module.to(model, dtype)
    prepare(model, form)
    linears = [n for n, m in model.named_modules() if n.startswith("transformer_blocks.") and isinstance(m, nn.Linear)]
    keep_packed(model, {f"{n}.weight": Q8_0 for n in linears if "_mod." not in n} if form == PACKED else {}, PACKED)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, PackedLinear) and name == "weight":
                made = torch.randint(0, 256, parameter.shape, dtype=torch.uint8, generator=generator)
                scales = torch.randn(parameter.numel() // Q8_0.nbytes, generator=generator) * 1e-3
                made.view(-1, Q8_0.nbytes)[:, :2] = scales.half().view(torch.uint8).view(-1, 2)
            else:
                floats = torch.randn(parameter.shape, generator=generator) * 0.05 + (parameter.ndim == 1)
                made = in_its_form(module, name, floats.to(dtype))
            there = made if isinstance(module, StaysInRam) else made.to(device)
            setattr(module, name, nn.Parameter(there, requires_grad=False))
    for block in model.transformer_blocks:
        pack([block.attn.to_q, block.attn.to_k, block.attn.to_v])
        pack([block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj])
    model.attention = resolve("pytorch", torch.device(device), dtype, 128)
    model.kernels = resolve_kernels(torch.device(device), dtype, activations(form, torch.device(device), dtype))
    model.modulation = ModulationCache()
    return model


def run(model: Any, seed: int = 1) -> torch.Tensor:
    device, dtype = model.img_in.weight.device, model.img_in.weight.dtype
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(1, 32, 64, generator=generator), torch.randn(1, 9, 64, generator=generator)
    shapes = [[(1, 4, 4), (1, 4, 4)]]
    given = latents.to(device, dtype), text.to(device, dtype)
    return model(*given, None, torch.tensor([0.5]), shapes, return_dict=False)[0].clone()


def locked(address: int, nbytes: int):
    runtime: Any = torch.cuda.cudart()
    return (lambda: runtime.cudaHostUnregister(address)) if runtime.cudaHostRegister(address, nbytes, 1) == 0 else None


def stream_of(model: Any, streamed, device: str) -> Any:
    """Make the model stream these blocks to the device."""
    model.stream = BlockStream(model.transformer_blocks, HostMemory(locked if device == "cuda" else None))
    model.stream.choose(streamed, torch.device(device))
    for index in streamed:
        model.stream.lay(index)
    return model.stream


def parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for m in module.modules() if not isinstance(m, StaysInRam) for p in m.parameters(recurse=False)]


def plain(parameter) -> torch.Tensor:
    return parameter._qdata if isinstance(parameter, QuantizedTensor) else parameter


# Which blocks


@pytest.mark.parametrize("count", [1, 2, 7, 20, 59, 60])
def test_streamed_blocks_are_spread_evenly(count):
    chosen = spread(60, count)
    assert len(set(chosen)) == count
    around = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + 60], strict=True)]
    assert max(around) - min(around) <= 1
    assert min(chosen) >= 0
    assert max(chosen) < 60


def test_as_many_blocks_stay_as_fit_beside_the_buffers():
    sizes = [10] * 60
    assert streamed_blocks(sizes, 600) == ()
    assert len(streamed_blocks(sizes, 599)) == 3  # with fewer, the buffers would take more than they save
    assert len(streamed_blocks(sizes, 300)) == 60 - 30 + BUFFERS
    for room in (0, 0.1, 20):
        assert streamed_blocks(sizes, room) == tuple(range(60))


def test_blocks_of_different_sizes():
    sizes = [10, 30, 10, 30, 10, 30]
    for room in range(60, 120, 5):
        chosen = streamed_blocks(sizes, room)
        left = sum(sizes) - sum(sizes[i] for i in chosen)
        assert left + BUFFERS * max(sizes[i] for i in chosen) <= room or len(chosen) == len(sizes)


# What it computes


@pytest.mark.parametrize("streamed", [(0, 1, 2, 3), (0, 2, 3), (1,)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_result_is_that_of_resident_blocks(device, form, streamed):
    model = model_of(form, device)
    expected = [run(model, seed) for seed in range(2)]
    stream = stream_of(model, streamed, device)
    homes = parameters(model)
    for seed in (0, 1, 0):
        assert torch.equal(run(model, seed), expected[seed])
        assert all(a is b for a, b in zip(parameters(model), homes, strict=True))
    places = [{p.device.type for p in parameters(block)} for block in model.transformer_blocks]
    assert places == [{"cpu" if index in streamed else device} for index in range(LAYERS)]
    stream.choose((), torch.device(device))
    for block in model.transformer_blocks:
        block.to(device)
    assert torch.equal(run(model, 0), expected[0])


@pytest.mark.parametrize("form", [None, "fp8", "int8"])
@pytest.mark.parametrize("device", DEVICES)
def test_queries_keys_and_values_are_one_product_in_a_buffer(device, form):
    stream = stream_of(model_of(form, device), (1, 2), device)
    with stream:
        stream.before(1)
        attn: Any = stream.blocks[1].attn
        for linears in ((attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)):
            joint = packed([operand(RESIDENT, linear) for linear in linears])
            assert joint is not None
            assert joint.weight is not None
            assert joint.weight.device.type == device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("form", "channels"),
    [("fp8", None), ("int8", ExtraChannels())],
    ids=["after the product", "in the product, which needs no columns in the buffers"],
)
def test_a_lora_is_added(device, form, channels):
    model = model_of(form, device)
    model.channels = channels
    linear = model.transformer_blocks[1].attn.to_out[0]
    make = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 128, generator=make), torch.randn(128, 4, generator=make)
    like = model.img_in.weight
    model.adapters = {linear: [LowRank(a.to(like), b.to(like), 0.1)]}
    expected = run(model)
    stream_of(model, (0, 1, 2), device)
    model.channels = ExtraChannels()
    assert torch.equal(run(model), expected)
    model.adapters = {}
    assert not torch.equal(run(model), expected)


# In what order, and through which memory


def test_each_block_is_copied_ahead_of_its_turn():
    """With copies that are done at once, the buffers hold the block whose turn it is and the one after it."""
    stream = stream_of(model_of(None, "cpu"), (0, 2, 3), "cpu")
    weights = {index: stream.blocks[index].attn.to_q.weight.clone() for index in stream.streamed}

    def held() -> list[int]:
        size = weights[0].nbytes  # of the first weight in a buffer
        found = [buffer.memory[:size].view(torch.float32) for buffer in stream._buffers]
        return [i for i, w in weights.items() if any(torch.equal(f, w.flatten()) for f in found)]

    expected = {0: [0, 2], 1: [2, 3], 2: [2, 3], 3: [0, 3]}
    for _ in range(3):
        with stream:
            for index in range(LAYERS):
                stream.before(index)
                assert held() == expected[index]
        assert held() == [0, 2]  # for the next forward


@pytest.mark.parametrize("device", DEVICES)
def test_two_buffers_serve_all_blocks_and_a_block_is_one_copy(device):
    model = model_of("fp8", device)
    stream = stream_of(model, tuple(range(LAYERS)), device)
    assert stream.buffer_bytes == 0
    addresses = set()
    before = stream.before
    stream.before = lambda index: (
        before(index),
        addresses.add(plain(stream.blocks[index].attn.to_q.weight).data_ptr()),
    )
    run(model)
    assert len(addresses) == BUFFERS
    assert stream.buffer_bytes == BUFFERS * stream.bytes_per_forward / LAYERS
    assert all(len(known.pieces) == 1 for known in stream._known.values())
    copied = stream.copied
    run(model)
    assert stream.copied - copied == sum(len(p) for known in stream._known.values() for _, p in known.pieces)
    stream.close()
    assert stream.buffer_bytes == 0
    run(model)


# What can happen to it


@pytest.mark.parametrize(("at", "error"), [(0, KeyboardInterrupt), (1, RuntimeError), (3, KeyboardInterrupt)])
@pytest.mark.parametrize("device", DEVICES)
def test_after_an_interrupt_everything_is_as_before(device, at, error):
    model = model_of("fp8", device)
    expected = run(model)
    stream_of(model, (0, 2, 3), device)
    homes, block, calls = parameters(model), model.transformer_blocks[at], []

    def interrupted(*_):
        calls.append(1)
        raise error

    handle = block.attn.to_out[0].register_forward_pre_hook(interrupted)
    for _ in range(2):
        with pytest.raises(error):
            run(model)
        assert all(a is b for a, b in zip(parameters(model), homes, strict=True))
    handle.remove()
    assert len(calls) == 2
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model), expected)


def test_a_forward_that_starts_over_gets_the_right_blocks():
    """As after running out of memory: once more from the first block, without leaving."""
    model = model_of(None, "cpu")
    stream = stream_of(model, (0, 2, 3), "cpu")
    first = {index: stream.blocks[index].attn.to_q.weight.clone() for index in range(LAYERS)}
    with stream:
        for index in (0, 1, 2, 0, 1, 2, 3, 0):
            stream.before(index)
            assert torch.equal(stream.blocks[index].attn.to_q.weight, first[index])


@pytest.mark.parametrize("form", [None, "fp8", "w4a4"])
@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_a_patcher_changes_and_restores(device, form):
    """It may put other parameters into the modules, on the card or in RAM; only those are moved."""
    model = model_of(form, device)
    stream = stream_of(model, (1, 2), device)
    expected = run(model)
    linear = model.transformer_blocks[1].img_mlp.net[0].proj
    original, bias = linear.weight, linear.bias
    for place in (device, "cpu"):
        changed = original.dequantize() if form else original.detach().clone()
        changed = in_its_form(linear, "weight", changed.to(place) * 1.5)
        linear.weight = nn.Parameter(changed, requires_grad=False)
        stream.reset()
        got = run(model)
        assert not torch.equal(got, expected)
        assert linear.weight.device.type == "cpu"
        assert stream.memory.holds(plain(linear.weight))
        assert linear.bias is bias
        stream.choose((), torch.device(device))
        for block in model.transformer_blocks:
            block.to(device)
        assert torch.equal(run(model), got)  # as the resident weight
        stream = stream_of(model, (1, 2), device)
        linear.weight, bias = original, linear.bias
        stream.reset()
        assert torch.equal(run(model), expected)


def test_memory_is_unlocked_with_its_last_view():
    held = {}

    def lock(address, nbytes):
        held[address] = nbytes
        return lambda: held.pop(address)

    memory = HostMemory(lock)
    block = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    stream = BlockStream(nn.ModuleList([block]), memory)
    stream.choose((0,), torch.device("cpu"))
    stream.lay(0)
    assert sum(held.values()) == memory.nbytes == sum(p.nbytes for p in block.parameters())
    stream.lay(0)
    assert len(held) == 1  # it lies there already
    with stream:
        stream.before(0)
    kept = block[0].weight
    stream.close()
    block.to("meta")
    gc.collect()
    assert len(held) == 1
    del kept
    gc.collect()
    assert not held
    assert memory.nbytes == 0


def test_memory_that_can_not_be_locked_serves_too():
    model = model_of(None, "cpu")
    expected = run(model)
    model.stream = BlockStream(model.transformer_blocks, HostMemory(lambda *_: None))
    model.stream.choose((0, 1), torch.device("cpu"))
    assert torch.equal(run(model), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_copies_are_ordered_with_what_computes():
    """Large blocks, so that a copy or a product that does not wait for the other is seen: each block multiplies by its
    own number."""
    blocks: Any = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(9)).requires_grad_(False)
    for number, block in enumerate(blocks):
        nn.init.eye_(block.weight).mul_(1 + number / 8)
    stream = BlockStream(blocks, HostMemory(locked))
    stream.choose(range(9), torch.device("cuda"))
    x = torch.randn(2048, 4096, device="cuda")
    expected = x.clone()
    for number in range(9):
        expected = expected * (1 + number / 8)
    for _ in range(20):
        y = x
        with stream:
            for index, block in enumerate(blocks):
                stream.before(index)
                y = block(y)
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    rate = stream.bandwidth()
    assert rate is not None
    assert rate > 1e9
