"""Quantized weights: how exact, how large, of which layers, and that reading and editing keep them what they are."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qwen_edit import quantize
from qwen_edit.checkpoints import transformer_from_file
from qwen_edit.filling import fill
from qwen_edit.kernels.reference import quantize_rows
from qwen_edit.quantize import (
    FORMATS,
    FP8,
    INT8,
    FourBitLinear,
    QuantizedLinear,
    QuantizedTensor,
    StaysInRam,
    activation_dtype,
    keeps_full_precision,
    plain_parts,
    prepare,
    quantize_weight,
    quantized_matmul,
    replace_parts,
    stored_bytes,
    with_row_scales,
)
from qwen_edit.transformer import QwenEditTransformer

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
CONFIG = dict(num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=48)
BLOCK_LINEARS = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_mlp.net.{part}" for stream in ("img", "txt") for part in ("0.proj", "2")),
]
MODULATION = ["img_mod.1", "txt_mod.1"]
# Relative errors of normally distributed weights; the least is what the bits of a form can't beat.
ERRORS = {"fp8": (0.02, 0.03), "int8": (0.005, 0.009), "w4a4": (0.08, 0.14), "w4a8": (0.06, 0.085)}


def randn(*shape, dtype=FP32, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def meta_model(**changes) -> QwenEditTransformer:
    with torch.device("meta"):
        return QwenEditTransformer(**(CONFIG | changes), zero_cond_t=True).eval()


def in_blocks(names) -> set[str]:
    return {f"transformer_blocks.{index}.{name}" for index in range(2) for name in names}


def of_class(model: nn.Module, kind: type) -> set[str]:
    kinds = (QuantizedLinear, FourBitLinear) if kind is QuantizedLinear else (kind,)
    return {name for name, module in model.named_modules() if type(module) in kinds}


# Forms


@pytest.mark.parametrize("depth", [64, 192, 256])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
@pytest.mark.parametrize("form", FORMATS)
def test_what_quantizing_costs(form, dtype, depth):
    weight = randn(96, depth, dtype=dtype) * torch.logspace(-3, 1, 96)[:, None].to(dtype)  # a scale for each channel
    quantized = quantize_weight(weight, form)
    back = quantized.dequantize()
    assert (quantized.dtype, back.dtype, quantized.shape) == (dtype, dtype, weight.shape)
    least, most = ERRORS[form]
    errors = [error(a, b) for a, b in zip(back, weight, strict=True)]
    assert least < sum(errors) / len(errors) < most
    assert max(errors) < 2 * most
    assert quantized.nbytes == weight.numel() * {"w4a4": 0.5, "w4a8": 4.5 / 8}.get(form, 1)


@pytest.mark.parametrize("form", ["fp8", "int8", "w4a8"])
def test_zero_channels_stay_zero(form):
    weight = randn(8, 64)
    weight[3] = 0
    assert (quantize_weight(weight, form).dequantize()[3] == 0).all()


def in_layout(layout: str, **options) -> QuantizedTensor:
    return QuantizedTensor.from_float(randn(96, 64), layout, **options)


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (in_layout(quantize.ROWWISE_FP8), FP8),
        (in_layout("TensorCoreFP8Layout"), FP8),  # ComfyUI's files: one scale
        (in_layout(quantize.INT8_LAYOUT, per_channel=True), INT8),
        (in_layout(quantize.INT8_LAYOUT), INT8),
        (in_layout(quantize.INT8_LAYOUT, per_channel=True, convrot=True, convrot_groupsize=64), None),
        (in_layout(quantize.INT8_LAYOUT, per_channel=True).t(), None),
        (in_layout(quantize.W4A4_LAYOUT, convrot_groupsize=64), None),
    ],
    ids=["fp8", "fp8, one scale", "int8", "int8, one scale", "rotated int8", "transposed int8", "4 bit"],
)
def test_plain_parts_are_all_that_a_weight_is(weight, dtype):
    parts = plain_parts(weight)
    if dtype is None:
        assert parts is None
        return
    data, scale = parts
    assert (data.dtype, data.shape, scale.dtype, scale.shape) == (dtype, weight.shape, FP32, (len(data), 1))
    assert scale.is_contiguous()
    assert activation_dtype(weight._layout_cls) == dtype
    assert torch.allclose(data.float() * scale, weight.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["TensorCoreFP8Layout", quantize.INT8_LAYOUT])
def test_a_scale_for_each_row_is_made_once(layout):
    weight = in_layout(layout)
    made = with_row_scales(weight)
    (data, scale), (same_data, same_scale) = plain_parts(made), plain_parts(made)
    assert data is same_data is weight._qdata
    assert scale is same_scale
    assert torch.equal(scale, plain_parts(weight)[1])
    assert with_row_scales(made) is made
    assert weight._params.scale.numel() == 1


def test_forms_that_only_their_library_multiplies_keep_their_scales():
    weight = in_layout(quantize.W4A4_LAYOUT, convrot_groupsize=64)
    assert with_row_scales(weight) is weight


def test_activations_of_foreign_products_are_not_ours():
    assert activation_dtype(quantize.W4A4_LAYOUT) is None
    assert activation_dtype("TensorCoreNVFP4Layout") is None


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_replaced_parts_are_read_where_they_lie(form):
    weight = quantize_weight(randn(96, 64), form)
    before, (data, scale) = weight.dequantize(), (part.clone() for part in plain_parts(weight))
    replace_parts(weight, data, scale)
    assert torch.equal(weight.dequantize(), before)
    assert [part.data_ptr() for part in plain_parts(weight)] == [data.data_ptr(), scale.data_ptr()]


# Layers


@pytest.mark.parametrize("form", [None, *FORMATS])
def test_prepare_touches_the_blocks_linears_only(form):
    model = meta_model()
    before = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    prepare(model, form)
    quantized = in_blocks(BLOCK_LINEARS) if form is not None else set()
    assert of_class(model, QuantizedLinear) == quantized
    assert of_class(model, StaysInRam) == in_blocks(MODULATION)
    assert {name for name in of_class(model, nn.Linear) if name.startswith("transformer_blocks.")} == (
        in_blocks(BLOCK_LINEARS) - quantized
    )
    assert {model.get_submodule(name).form for name in quantized} <= {form}
    assert {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()} == before
    assert all(p.is_meta for p in model.parameters())
    assert not any(model.get_submodule(name).weight.requires_grad for name in quantized)


def test_linears_whose_sizes_a_product_does_not_take_stay_as_they_are():
    down = [name for name in BLOCK_LINEARS if name.endswith("2")]  # four times as deep
    for channels, form, expected in ((96, "fp8", BLOCK_LINEARS), (96, "w4a4", down), (24, "int8", [])):
        model = meta_model(attention_head_dim=channels, axes_dims_rope=(channels - 16, 8, 8))
        prepare(model, form)
        assert of_class(model, QuantizedLinear) == in_blocks(expected), (channels, form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("channels", [32, 64, 96])
def test_every_linear_that_prepare_chooses_can_be_quantized(form, channels):
    model = meta_model(attention_head_dim=channels, axes_dims_rope=(channels - 16, 8, 8))
    prepare(model, form)
    for name in of_class(model, QuantizedLinear):
        module = model.get_submodule(name)
        quantize_weight(randn(module.out_features, module.in_features), form)


@pytest.mark.parametrize(
    "name", ["img_in", "txt_in", "proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1"]
)
def test_what_lies_outside_the_blocks_keeps_full_precision(name):
    meta_model().get_submodule(name)  # it is there
    assert keeps_full_precision(name)


def test_within_the_blocks_the_modulation_keeps_full_precision():
    assert all(keeps_full_precision(name) for name in in_blocks(MODULATION))
    assert not any(keeps_full_precision(name) for name in in_blocks(BLOCK_LINEARS))


# The modulation stays in RAM


def test_the_modulation_stays_when_the_model_moves():
    linear = StaysInRam(8, 4)
    weight, on_card = linear.weight, SimpleNamespace(device=torch.device("cuda", 0))
    assert linear._apply(lambda tensor: on_card) is linear
    assert linear.weight is weight
    assert linear.to("cpu").weight is weight
    assert linear.to(torch.float64).weight.dtype == torch.float64
    assert linear.to("meta").weight.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card_everything_else_moves():
    model = meta_model()
    prepare(model, None)
    model = nn.Module.to_empty(model, device="cpu")
    nn.Module.to(model, "cuda")
    stayed = {name for name, p in model.named_parameters() if p.device == CPU}
    assert stayed == {f"{name}.{leaf}" for name in in_blocks(MODULATION) for leaf in ("weight", "bias")}


# Reading


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file with random weights, and its model."""
    model = QwenEditTransformer(**CONFIG, zero_cond_t=True).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.07, generator=generator)
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            parameter.add_(1)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return transformer_from_file(path, zero_cond_t=True), model


def velocity(model) -> torch.Tensor:
    return model(
        hidden_states=randn(1, 32, 64, seed=1),
        encoder_hidden_states=randn(1, 9, 48, seed=2),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4), (1, 4, 4)]],
        return_dict=False,
    )[0]


@pytest.mark.parametrize(
    ("form", "least", "most"),
    [(None, 0, 0), ("fp8", 0.01, 0.04), ("int8", 0.003, 0.015), ("w4a4", 0.05, 0.2), ("w4a8", 0.03, 0.15)],
)
@torch.inference_mode()
def test_a_model_read_in_a_form_computes_nearly_the_same(source, form, least, most):
    file, unquantized = source
    model = meta_model()
    prepare(model, form)
    promised = stored_bytes(model)
    fill(model, file, FP32, CPU)
    assert {n for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)} == {
        f"{name}.weight" for name in of_class(model, QuantizedLinear)
    }
    assert not any(p.requires_grad for p in model.parameters())
    assert least <= error(velocity(model), velocity(unquantized)) <= most
    assert math.isclose(stored_bytes(model), promised, rel_tol=0.03)
    assert stored_bytes(model) == sum(p.nbytes for n, p in model.named_parameters() if "_mod." not in n)


def test_stored_bytes_are_those_of_the_blocks_that_were_asked_for():
    sizes = {}
    for form in (None, *FORMATS):
        model = meta_model().to(BF16)
        prepare(model, form)
        sizes[form] = stored_bytes(model)
    weights = sum(math.prod(meta_model().get_submodule(n).weight.shape) for n in in_blocks(BLOCK_LINEARS))
    modulation = sum(p.numel() for n, p in meta_model().named_parameters() if "_mod." in n)
    assert sizes[None] == 2 * (sum(p.numel() for p in meta_model().parameters()) - modulation)
    assert sizes["fp8"] == sizes["int8"] == sizes[None] - weights
    assert math.isclose(sizes[None] - sizes["w4a4"], 2 * weights * 0.74, rel_tol=1e-4)
    assert math.isclose(sizes[None] - sizes["w4a8"], 2 * weights * (1 - 4.5 / 16), rel_tol=1e-4)


# Editing


@pytest.mark.parametrize("form", FORMATS)
def test_a_patcher_edits_a_float_copy(form):
    """As ComfyUI's patcher does: a copy in fp32, ``convert_weight``, the patch, ``set_weight``."""
    module = QuantizedLinear(64, 96, dtype=BF16).requires_grad_(False)
    module.form = form
    module.weight = nn.Parameter(quantize_weight(randn(96, 64, dtype=BF16), form), requires_grad=False)
    kept, layout, before = module.weight, module.weight._layout_cls, module.weight.dequantize()
    copied = module.convert_weight(module.weight.to(FP32), inplace=True)
    assert not isinstance(copied, QuantizedTensor)
    assert copied.dtype == FP32
    assert error(copied, before) < 0.005
    edited = copied + 0.5 * randn(96, 64, seed=1)

    returned = module.set_weight(edited, return_weight=True)
    assert module.weight is kept
    module.set_weight(edited, seed=3)
    for weight in (returned, module.weight):
        assert (type(weight), weight._layout_cls, weight.dtype) == (QuantizedTensor, layout, BF16)
        assert error(weight.dequantize(), edited) < ERRORS[form][1]
    assert torch.equal(kept.dequantize(), before)
    assert not module.weight.requires_grad


def test_unquantized_weights_are_converted_as_they_are():
    weight = randn(4, 4)
    assert QuantizedLinear(4, 4).convert_weight(weight) is weight


# Products


@pytest.mark.parametrize(
    ("capability", "has_fp8", "has_int8"),
    [((7, 0), False, False), ((7, 5), False, True), ((8, 6), False, True), ((8, 9), True, True), ((9, 0), True, True)],
)
def test_the_product_of_a_card(monkeypatch, capability, has_fp8, has_int8):
    int8 = object()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(quantize, "_int8_product", lambda device, dtype, with_addend: int8)
    monkeypatch.setattr(quantize, "fp8_problem", lambda device: None)
    product, card = quantize._product.__wrapped__, torch.device("cuda", 0)
    for dtype in (BF16, torch.float16, FP32):
        assert product(card, FP8, dtype) is (quantize._scaled_mm if has_fp8 and dtype != FP32 else None)
        assert product(card, INT8, dtype) is (int8 if has_int8 else None)
    assert product(CPU, INT8, BF16) is None


def test_without_triton_int8_is_pytorchs_product(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwen_edit.kernels.int8_matmul", None)
    assert quantize._int8_product(CPU, BF16, False) is quantize._int_mm


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("product", [quantize._int_mm, quantized_matmul])
@pytest.mark.parametrize("form", [FP8, INT8])
@pytest.mark.parametrize("rows", [33, 5])
def test_products_without_a_card(form, product, biased, rows):
    if form == FP8 and product is quantize._int_mm:
        pytest.skip("for int8")
    x, weight = quantize_rows(randn(rows, 64), form), quantize_rows(randn(48, 64, seed=1), form)
    bias = randn(48, dtype=BF16, seed=2) if biased else None
    dequantized = [rows.data.double() * rows.scale for rows in (x, weight)]
    expected = dequantized[0] @ dequantized[1].T + (0 if bias is None else bias.double())
    for out in (None, torch.full((rows, 48), torch.nan, dtype=BF16)):
        y = product(x.data, x.scale, weight.data, weight.scale, bias, BF16, out)
        assert y is out or out is None
        assert y.dtype == BF16
        assert error(y, expected) < 0.003
