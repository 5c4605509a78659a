"""Each fused operation, Triton's and PyTorch's, against its formula in float64.

The Triton kernels run on a card, or without one in Triton's interpreter (see ``conftest.py``), which cuts numbers off
where a card rounds them. Memory that an operation allocates starts as NaN, so that what it leaves unwritten shows.
"""

from functools import partial

import pytest
import torch

from qwen_edit.kernels import RANK_STEP, Addend, Modulation, Update, reference
from qwen_edit.kernels.contract import Rows
from qwen_edit.quantize import FP8, INT8

pytest.importorskip("triton")
from qwen_edit.kernels import fused
from qwen_edit.kernels.int8_matmul import FEW_ROWS_TILES, NARROW_TILES, TILES, int8_matmul

pytestmark = pytest.mark.usefixtures("interpreter", "poisoned")

CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CARD else torch.device("cpu")
needs_card = pytest.mark.skipif(not CARD, reason="needs a CUDA card")
both = pytest.mark.parametrize("module", [reference, fused], ids=["pytorch", "triton"])
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
CHANNELS = 96  # no power of two

# Relative errors of rounding to these dtypes; plain PyTorch rounds more often on the way.
BOUNDS = {FP32: 1e-5, FP16: 0.001, BF16: 0.004, FP8: 0.035, INT8: 0.02}
LOOSER = {(reference, BF16): 0.01, (reference, FP16): 0.002}
if not CARD:
    LOOSER |= {(fused, BF16): 0.01, (fused, FP8): 0.1}


@pytest.fixture
def poisoned(monkeypatch):
    def poison(allocate):
        def poisoned(*arguments, **options):
            memory = allocate(*arguments, **options)
            memory.view(torch.uint8).fill_(0x80 if memory.dtype == INT8 else 0xFF)  # -128, which no scale gives; NaN
            return memory

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def randn():
    """Random numbers that differ from call to call, and not from run to run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=FP32: torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm()).item()


def dequantized(rows: Rows) -> torch.Tensor:
    if rows.scale is None:
        return rows.data
    assert (rows.scale.shape, rows.scale.dtype) == ((len(rows.data), 1), FP32)
    assert not (rows.data.view(torch.int8) == -128).any() or rows.data.dtype == FP8
    return rows.data.double() * rows.scale.double()


def assert_close(module, rows: Rows, expected: torch.Tensor, dtype: torch.dtype, quantize=None, keep=False) -> None:
    """``rows`` are ``expected`` as far as the dtypes can tell, and of the form that was asked for."""
    found = {dtype, quantize or dtype}
    bound = max(LOOSER.get((module, d), BOUNDS[d]) for d in found)
    assert rows.data.dtype == (quantize or dtype)
    assert rows.data.is_contiguous()
    assert error(dequantized(rows), expected) < bound
    assert (rows.full is not None) == keep
    if keep:
        assert rows.full.dtype == dtype
        assert error(rows.full, expected) < LOOSER.get((module, dtype), BOUNDS[dtype])


# norm_modulate


def vectors(modulation: Modulation, tokens: int) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate ``[B, L, C]`` in float64."""
    before, after = modulation.table.double()[modulation.rows]
    late = torch.arange(tokens, device=DEVICE)[None, :, None] >= modulation.split
    return torch.where(late, after[:, None], before[:, None]).chunk(3, dim=-1)


def modulated(x: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    shift, scale, _ = vectors(modulation, x.shape[1])
    centred = x - x.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + scale) + shift).flatten(0, 1)


def modulation(randn, split: int, dtype=FP32) -> Modulation:
    """Of three timesteps, the second item's unlike the first's; rows strided, as half a block's are."""
    table = randn(3, 4 * CHANNELS, dtype=dtype)[:, : 3 * CHANNELS]
    return Modulation(table, torch.tensor([[0, 1], [2, 1]], device=DEVICE), split)


@both
@pytest.mark.parametrize("split", [0, 3, 5, 9], ids=["before all", "inside", "at the end", "beyond"])
@pytest.mark.parametrize("updated", [False, True])
def test_norm_modulate(module, randn, split, updated):
    now, then = modulation(randn, split), modulation(randn, 5 - min(split, 5))
    x, y = randn(2, 5, CHANNELS), randn(2, 5, CHANNELS)
    expected = x.double() + vectors(then, 5)[2] * y.double() * updated
    rows = module.norm_modulate(x, now, Update(y, then) if updated else None, eps=EPS)
    assert error(x, expected) < 1e-6
    assert_close(module, rows, modulated(expected, now), FP32)


@both
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("quantize", [None, FP8, INT8])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_norm_modulate_in_every_form(module, randn, dtype, quantize, keep):
    keep = keep and quantize is not None
    around = modulation(randn, 2, dtype)
    x, y = randn(2, 3, CHANNELS, dtype=dtype), randn(2, 3, CHANNELS, dtype=dtype)
    expected = x.double() + vectors(around, 3)[2] * y.double()
    rows = module.norm_modulate(x, around, Update(y, around), eps=EPS, quantize=quantize, keep=keep)
    assert_close(module, rows, modulated(expected, around), dtype, quantize, keep)


@both
def test_norm_modulate_reads_and_changes_only_its_part_of_a_larger_buffer(module, randn):
    """As in the last block, whose reference tokens are dropped."""
    around = modulation(randn, 2)
    x, y = randn(2, 7, CHANNELS), randn(2, 6, CHANNELS)
    before = x.clone()
    expected = before[:, :3].double() + vectors(around, 3)[2] * y[:, :3].double()
    rows = module.norm_modulate(x[:, :3], around, Update(y[:, :3], around), eps=EPS)
    assert_close(module, rows, modulated(expected, around), FP32)
    assert error(x[:, :3], expected) < 1e-6
    assert torch.equal(x[:, 3:], before[:, 3:])


@both
def test_norm_modulate_takes_a_table_without_gates(module, randn):
    """The last normalization's; the rows of an update's table are then of another width."""
    then = modulation(randn, 1)
    final = Modulation(randn(3, 2 * CHANNELS), then.rows, 2)
    x, y = randn(2, 3, CHANNELS), randn(2, 3, CHANNELS)
    expected = x.double() + vectors(then, 3)[2] * y.double()
    rows = module.norm_modulate(x, final, Update(y, then), eps=EPS)
    padded = Modulation(torch.nn.functional.pad(final.table, (0, CHANNELS)), final.rows, 2)
    assert_close(module, rows, modulated(expected, padded), FP32)


@both
def test_fp16_is_clamped_where_the_residual_overflows(module, randn):
    around = modulation(randn, 2, FP16)
    around.table[:, 2 * CHANNELS :] = 1
    x = randn(2, 3, CHANNELS, dtype=FP16)
    x[0, 0, :2], x[1, 2, 0] = torch.tensor([60000.0, -60000.0], device=DEVICE, dtype=FP16), 60000
    expected = (2 * x.double()).clamp(-65504, 65504)
    rows = module.norm_modulate(x, around, Update(x.clone(), around), eps=EPS)
    assert error(x, expected) < 1e-3
    assert_close(module, rows, modulated(expected, around), FP16)


# gelu and quantize_rows


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@both
@pytest.mark.parametrize("quantize", [None, FP8, INT8])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_gelu(module, randn, dtype, quantize):
    x = 3 * randn(4, 300, dtype=dtype)[:, :200]  # rows lie apart
    before = x.clone()
    for keep in {False, quantize is not None}:
        rows = module.gelu(x, quantize=quantize, keep=keep)
        assert_close(module, rows, exact_gelu(x), dtype, quantize, keep)
    assert torch.equal(x, before)


@both
@pytest.mark.parametrize("quantize", [FP8, INT8])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_quantize_rows(module, randn, dtype, quantize):
    """Rows of very different size: each has its own scale, which maps its largest number to the dtype's."""
    sizes = torch.tensor([[1e-3], [1.0], [500.0]], device=DEVICE)
    x = (randn(3, 300) * sizes).to(dtype)[:, :200]
    for keep in (False, True):
        rows = module.quantize_rows(x, quantize, keep=keep)
        assert (rows.full is x) == keep
        largest = dequantized(rows).abs().amax(1)
        torch.testing.assert_close(largest, x.double().abs().amax(1), rtol=0.01, atol=0)
        if quantize == INT8:  # the nearest whole number
            assert ((dequantized(rows) - x.double()).abs() <= 0.501 * rows.scale).all()
        for row, expected in zip(dequantized(rows), x.double(), strict=True):
            assert error(row, expected) < max(LOOSER.get((module, d), BOUNDS[d]) for d in (dtype, quantize))


@both
def test_unquantized_rows_are_the_tensor_itself(module, randn):
    x = randn(3, 8)
    assert module.quantize_rows(x, None, keep=True) == Rows(x)


@both
@pytest.mark.parametrize("quantize", [FP8, INT8])
def test_a_row_of_zeros_stays_zero(module, randn, quantize):
    x = randn(3, 40, dtype=FP16)
    x[1] = 0
    for rows in (module.quantize_rows(x, quantize), module.gelu(x, quantize=quantize)):
        assert rows.scale.isfinite().all()
        assert (rows.scale > 0).all()
        assert (dequantized(rows)[1] == 0).all()
    nothing = Modulation(torch.zeros(1, 3 * CHANNELS, device=DEVICE), torch.zeros(2, 1, dtype=int, device=DEVICE), 1)
    rows = module.norm_modulate(torch.zeros(1, 2, CHANNELS, device=DEVICE), nothing, eps=EPS, quantize=quantize)
    assert (dequantized(rows) == 0).all()


@both
@pytest.mark.parametrize("room", [1, 48, 200])
@pytest.mark.parametrize("quantize", [None, FP8, INT8])
def test_room_behind_each_row(module, randn, quantize, room):
    x, table = randn(1, 5, CHANNELS), modulation(randn, 2)
    each = [partial(module.norm_modulate, x, table, eps=EPS), partial(module.gelu, x[0])]
    if quantize is not None:
        each.append(partial(module.quantize_rows, x[0], quantize))
    for operation in each:
        options = {} if operation.func is module.quantize_rows else {"quantize": quantize}
        dense, rows = operation(**options), operation(**options, room=room)
        assert (dense.room, rows.room) == (0, room)
        assert torch.equal(rows.data, dense.data)
        assert rows.data.stride(0) % 128 == 0
        held = rows.data.untyped_storage().nbytes() // rows.data.element_size()
        assert held - 4 * rows.data.stride(0) >= CHANNELS + room
        assert rows.scale is None or torch.equal(rows.scale, dense.scale)


@both
@pytest.mark.parametrize("rank", [16, 48, 128])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP8])
def test_append_low_rank(module, randn, dtype, rank):
    width, count = 200, 37
    rows = randn(count, 384).to(dtype)[:, :width]
    x = rows.clone().double()
    down, gain = randn(rank, width).to(dtype), randn(rank)
    gain[0] = 0
    if dtype == FP8:
        gain[1] = 1e6  # too large for it
    if dtype != FP8:
        ones = module.append_low_rank(rows, down, None)[:, width:].clone()
    got = module.append_low_rank(rows, down, gain)
    assert torch.equal(got[:, :width].double(), x), "the rows themselves stay"
    expected = x @ down.double().T * gain
    if dtype != FP8:
        assert error(ones.double(), x @ down.double().T) < BOUNDS[dtype]
    if dtype == FP8:
        expected = expected.clamp(-448, 448)
    assert error(got[:, width:].double(), expected) < max(LOOSER.get((module, dtype), 0), BOUNDS[dtype])


# qk_norm_rope

HEADS, DIM, TEXT, IMAGE = 3, 32, 4, 9


def normed_rotated(x: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    turn = torch.complex(*rope.double())[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


@both
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("part", [slice(0, TEXT), slice(TEXT, TEXT + IMAGE)], ids=["text", "image"])
@pytest.mark.parametrize("source", ["in place", "one product", "three products"])
def test_qk_norm_rope(module, randn, dtype, part, source):
    """Into a part of the joint buffer, whose other part stays as it is."""
    tokens = part.stop - part.start
    joint = torch.empty((2, TEXT + IMAGE, 3, HEADS, DIM), dtype=dtype, device=DEVICE)
    out, qkv = joint[:, part], randn(2, tokens, 3, HEADS, DIM, dtype=dtype)
    norm_q, norm_k = randn(DIM, dtype=dtype), randn(DIM, dtype=dtype)
    angles = randn(tokens, DIM // 2)
    rope = torch.stack([angles.cos(), angles.sin()])
    expected = [normed_rotated(qkv[:, :, i], norm, rope) for i, norm in enumerate((norm_q, norm_k))]
    if source == "in place":
        out.copy_(qkv)
        q, k, v = out.unbind(2)
    elif source == "one product":
        q, k, v = qkv.unbind(2)
    else:
        q, k, v = (x.contiguous() for x in qkv.unbind(2))
    module.qk_norm_rope(q, k, v, norm_q, norm_k, rope, out, eps=EPS)
    bound = LOOSER.get((module, dtype), BOUNDS[dtype])
    assert error(out[:, :, 0], expected[0]) < bound
    assert error(out[:, :, 1], expected[1]) < bound
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])
    rest = torch.ones(TEXT + IMAGE, dtype=torch.bool, device=DEVICE)
    rest[part] = False
    assert joint[:, rest].isnan().all()


# int8_matmul


@pytest.mark.parametrize("tile", [None, (16, 32, 32, 4, 2)], ids=["of the card", "many small"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_int8_matmul(randn, tile, biased, dtype):
    """Rows, columns and depth that fill no tile; with small tiles more of them than share the cache."""
    count, width, depth = 150, 80, 112
    x, weight = (reference.quantize_rows(randn(n, depth), INT8) for n in (count, width))
    bias = randn(width, dtype=dtype) if biased else None
    expected = dequantized(x) @ dequantized(weight).T + (0 if bias is None else bias.double())
    around = torch.empty((count, width + 16), dtype=dtype, device=DEVICE)
    for out in (None, around[:, :width]):
        y = int8_matmul(x.data, x.scale, weight.data, weight.scale, bias, dtype, out, tile=tile)
        assert y.dtype == dtype
        assert error(y, expected) < LOOSER.get((fused, dtype), BOUNDS[dtype])
    assert y.data_ptr() == around.data_ptr()
    assert around[:, width:].isnan().all()


@pytest.mark.parametrize("tile", [None, (16, 32, 32, 4, 2)], ids=["of the card", "small"])
@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_int8_matmul_with_a_low_rank_addend(randn, tile, modules, steps, dtype):
    """Tiles that have columns of one module, of two and of three."""
    if dtype == BF16 and not CARD:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as whole numbers")
    count, width, depth, rank = 37, 48, 112, steps * RANK_STEP
    x, weight = (reference.quantize_rows(randn(n, depth), INT8) for n in (count, modules * width))
    bias = randn(modules * width, dtype=dtype)
    addend = Addend(randn(count, modules * rank, dtype=dtype), randn(modules * rank, width, dtype=dtype))
    without = dequantized(x) @ dequantized(weight).T + bias.double()
    terms = torch.einsum(
        "mir,irn->min",
        addend.t.double().unflatten(1, (modules, rank)),
        addend.up.double().unflatten(0, (modules, rank)),
    )
    around = torch.empty((count, modules * width + 16), dtype=dtype, device=DEVICE)
    for out in (None, around[:, : modules * width]):
        y = int8_matmul(x.data, x.scale, weight.data, weight.scale, bias, dtype, out, addend, tile)
        assert error(y, without + terms.flatten(1)) < LOOSER.get((fused, dtype), BOUNDS[dtype])
    assert around[:, modules * width :].isnan().all()
    plain = without.float()
    reference.add_low_rank(plain, addend)
    assert error(plain, without + terms.flatten(1)) < 1e-5


@needs_card
@pytest.mark.parametrize(
    ("card", "tile"), [each for tiles in (TILES, NARROW_TILES, FEW_ROWS_TILES) for each in tiles.items()]
)
def test_the_tile_changes_no_bit(randn, card, tile):
    if torch.cuda.get_device_capability()[0] < card:
        pytest.skip("for later cards")
    x, weight = (reference.quantize_rows(randn(n, 1024), INT8) for n in (700, 384))
    arguments = (x.data, x.scale, weight.data, weight.scale, randn(384), BF16, None)
    assert torch.equal(int8_matmul(*arguments, tile=tile), int8_matmul(*arguments))


# Launched again


@needs_card
def test_on_a_card_every_launch_uses_its_own_values(randn):
    """Three rounds over calls that differ in sizes, splits, dtypes and alignment; the later two launch what is compiled."""
    for _ in range(3):
        for dtype in (FP32, BF16):
            for tokens, split in ((5, 2), (5, 4), (16, 1), (17, 16), (1, 1)):
                around = modulation(randn, split, dtype)
                for offset in (0, 1):
                    memory = randn(2 * tokens * CHANNELS + 1, dtype=dtype)
                    x = memory[offset : offset + 2 * tokens * CHANNELS].view(2, tokens, CHANNELS)
                    expected = modulated(x.double() * (1 + vectors(around, tokens)[2]), around)
                    rows = fused.norm_modulate(x, around, Update(x.clone(), around), eps=EPS)
                    assert_close(fused, rows, expected, dtype)
                    assert_close(fused, fused.gelu(x.flatten(0, 1)), exact_gelu(x.flatten(0, 1)), dtype)
