"""Reading LoRA files: against peft's own layers, against the products that LoHa and LoKr stand for, and what is refused."""

import json

import pytest
import torch
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from qwen_edit.linear import HighRank
from qwen_edit.lora import read_lora
from qwen_edit.lora_files import MAX_RANK
from qwen_edit.transformer import QwenEditTransformer

CONFIG = dict(
    num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)
TO_Q = "transformer_blocks.0.attn.to_q"
TARGETS = (
    TO_Q,
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.1.attn.to_add_out",
    "transformer_blocks.1.img_mlp.net.0.proj",
    "transformer_blocks.1.txt_mlp.net.2",
    "transformer_blocks.1.txt_mod.1",
    "img_in",
    "txt_in",
    "norm_out.linear",
    "proj_out",
)
RANKS = {target: 8 if "1.attn" in target else 4 for target in TARGETS}

# A key style: what is before the name, whether its dots are kept, the names of A and B, and whether alphas are stored.
STYLES = {
    "diffusers": ("transformer.", True, "lora_A.weight", "lora_B.weight", False),
    "peft, named": ("", True, "lora_A.default.weight", "lora_B.default.weight", False),
    "ComfyUI": ("diffusion_model.", True, "lora_A.weight", "lora_B.weight", False),
    "ComfyUI with alpha": ("diffusion_model.", True, "lora_down.weight", "lora_up.weight", True),
    "kohya": ("lora_unet_", False, "lora_down.weight", "lora_up.weight", True),
    "kohya without alpha": ("lora_unet_", False, "lora_down.weight", "lora_up.weight", False),
    "bare": ("", True, "lora_A.weight", "lora_B.weight", False),
    "bare with alpha": ("", True, "lora_A.weight", "lora_B.weight", True),
    "bare down and up with alpha": ("", True, "lora_down.weight", "lora_up.weight", True),
}
PATTERNS = {
    "target_modules": list(TARGETS),
    "r": 4,
    "rank_pattern": {"1.attn.*": 8},
    "lora_alpha": 2,
    "alpha_pattern": {f"^{TO_Q}": 12, "proj_out": 5},
}
CONFIGURATIONS = {
    "": None,
    "patterns": PATTERNS,
    "rank-stabilized": PATTERNS | {"use_rslora": True},
    "no alpha": {"target_modules": list(TARGETS), "r": 4, "rank_pattern": {"1.attn.*": 8}},
}


def model() -> QwenEditTransformer:
    with torch.device("meta"):
        return QwenEditTransformer(**CONFIG)


def written(style: str) -> dict[str, torch.Tensor]:
    prefix, dotted, down, up, alphas = STYLES[style]
    generator = torch.Generator().manual_seed(1)
    state = {}
    for target, rank in RANKS.items():
        linear = model().get_submodule(target)
        name = prefix + (target if dotted else target.replace(".", "_"))
        state[f"{name}.{down}"] = torch.randn(rank, linear.in_features, generator=generator)
        state[f"{name}.{up}"] = torch.randn(linear.out_features, rank, generator=generator)
        if alphas:
            state[f"{name}.alpha"] = torch.tensor(rank * 0.3 + len(target))
    return state


def save(folder, state, configuration=None, named="transformer."):
    metadata = None if configuration is None else {f"{named}{k}": v for k, v in configuration.items()}
    stored = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(state, folder / "one.safetensors", metadata=stored)
    return folder / "one.safetensors"


def injected(state, configuration) -> dict[str, torch.Tensor]:
    """The differences that diffusers' and peft's own layers make, by module."""
    converted = QwenImageLoraLoaderMixin.lora_state_dict(dict(state))
    converted = {k if k.startswith("transformer.") else f"transformer.{k}": v for k, v in converted.items()}
    metadata = None if configuration is None else {f"transformer.{k}": v for k, v in configuration.items()}
    skeleton = model()
    skeleton.load_lora_adapter(converted, adapter_name="file", metadata=metadata, low_cpu_mem_usage=True)
    result = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer):
            a, b = (converted[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
            result[name] = module.scaling["file"] * b @ a
    return result


def difference(layer) -> torch.Tensor:
    if isinstance(layer, HighRank):
        return layer.difference()
    return layer.scale * layer.b.float() @ layer.a.float()


def assert_equal(got: torch.Tensor, expected: torch.Tensor):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_layers_and_scales_are_those_of_peft(tmp_path, style, configuration):
    state, configured = written(style), CONFIGURATIONS[configuration]
    file = read_lora(save(tmp_path, state, configured), CONFIG)
    expected = injected(state, configured)
    assert file.layers.keys() == expected.keys() == set(TARGETS)
    assert file.skipped == ()
    for name, layer in file.layers.items():
        assert layer.a.shape[0] == RANKS[name]
        assert_equal(difference(layer), expected[name])


@pytest.mark.parametrize("alphas", [False, True])
def test_names_that_diffusers_prefixes_twice(tmp_path, alphas):
    """It converts files with alphas or adapter names as if none of their modules were named ``transformer.…`` yet."""
    state = written("bare with alpha" if alphas else "peft, named")
    expected = injected(state, None)
    file = read_lora(save(tmp_path, {f"transformer.{key}": tensor for key, tensor in state.items()}), CONFIG)
    assert file.layers.keys() == expected.keys()
    for name, layer in file.layers.items():
        assert_equal(difference(layer), expected[name])


def test_a_configuration_that_peft_itself_stored(tmp_path):
    """Without the transformer's name before its keys."""
    file = read_lora(save(tmp_path, written("diffusers"), PATTERNS, named=""), CONFIG)
    assert file.layers[TO_Q].scale == 12 / 4
    assert file.layers["transformer_blocks.1.attn.add_k_proj"].scale == 2 / 8


# LoHa and LoKr

PRODUCT_STYLES = {
    "diffusers": ("transformer.", True),
    "ComfyUI": ("diffusion_model.", True),
    "kohya": ("lora_unet_", False),
    "SimpleTuner": ("lycoris_", False),
    "bare": ("", True),
}
ALPHA = 3.0
M = torch.randn(1 << 16, generator=torch.Generator().manual_seed(2))


def numbers(*shape: int, at: int = 0) -> torch.Tensor:
    return M[at : at + torch.Size(shape).numel()].reshape(shape).clone()


# to_q of the small model is [64, 64]: the tensors of one adapter and the difference that they stand for.
def loha(r1=4, r2=3):
    parts = {"hada_w1_a": numbers(64, r1), "hada_w1_b": numbers(r1, 64, at=1000)}
    parts |= {"hada_w2_a": numbers(64, r2, at=2000), "hada_w2_b": numbers(r2, 64, at=3000)}
    w1, w2 = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
    return parts, ALPHA / r1 * w1 * w2


def lokr(w1_rank=None, w2_rank=None, rows=(4, 16), columns=(8, 8)):
    parts, whole = {}, []
    for i, rank in enumerate((w1_rank, w2_rank)):
        name, (m, n) = f"lokr_w{i + 1}", (rows[i], columns[i])
        if rank is None:
            parts[name] = numbers(m, n, at=100 * i)
            whole.append(parts[name])
        else:
            parts |= {f"{name}_a": numbers(m, rank, at=100 * i), f"{name}_b": numbers(rank, n, at=300 * i)}
            whole.append(parts[f"{name}_a"] @ parts[f"{name}_b"])
    rank = w2_rank or w1_rank
    return parts, (ALPHA / rank if rank else 1.0) * torch.kron(*whole)


PRODUCTS = {
    "LoHa": loha,
    "LoKr, W2 factored": lambda: lokr(None, 2),
    "LoKr, W1 factored": lambda: lokr(3, None),
    "LoKr, both factored": lambda: lokr(2, 3),
    "LoKr, none factored": lokr,
    "LoKr, W1 tall": lambda: lokr(rows=(16, 4), columns=(2, 32)),
}


@pytest.mark.parametrize("style", PRODUCT_STYLES)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_are_exact(tmp_path, kind, style):
    prefix, dotted = PRODUCT_STYLES[style]
    parts, expected = PRODUCTS[kind]()
    name = prefix + (TO_Q if dotted else TO_Q.replace(".", "_"))
    state = {f"{name}.{part}": tensor for part, tensor in parts.items()} | {f"{name}.alpha": torch.tensor(ALPHA)}
    file = read_lora(save(tmp_path, state), CONFIG)
    assert list(file.layers) == [TO_Q]
    assert_equal(difference(file.layers[TO_Q]), expected)
    kept = read_lora(save(tmp_path, state), CONFIG, torch.bfloat16).layers[TO_Q]
    assert kept.a.dtype == kept.b.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (LoKrConfig(r=4, alpha=6, target_modules=["to_q"], decompose_factor=4), lambda: lokr(rows=(4, 16), columns=(4, 16))),
        (LoHaConfig(r=4, alpha=6, target_modules=["to_q"]), lambda: loha(4, 4)),
    ],
)  # fmt: skip
def test_products_with_pefts_configuration(tmp_path, config, parts):
    """Without alpha in the file, peft's own scale holds."""
    given, expected = parts()
    unscaled = expected / (ALPHA / 4 if isinstance(config, LoHaConfig) else 1)
    linear = torch.nn.ModuleDict({"to_q": torch.nn.Linear(64, 64)})
    scaling = inject_adapter_in_model(config, linear)["to_q"].scaling["default"]
    state = {f"transformer.{TO_Q}.{part}": tensor for part, tensor in given.items()}
    stored = {"r": config.r, "alpha": config.alpha, "peft_type": str(config.peft_type)}
    file = read_lora(save(tmp_path, state, stored), CONFIG)
    assert_equal(difference(file.layers[TO_Q]), scaling * unscaled)
    assert_equal(difference(read_lora(save(tmp_path, state), CONFIG).layers[TO_Q]), unscaled)


@pytest.mark.parametrize("make", [lambda: loha(MAX_RANK // 2, 3), lambda: loha(20, 20)])
def test_a_product_of_high_rank_stays_in_its_factors(tmp_path, make):
    parts, expected = make()
    layer = read_lora(save(tmp_path, _named(parts | {"alpha": torch.tensor(ALPHA)})), CONFIG).layers[TO_Q]
    assert isinstance(layer, HighRank)
    assert_equal(difference(layer), expected)


def test_a_kronecker_product_of_high_rank(tmp_path, monkeypatch):
    """Of the small model's sizes none has more than the bound."""
    monkeypatch.setattr("qwen_edit.lora_files.MAX_RANK", 8)
    for factored in ((None, None), (None, 3), (3, 3)):
        parts, expected = lokr(*factored)
        layer = read_lora(save(tmp_path, _named(parts | {"alpha": torch.tensor(ALPHA)})), CONFIG).layers[TO_Q]
        assert isinstance(layer, HighRank)
        assert len(layer.factors) == 2
        assert_equal(difference(layer), expected)


def test_kinds_may_be_mixed_and_what_the_model_lacks_is_counted(tmp_path):
    state = written("ComfyUI with alpha")
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        del state[f"diffusion_model.{TO_Q}.{part}"]
    state |= {f"diffusion_model.{TO_Q}.{part}": tensor for part, tensor in loha()[0].items()}
    state |= {f"diffusion_model.other.to_q.{part}": tensor for part, tensor in lokr()[0].items()}
    state["diffusion_model.time_text_embed.timestep_embedder.linear_1.lora_down.weight"] = torch.zeros(2, 2)
    state["diffusion_model.time_text_embed.timestep_embedder.linear_1.lora_up.weight"] = torch.zeros(2, 2)
    file = read_lora(save(tmp_path, state), CONFIG)
    assert file.layers.keys() == set(TARGETS)
    assert file.skipped == ("diffusion_model.other.to_q", "time_text_embed.timestep_embedder.linear_1")


# What is refused


def _named(parts: dict, prefix="diffusion_model.") -> dict:
    return {f"{prefix}{TO_Q}.{part}": tensor for part, tensor in parts.items()}


def _without(parts: dict, name: str) -> dict:
    return _named({k: v for k, v in parts.items() if k != name})


HADA = loha()[0]
Q_A = f"transformer.{TO_Q}.lora_A.weight"
REFUSED = {
    "nothing": ({}, "none of its 0 tensors"),
    "another model": (_named(HADA, "diffusion_model.double."), "none of its 4 tensors belongs to Qwen-Image-Edit"),
    "Tucker LoHa": (_named(HADA | {"hada_t1": numbers(4, 4)}), f"{TO_Q}.hada_t1 is of a kind .* ComfyUI's own"),
    "Tucker LoKr": (_named(lokr(None, 2)[0] | {"lokr_t2": numbers(2, 2)}), f"{TO_Q}.lokr_t2 is of a kind"),
    "DoRA": (_named(HADA | {"dora_scale": numbers(64)}), f"{TO_Q}.dora_scale is of a kind"),
    "DoRA of peft": (written("diffusers") | {f"{TO_Q}.lora_magnitude_vector": numbers(64)}, "vector is of a kind"),
    "difference": (_named({"diff": numbers(64, 64)}), f"{TO_Q}.diff is of a kind"),
    "OFT": (_named({"oft_blocks": numbers(4, 4, 4)}, "transformer."), f"{TO_Q}.oft_blocks is of a kind"),
    "bias": (written("diffusers") | {f"transformer.{TO_Q}.lora_B.bias": numbers(64)}, "lora_B.bias is of a kind"),
    "half a LoHa": (_without(HADA, "hada_w2_b"), "has no counterpart hada_w2_b"),
    "half a LoKr": (_named({"lokr_w1": numbers(2, 2)}), f"{TO_Q}.lokr_w1 has no counterpart lokr_w2"),
    "half a LoRA": ({Q_A: written("diffusers")[Q_A]}, "lora_A.weight has no counterpart lora_B"),
    "ranks": (_named(HADA | {"hada_w1_b": numbers(2, 64)}), "hada_w1_b has rank 2, its counterpart .*hada_w1_a 4"),
    "width": (_named(lokr(columns=(4, 8))[0]), r"lokr_w1 and its counterparts make \[64, 32\]"),
    "convolution": (_named({"lora_A.weight": numbers(4, 64, 1, 1), "lora_B.weight": numbers(64, 4, 1, 1)}), "a matrix"),
    "infinity": (_named(HADA | {"hada_w1_a": numbers(64, 4) / 0}), "hada_w1_a holds NaN or infinity"),
    "no alpha number": (_named(HADA | {"alpha": numbers(2)}), r"alpha is \[2\], it must be one number"),
    "twice": (written("diffusers") | _named(HADA), f"is a second adapter on {TO_Q}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_key(tmp_path, kind):
    state, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as error:
        read_lora(save(tmp_path, state), CONFIG)
    assert str(error.value).startswith("[QE_LORA] one.safetensors: ")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"r": 16}, "has rank 4, but lora_adapter_metadata says rank 16"),
        ({"r": "many"}, "rank many"),
        ({"rank_pattern": {"(": 4}}, "lora_adapter_metadata can't be read"),
        ({"r": 4, "use_dora": True}, "a DoRA is not applied"),
    ],
)
def test_configurations_that_contradict_the_file_are_refused(tmp_path, configuration, message):
    with pytest.raises(ValueError, match=message):
        read_lora(save(tmp_path, written("diffusers"), configuration), CONFIG)


def test_large_numbers_are_no_infinity(tmp_path):
    """Their sum is."""
    state = written("diffusers")
    state[Q_A] = torch.full_like(state[Q_A], 3e38)
    assert TO_Q in read_lora(save(tmp_path, state), CONFIG).layers
