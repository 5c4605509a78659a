"""Transformers in GGUF files: what the header says, packed weights in the forward, damaged and foreign files."""

import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from qwen_edit.attention import resolve
from qwen_edit.blocks import BLOCK_TYPES
from qwen_edit.checkpoints import (
    ZERO_COND_MARKER,
    block_bytes,
    check_tensors,
    read_header,
    read_headers,
    transformer_from_file,
)
from qwen_edit.filling import fill, places
from qwen_edit.kernels import REFERENCE
from qwen_edit.linear import pack, unpacked_operand
from qwen_edit.packed import PACKED, PackedInRam, PackedLinear, keep_packed, unpatch
from qwen_edit.quantize import FORMATS, MISSING, QuantizedTensor, drop_weights, prepare, stored_bytes
from qwen_edit.reading import mapped, read_ahead
from qwen_edit.streaming import BlockStream
from qwen_edit.transformer import QwenEditTransformer

pytest.importorskip("gguf")
import gguf_files

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
CONFIG = dict(num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=64)
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
NONLINEAR = ("IQ4_NL", "IQ4_XS")


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return QwenEditTransformer(**CONFIG, zero_cond_t=True).state_dict()


def weights_as(kind: str):
    """Matrices in this format, vectors in float32."""
    return lambda name, tensor: kind if tensor.ndim == 2 else "F32"


def loaded(path, form, dtype=FP32, **options):
    source = transformer_from_file(path, **options)
    with torch.device("meta"):
        model = QwenEditTransformer.from_config(dict(source.config)).eval()
    check_tensors(model, source)
    model = torch.nn.Module.to(model, dtype)
    prepare(model, form)
    keep_packed(model, source.blocks, form)
    model.requires_grad_(False)
    fill(model, source, dtype, CPU)
    return model


def run(model, dtype=FP32):
    model.attention, model.kernels = resolve("pytorch", CPU, dtype, 128), REFERENCE
    g = torch.Generator().manual_seed(1)
    tokens, text = torch.randn(1, 24 + 12, 64, generator=g), torch.randn(1, 7, 64, generator=g)
    inputs = dict(timestep=torch.tensor([0.7]), img_shapes=[[(1, 4, 6), (1, 3, 4)]])
    with torch.inference_mode():
        return model(tokens.to(dtype), text.to(dtype), **inputs, return_dict=False)[0].float()


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


# Whole models


@pytest.mark.parametrize("kind", [*PLAIN, *K_QUANTS, *NONLINEAR])
def test_a_model_in_each_format_is_that_of_its_dequantized_weights(tmp_path, state, kind):
    floats = gguf_files.write(tmp_path / "model-2511.gguf", state, weights_as(kind))
    save_file(floats, tmp_path / "model.safetensors")
    expected = run(loaded(tmp_path / "model.safetensors", None, zero_cond_t=True))
    packed = loaded(tmp_path / "model-2511.gguf", PACKED)
    linears = [m for m in packed.modules() if isinstance(m, torch.nn.Linear)]
    assert all(isinstance(m, PackedLinear) and m.weight.dtype == torch.uint8 for m in linears)
    assert isinstance(packed.transformer_blocks[0].img_mod[1], PackedInRam)
    assert off(run(packed), expected) < 1e-6
    unpacked = loaded(tmp_path / "model-2511.gguf", None)
    assert all(torch.equal(unpacked.state_dict()[name], value) for name, value in floats.items())
    assert off(run(unpacked), expected) < 1e-6


def mixed(name: str, tensor: torch.Tensor) -> str:
    """As llama.cpp's mixes do: values and projections finer, some layers not quantized."""
    if tensor.ndim == 1:
        return "F32"
    if "to_v" in name or "net.2" in name:
        return "Q6_K"
    if "img_in" in name or "proj_out" in name:
        return "BF16"
    return "F16" if "blocks.1.attn.to_k" in name else "Q4_K"


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_formats_are_mixed(tmp_path, state, dtype):
    floats = gguf_files.write(tmp_path / "model-2511.gguf", state, mixed, prefix="model.diffusion_model.")
    save_file(floats, tmp_path / "model.safetensors")
    packed = loaded(tmp_path / "model-2511.gguf", PACKED, dtype)
    assert {m.blocks.name for m in packed.modules() if isinstance(m, PackedLinear)} == {"Q4_K", "Q6_K"}
    expected = run(loaded(tmp_path / "model.safetensors", None, dtype, zero_cond_t=True), dtype)
    assert off(run(packed, dtype), expected) < (1e-6 if dtype == FP32 else 0.01)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("form", FORMATS)
def test_blocks_are_requantized_where_a_form_is_asked_for(tmp_path, state, form):
    floats = gguf_files.write(tmp_path / "model-2511.gguf", state, weights_as("Q8_0"))
    save_file(floats, tmp_path / "model.safetensors")
    model = loaded(tmp_path / "model-2511.gguf", form)
    same = loaded(tmp_path / "model.safetensors", form, zero_cond_t=True)
    block, its = model.transformer_blocks[0], same.transformer_blocks[0]
    assert isinstance(block.attn.to_q.weight, QuantizedTensor)
    assert torch.equal(block.attn.to_q.weight.dequantize(), its.attn.to_q.weight.dequantize())
    assert isinstance(block.img_mod[1], PackedInRam)  # no form quantizes it, so it may stay small
    assert off(run(model), run(same)) < 1e-6


def test_rows_narrower_than_a_block(tmp_path, state):
    kinds = {"img_in.weight": "Q4_K", "txt_in.weight": "Q6_K"}  # 64 columns
    floats = gguf_files.write(tmp_path / "model.gguf", state, lambda name, _: kinds.get(name, "F32"))
    packed = loaded(tmp_path / "model.gguf", PACKED)
    assert packed.img_in.weight.shape == (1, 256 * 64 // 256 * 144)
    for name in kinds:
        module = packed.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.dequantized(module.weight), floats[name])


# The life of packed weights


@pytest.fixture
def packed(tmp_path, state):
    gguf_files.write(tmp_path / "model-2511.gguf", state, mixed)
    return loaded(tmp_path / "model-2511.gguf", PACKED)


def test_sizes(tmp_path, state, packed):
    source = transformer_from_file(tmp_path / "model-2511.gguf")
    blocks = {n: t for n, t in state.items() if n.startswith("transformer_blocks.") and "_mod." not in n}
    assert block_bytes(source) == sum(2 * t.numel() for t in blocks.values())
    in_memory = stored_bytes(packed)
    expected = 0
    for name, tensor in state.items():
        kind = BLOCK_TYPES.get(mixed(name, tensor))
        if "_mod." not in name:
            expected += tensor.numel() * 4 if kind is None else tensor.numel() // kind.values * kind.nbytes
    assert in_memory == expected
    drop_weights(packed, FP32)
    assert packed.img_in.weight.is_meta
    assert stored_bytes(packed) == in_memory
    fill(packed, source, FP32, CPU)
    assert not any(p.is_meta for p in packed.parameters())


def test_read_ahead_gives_what_the_mapped_file_has(tmp_path, packed):
    source = transformer_from_file(tmp_path / "model-2511.gguf")
    wanted, _ = places(source, read_headers(source))
    in_file = dict(mapped(wanted))
    assert in_file.keys() == source.tensors.keys()
    for name, tensor in read_ahead(wanted, CPU):
        assert torch.equal(tensor, in_file[name])


def test_queries_keys_and_values_are_one_product(packed):
    first, second = (block.attn for block in packed.transformer_blocks)
    linears = [first.to_q, first.to_k, first.to_v]
    pack(linears)  # leaves them alone
    joint = unpacked_operand(linears)
    assert joint is not None
    assert joint.weight is not None
    for linear, weight in zip(linears, joint.weight.chunk(3), strict=True):
        assert torch.equal(weight, linear.dequantized(linear.weight))
    assert unpacked_operand([second.to_q, second.to_k, second.to_v]) is None  # to_k is in floats


def test_streamed_blocks(packed):
    expected = run(packed)
    packed.stream = BlockStream(packed.transformer_blocks)
    packed.stream.choose((0, 1), CPU)
    assert torch.equal(run(packed), expected)


def test_a_hooked_linear_is_called(packed):
    expected = run(packed)
    linear, calls = packed.transformer_blocks[0].attn.to_q, []
    linear.register_forward_hook(lambda *_: calls.append(1))
    assert off(run(packed), expected) < 1e-6
    assert calls


def test_a_patch_changes_the_floats_and_not_the_bytes(packed):
    expected = run(packed)
    linears = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    before = [m.weight.clone() for m in linears]
    for linear in linears:
        linear.patch = lambda weight: weight.mul_(1.5)
    assert off(run(packed), expected) > 0.01
    assert all(torch.equal(m.weight, weight) for m, weight in zip(linears, before, strict=True))
    unpatch(packed)
    assert torch.equal(run(packed), expected)


def test_a_patcher_gets_floats(packed):
    linear = packed.transformer_blocks[0].attn.to_q
    for dtype in (torch.float16, BF16, FP32):  # ComfyUI casts before it asks
        assert torch.equal(linear.convert_weight(linear.weight.to(dtype)), linear.dequantized(linear.weight))
    weight = torch.zeros(256, 256)
    assert torch.equal(linear.set_weight(weight, return_weight=True), weight)
    with pytest.raises(NotImplementedError):
        linear.set_weight(weight)


# Versions


@pytest.mark.parametrize(
    ("file", "name", "marked", "version", "by"),
    [
        ("qwen-image-edit-2511-Q8_0.gguf", None, False, True, "the file's name"),
        ("model.gguf", "Qwen Image Edit 2511", False, True, "the file's metadata"),
        ("model.gguf", None, True, True, "the file's mark"),
        ("qwen-image-edit-2509-Q8_0.gguf", None, False, False, "the file's name"),
        ("mix-20251103.gguf", None, False, False, None),
    ],
)
def test_the_version(tmp_path, state, file, name, marked, version, by):
    stored = dict(state) | ({ZERO_COND_MARKER: torch.zeros(1)} if marked else {})
    gguf_files.write(tmp_path / file, stored, weights_as("Q8_0"), name=name)
    source = transformer_from_file(tmp_path / file)
    assert source.config["zero_cond_t"] is version
    assert source.version_by == by
    for chosen in (True, False):
        source = transformer_from_file(tmp_path / file, chosen)
        assert source.config["zero_cond_t"] is chosen


# Files that are no good


def refused(path, *words: str) -> None:
    with pytest.raises(ValueError, match=r"^\[QE_WEIGHTS\]") as error:
        transformer_from_file(path)
    for word in (path.name, *words):
        assert word in str(error.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory, state) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    gguf_files.write(path, state, weights_as("Q4_0"), name="good")
    return path.read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "flux", "qwen2vl"])
def test_another_architecture(tmp_path, state, architecture):
    gguf_files.write(tmp_path / "other.gguf", state, weights_as("Q8_0"), architecture=architecture)
    hint = ["put it into models/text_encoders"] if architecture == "qwen2vl" else []
    refused(tmp_path / "other.gguf", repr(architecture), "needs the transformer of Qwen-Image-Edit", *hint)


def test_another_model_under_a_name_that_says_nothing(tmp_path):
    tensors = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(64, 64)}
    gguf_files.write(tmp_path / "flux.gguf", tensors, weights_as("Q8_0"), architecture="pig")
    refused(tmp_path / "flux.gguf", "found FLUX")


@pytest.mark.parametrize(("number", "name"), [(18, "IQ3_XXS"), (22, "IQ2_S"), (39, "MXFP4"), (99, "type 99")])
def test_a_format_that_is_not_decoded(tmp_path, good, number, name):
    """The number of ``proj_out.weight``'s format comes after its name and its two dimensions."""
    at = good.index(b"proj_out.weight") + len(b"proj_out.weight") + 4 + 16
    path = tmp_path / "iq.gguf"
    path.write_bytes(good[:at] + struct.pack("<I", number) + good[at + 4 :])
    refused(path, f"proj_out.weight is stored as {name}", "Q4_K")


BAD = {
    "empty": (b"", "does not end where the file does"),
    "html": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "Git LFS pointer"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "zip or pickle"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "does not begin as a GGUF file does"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + b"\0" * 100, "version 1"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 100, "version"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "1,152,921,504,606,846,976 tensors"),
    "long text": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40), "bytes of text"),
    "nested lists": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40,
        "type 9",
    ),
    "no tensors": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "unknown architecture (0 tensors)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_headers(tmp_path, kind):
    content, cause = BAD[kind]
    (tmp_path / "bad.gguf").write_bytes(content)
    refused(tmp_path / "bad.gguf", cause)


@pytest.mark.parametrize("keep", [3, 20, 100, 2000, 0.3, 0.999])
def test_truncated(tmp_path, good, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(good[: keep if isinstance(keep, int) else int(len(good) * keep)])
    refused(path, "cut off")


def test_tensors_that_overlap_or_repeat(tmp_path, good):
    for name in (b"proj_out.weight", b"img_in.weight"):
        at = good.index(name) + len(name) + 4 + 16 + 4
        moved = struct.unpack("<Q", good[at : at + 8])[0] + 32
        path = tmp_path / f"{name.decode()}.gguf"
        path.write_bytes(good[:at] + struct.pack("<Q", moved) + good[at + 8 :] + b"\0" * 64)
        refused(path, "lies where it can't")
    path = tmp_path / "twice.gguf"
    path.write_bytes(good.replace(b"blocks.1.attn.to_q.weight", b"blocks.0.attn.to_q.weight"))
    refused(path, "is there twice")


def test_a_shape_that_is_not_the_tensors(tmp_path, state):
    gguf_files.write(tmp_path / "model.gguf", state, lambda name, _: "Q4_K" if name == "img_in.weight" else "F32")
    content = (tmp_path / "model.gguf").read_bytes()
    at = content.index(b"orig_shape.img_in.weight") + len(b"orig_shape.img_in.weight") + 4 + 4 + 8
    for bad in (struct.pack("<ii", 255, 64), struct.pack("<ii", -256, -64)):
        (tmp_path / "bad.gguf").write_bytes(content[:at] + bad + content[at + 8 :])
        refused(tmp_path / "bad.gguf", "img_in.weight")


def attempt(path) -> tuple[dict, str | None]:
    try:
        return read_header(path), None
    except ValueError as e:
        return {}, str(e)


def test_random_changes_of_the_header_are_read_or_refused(tmp_path, good):
    """Whatever the bytes say: an answer within the file, or one ValueError."""
    rng = random.Random(0)
    end = good.index(b"proj_out.bias") + 64
    path = tmp_path / "changed.gguf"
    accepted = 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(4, end)
            content[at] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(content)
        header, problem = attempt(path)
        accepted += problem is None
        assert problem is None or problem.startswith("[QE_WEIGHTS] changed.gguf")
        assert all(0 < e["data_offsets"][0] <= e["data_offsets"][1] <= len(good) for e in header.values())
    assert 0 < accepted < 300


def test_gguf_under_another_name_is_named(tmp_path, good):
    (tmp_path / "model.safetensors").write_bytes(good)
    refused(tmp_path / "model.safetensors", "names that end in .gguf")
