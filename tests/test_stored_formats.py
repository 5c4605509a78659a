"""Quantized single files: what is told from their headers, and what the weights become."""

import json

import pytest
import torch
from safetensors.torch import save_file
from stored_files import CONFIG, VARIANTS, float_state, in_block, in_layout, metadata_of, scaled, write

from qwen_edit import quantize, stored_weights
from qwen_edit.checkpoints import ZERO_COND_MARKER, block_bytes, check_tensors, transformer_from_file
from qwen_edit.filling import fill
from qwen_edit.precision import Precision, keep_stored_form
from qwen_edit.quantize import FP8, plain_parts, prepare, stored_bytes
from qwen_edit.stored_formats import FORMATS, StoredWeight
from qwen_edit.stored_weights import as_quantized, families, keep_stored
from qwen_edit.transformer import QwenEditTransformer

CPU = torch.device("cpu")
LINEAR = "transformer_blocks.1.attn.to_q"


def meta_model(source):
    with torch.device("meta"):
        return QwenEditTransformer.from_config(dict(source.config))


def read(tmp_path, variant: str, prefix: str = "", **more):
    write(tmp_path / "f.safetensors", variant, prefix, **more)
    return transformer_from_file(tmp_path / "f.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantized_file_tells_its_configuration(tmp_path, variant):
    source = read(tmp_path, variant)
    check_tensors(meta_model(source), source)
    assert dict(source.config) == CONFIG | {"in_channels": 64, "out_channels": 16, "zero_cond_t": True}
    linears = [t for n, t in float_state().items() if in_block(n, t) and "_mod." not in n]
    norms_and_biases = [t for n, t in float_state().items() if n.startswith("transformer_blocks.") and t.ndim == 1]
    norms_and_biases = [t for t in norms_and_biases if t.shape[0] != 6 * 256]
    assert block_bytes(source) == 2 * sum(t.numel() for t in linears + norms_and_biases)


@pytest.mark.parametrize("variant", ["fp8 scaled, old", "fp8 by metadata", "int8_convrot"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_whatever_the_prefix_and_the_other_parts_of_the_file(tmp_path, variant, prefix):
    alone = read(tmp_path, variant)
    source = read(tmp_path, variant, prefix, **{"vae.decoder.conv1.weight": torch.zeros(1, dtype=torch.int32)})
    assert source.tensors.keys() == alone.tensors.keys()
    assert [w.family for w in source.stored.values()] == [w.family for w in alone.stored.values()]
    assert source.config == alone.config


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("fp8 plain", {"fp8": 24}),
        ("fp8 mixed", {"fp8": 8}),
        ("int8_convrot", {"int8_convrot": 24}),
        ("nvfp4 and fp8", {"nvfp4": 8, "fp8": 16}),
    ],
)
def test_families_count_the_blocks_linears(tmp_path, variant, expected):
    assert families(read(tmp_path, variant).stored) == expected


# Versions


@pytest.mark.parametrize(
    ("name", "metadata", "marked", "is_2511", "by"),
    [
        ("any", None, True, True, "the file's mark"),
        ("qwen_2509", {"title": "2509"}, True, True, "the file's mark"),
        ("qwen_image_edit_2511_bf16", None, False, True, "the file's name"),
        ("Qwen-Image-Edit-2509", None, False, False, "the file's name"),
        ("any", {"modelspec.title": "Qwen Image Edit 2511"}, False, True, "the file's metadata"),
        ("qwen_2511", {"title": "made from 2509"}, False, False, "the file's metadata"),
        ("any", {"prompt": "qwen_image_edit_2511.safetensors"}, False, False, None),
        ("2509 to 2511", None, False, False, None),
        ("any", None, False, False, None),
    ],
)
def test_2511_is_told_from_2509(tmp_path, name, metadata, marked, is_2511, by):
    state = float_state() | ({ZERO_COND_MARKER: torch.zeros(0)} if marked else {})
    path = tmp_path / f"{name}.safetensors"
    save_file(state, path, metadata=metadata)
    source = transformer_from_file(path)
    assert (source.config["zero_cond_t"], source.version_by) == (is_2511, by)
    chosen = transformer_from_file(path, zero_cond_t=not is_2511)
    assert (chosen.config["zero_cond_t"], chosen.version_by) == (not is_2511, "model_version")


# What is not understood


def _described(state, **description):
    state[f"{LINEAR}.comfy_quant"] = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def _as(dtype, **description):
    def change(state):
        state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"].to(dtype)
        if description:
            _described(state, **description)

    return change


def _bad_json(state):
    state[f"{LINEAR}.comfy_quant"] = torch.tensor(list(b"{'format'"), dtype=torch.uint8)


def _block_scaled(state):
    state[f"{LINEAR}.weight"], _ = scaled(state[f"{LINEAR}.weight"], FP8)
    state[f"{LINEAR}.weight_scale"] = torch.ones(256, 2)


def _scaled_float(state):
    state[f"{LINEAR}.scale_weight"] = torch.tensor(2.0)


def _smoothed_int8(state):
    _as(torch.int8, format="int8_tensorwise")(state)
    state |= {f"{LINEAR}.weight_scale": torch.tensor(1.0), f"{LINEAR}.pre_quant_scale": torch.ones(256)}


def _rotated_oddly(state):
    _as(torch.int8, format="int8_tensorwise", convrot=True, convrot_groupsize=48)(state)
    state[f"{LINEAR}.weight_scale"] = torch.tensor(1.0)


BAD = {
    "no description": (_as(torch.int8), r"to_q.weight has dtype I8 and no description"),
    "unknown format": (_as(torch.int8, format="int3"), r"to_q.weight has the format 'int3'"),
    "no format": (_as(torch.int8, bits=8), r"to_q.weight has the format None"),
    "other dtype": (_as(torch.uint8, format="int8_tensorwise"), r"to_q.weight is U8 \[256, 256\], but called int8"),
    "no scale": (_as(torch.int8, format="int8_tensorwise"), r"to_q.weight is called .*, but weight_scale is missing"),
    "scale of blocks": (_block_scaled, r"to_q.weight \[256, 256\] has a weight_scale \[256, 2\]"),
    "scale of a float": (_scaled_float, r"to_q.weight_scale belongs to no quantized weight"),
    "smoothing": (_smoothed_int8, r"to_q.weight \[256, 256\] has a pre_quant_scale"),
    "rotation": (_rotated_oddly, r"to_q.weight is rotated in groups of 48"),
    "JSON": (_bad_json, r"to_q.comfy_quant is no JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_understood_is_named(tmp_path, kind):
    change, message = BAD[kind]
    state = float_state()
    change(state)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=rf"\[QE_WEIGHTS\] odd.safetensors: .*{message}.*This loader understands"):
        transformer_from_file(tmp_path / "odd.safetensors")


def test_damaged_metadata_are_named(tmp_path):
    save_file(float_state(), tmp_path / "odd.safetensors", metadata={"_quantization_metadata": "[]"})
    with pytest.raises(ValueError, match=r"\[QE_WEIGHTS\] odd.safetensors: its _quantization_metadata can't be read"):
        transformer_from_file(tmp_path / "odd.safetensors")


def test_packed_weights_of_another_shape_are_named(tmp_path):
    state = in_layout(float_state(), "w4a4")
    state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"].repeat(1, 2)
    save_file(state, tmp_path / "odd.safetensors")
    source = transformer_from_file(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"to_q.weight is \[256, 256\], the model needs \[256, 128\]"):
        check_tensors(meta_model(source), source)


def test_a_quantized_file_needs_comfy_kitchen(tmp_path, monkeypatch):
    write(tmp_path / "f.safetensors", "fp8 plain")
    monkeypatch.setattr("qwen_edit.checkpoints.MISSING", "the package comfy-kitchen is not installed")
    with pytest.raises(ValueError, match=r"f.safetensors is quantized, but the package comfy-kitchen is not installed"):
        transformer_from_file(tmp_path / "f.safetensors")


# Weights


@pytest.mark.parametrize("scale", [None, torch.tensor(0.3), torch.tensor([0.3]), torch.rand(96), torch.rand(96, 1)])
@pytest.mark.parametrize(("format", "dtype"), [("float8_e4m3fn", FP8), ("int8_tensorwise", torch.int8)])
def test_plain_weights_go_to_the_kernels_as_they_are(format, dtype, scale):
    """At the released width: the numbers are the file's own, the scale is one for each row."""
    data = (torch.randn(96, 3072) * 20).to(dtype)
    scales = {} if scale is None else {"scale": scale}
    weight = as_quantized(StoredWeight(format, {}), data, scales, (96, 3072), torch.bfloat16)
    values, rows = plain_parts(weight)
    assert values.data_ptr() == data.data_ptr()
    assert rows.shape == (96, 1)
    assert rows.dtype == torch.float32
    assert torch.equal(rows.flatten(), torch.as_tensor(1.0 if scale is None else scale).flatten().expand(96))
    assert weight.dtype == torch.bfloat16


def test_e5m2_loses_next_to_nothing_as_e4m3():
    """It has 2 bits where e4m3 has 3, so only numbers below 2^-15 of the row's largest change."""
    floats = torch.randn(96, 3072) * torch.logspace(-6, 3, 96)[:, None]
    data = floats.to(torch.float8_e5m2)
    weight = as_quantized(
        StoredWeight("float8_e5m2", {}), data, {"scale": torch.tensor(0.7)}, (96, 3072), torch.float32
    )
    expected = data.float() * 0.7
    assert plain_parts(weight)[0].dtype == FP8
    off = (weight.dequantize() - expected).abs() / expected.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert off.max() < 2**-17
    zeros = as_quantized(StoredWeight("float8_e5m2", {}), torch.zeros_like(data), {}, (96, 3072), torch.float32)
    assert not zeros.dequantize().any()


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_of_the_released_widths(format):
    kind, weight = FORMATS[format], StoredWeight(format, {})
    scales = {"nvfp4": 3072 * 12288 // 16, "mxfp8": 3072 * 12288 // 32}.get(format, 4 * 3072)
    assert weight.nbytes((3072, 12288)) == 3072 * 12288 // kind.packed + scales


# Precision and linears


CARDS = {"Pascal": (6, 1), "Ampere": (8, 6), "Hopper": (9, 0), "Blackwell": (10, 0)}


@pytest.fixture
def keep(monkeypatch):
    monkeypatch.setattr(quantize, "fp8_problem", lambda device: None)
    monkeypatch.setattr(stored_weights, "_block_product_problem", lambda family, device: None)

    def keep(card: str, precision: str = "auto", **counts: int) -> Precision | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[card])
        return keep_stored_form(precision, torch.device("cuda", 0), torch.bfloat16, counts)

    return keep


@pytest.mark.parametrize(
    ("card", "family", "products", "fell_back"),
    [
        ("Hopper", "fp8", "fp8", False),
        ("Ampere", "fp8", None, True),
        ("Ampere", "int8", "int8", False),
        ("Ampere", "int8_convrot", None, False),
        ("Pascal", "int8_convrot", None, True),
        ("Ampere", "w4a4", None, False),
        ("Hopper", "nvfp4", None, True),
        ("Hopper", "mxfp8", None, True),
        ("Blackwell", "nvfp4", None, False),
    ],
)
def test_a_quantized_file_runs_as_stored(keep, card, family, products, fell_back):
    precision = keep(card, **{family: 3})
    assert (precision.form, precision.stored, precision.products) == (family, True, products)
    assert (precision.fell_back, bool(precision.why)) == (fell_back, fell_back)
    assert precision.activations(torch.device("cuda")) == {"fp8": quantize.FP8, "int8": quantize.INT8}.get(products)


def test_one_form_of_rows_for_a_mixed_file(keep):
    assert keep("Hopper", fp8=2, int8=3).products == "int8"
    assert keep("Ampere", fp8=3, int8=2).products == "int8"
    assert keep("Hopper", nvfp4=5, fp8=2).products == "fp8"


def test_what_else_is_asked_for_is_not_as_stored(keep):
    assert keep("Hopper") is None
    assert keep("Hopper", "bf16", fp8=3) is None
    assert keep("Hopper", "int8", fp8=3) is None
    assert keep("Hopper", "fp8", mxfp8=3) is None
    assert keep("Hopper", "fp8", fp8=3).wanted == "fp8"
    assert keep("Hopper", "int8", int8_convrot=3).form == "int8_convrot"


def test_a_wish_for_full_precision_is_honoured_unless_the_form_is_asked_for(tmp_path):
    source = read(tmp_path, "fp8 full precision")
    for honoured, kind in ((True, "DequantizedLinear"), (False, "QuantizedLinear")):
        model = meta_model(source)
        prepare(model, None)
        keep_stored(model, source.stored, CPU, "fp8", full_precision=honoured)
        assert type(model.get_submodule(LINEAR)).__name__ == kind


def test_a_form_that_is_asked_for_leaves_the_modulation_as_stored(tmp_path):
    source = read(tmp_path, "fp8 scaled")
    model = meta_model(source)
    prepare(model, "w4a4")
    keep_stored(model, source.stored, CPU, None, modulation_only=True)
    promised = stored_bytes(model)
    fill(model, source, torch.float32, CPU)
    linears = {n: m.weight for n, m in model.named_modules() if n.removesuffix(".weight") + ".weight" in source.stored}
    layouts = {weight._layout_cls for weight in linears.values() if isinstance(weight, quantize.QuantizedTensor)}
    assert layouts == {quantize.W4A4_LAYOUT, quantize.ROWWISE_FP8}
    assert {n for n, w in linears.items() if w._layout_cls == quantize.ROWWISE_FP8} == {
        f"transformer_blocks.{i}.{m}.1" for i in range(2) for m in ("img_mod", "txt_mod")
    }
    assert stored_bytes(model) == pytest.approx(promised, rel=0.03)


def test_the_writer_of_these_files_writes_what_it_says():
    state = VARIANTS["fp8 by metadata"](float_state())
    layers = json.loads(metadata_of("fp8 by metadata", state)["_quantization_metadata"])["layers"]
    assert set(layers) == {n.removesuffix(".weight") for n, t in float_state().items() if in_block(n, t)}
