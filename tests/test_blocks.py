"""ggml's block formats, PyTorch's and Triton's decoding, against the ``gguf`` package's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_edit.blocks import BLOCK_TYPES, dequantize, packed_shape, unpack_reference

pytest.importorskip("gguf")
pytest.importorskip("triton")
import gguf

from qwen_edit.kernels.unpack import unpack

CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CARD else torch.device("cpu")
each_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=list(BLOCK_TYPES))
both = pytest.mark.parametrize("unpacker", [unpack_reference, unpack], ids=["pytorch", "triton"])
# where float16 scales lie in a block; random bytes there would often be NaN or infinite
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
REPO = Path(__file__).parents[1]
BLOCKS = 37  # no multiple of what a program takes


def random_blocks(kind, rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, kind.nbytes), dtype=np.uint8)
    for at in HALVES[kind.name]:
        blocks[:, at : at + 2] = rng.normal(0, 1, (rows, 1)).astype(np.float16).view(np.uint8)
    return blocks


def theirs(blocks: np.ndarray, kind) -> torch.Tensor:
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    return torch.from_numpy(values).view(-1, kind.values)


@pytest.mark.usefixtures("interpreter")
@both
@each_type
def test_random_bytes(kind, unpacker):
    blocks = random_blocks(kind, BLOCKS)
    out = torch.full((BLOCKS, kind.values), torch.nan, device=DEVICE)
    unpacker(torch.from_numpy(blocks).to(DEVICE), kind, out)
    if unpacker is unpack_reference:
        assert torch.equal(out.cpu(), theirs(blocks, kind))
    else:  # a card may round d q - m once
        torch.testing.assert_close(out.cpu(), theirs(blocks, kind), rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@both
@each_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(kind, unpacker, dtype):
    blocks = torch.from_numpy(random_blocks(kind, BLOCKS))
    out = torch.full((BLOCKS, kind.values), torch.nan, dtype=dtype, device=DEVICE)
    unpacker(blocks.to(DEVICE), kind, out)
    # Triton's interpreter cuts numbers off where a card rounds them
    ulps = 1 if unpacker is unpack and not CARD else 0.5
    exact = theirs(blocks.numpy(), kind)
    tolerance = ulps * torch.finfo(dtype).eps * exact.abs() * 1.01 + 1e-5
    assert ((out.cpu().float() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_gguf_package_quantizes(name):
    weight = np.random.default_rng(1).normal(0, 0.05, (48, 96)).astype(np.float32)
    blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
    kind = BLOCK_TYPES[name]
    assert blocks.shape == packed_shape(weight.shape, kind)
    got = dequantize(torch.from_numpy(blocks), kind, torch.float32)
    assert got.shape == weight.shape
    assert torch.equal(got, theirs(blocks, kind).view(got.shape))
    assert np.abs(got.numpy() - weight).max() < 0.03


@each_type
def test_sizes_are_those_of_the_format(kind):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.values, kind.nbytes)


def test_large_weights_go_through_in_parts(monkeypatch):
    kind = BLOCK_TYPES["Q4_K"]
    blocks = torch.from_numpy(random_blocks(kind, 40)).view(8, -1)
    whole = dequantize(blocks, kind, torch.float32)
    monkeypatch.setattr("qwen_edit.blocks.VALUES_AT_ONCE", 3 * 256)
    out = torch.empty(40 * 256)
    assert dequantize(blocks, kind, torch.float32, out) is out
    assert torch.equal(out, whole.flatten())


def test_blocks_may_cross_the_ends_of_narrow_rows():
    kind = BLOCK_TYPES["Q4_K"]
    assert packed_shape((3072, 512), kind) == (3072, 288)
    assert packed_shape((3072, 64), kind) == (1, 3072 * 64 // 256 * 144)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qwen_edit.blocks import BLOCK_TYPES
from qwen_edit.kernels.unpack import _unpack_kernel, constants

for kind in BLOCK_TYPES.values():
    given = constants(kind)
    signature = {"blocks_ptr": "*u8", "out_ptr": "*fp16", "count": "i32"} | dict.fromkeys(given, "constexpr")
    places = {(3 + place,): value for place, value in enumerate(given.values())}
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1)}
    ptx = compile(ASTSource(_unpack_kernel, signature, places, aligned), target=GPUTarget("cuda", 75, 32)).asm["ptx"]
    print(kind.name, ptx.count("ld.global"))
"""


@pytest.mark.skipif(CARD, reason="the other tests run the kernels on the card")
def test_the_kernels_compile_for_a_card():
    """The interpreter takes more than the compiler does. A thread has 8 values; loads that each repeats would show."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=REPO, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    loads = dict(line.split() for line in done.stdout.splitlines())
    assert loads.keys() == BLOCK_TYPES.keys()
    assert max(map(int, loads.values())) < 24
