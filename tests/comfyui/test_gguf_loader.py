"""Transformers from GGUF files on the real server, against the same weights in a float file."""

import json

import numpy as np
import pytest
import torch
from comfy_process import save_comfyui_vae
from edits import between, changed, edited, failure, look, note, run_fresh, small_edit
from graphs import loader
from safetensors.torch import save_file
from test_loader_precision import lora_on_conditioning
from test_memory import free, free_all
from test_sameness import DEMO

from qwen_edit.transformer import QwenEditTransformer

pytest.importorskip("gguf")
import gguf_files

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROUNDING = 1.01 / 255
TARGETS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "img_mod.1")
PACKED, FLOATS = "qwen-image-edit-2511-Q4_K_M.gguf", "gguf in floats 2511.safetensors"


def stored_as(name: str, tensor: torch.Tensor) -> str:
    if tensor.ndim == 1:
        return "F32"
    return "Q6_K" if "to_v" in name else "BF16" if "proj_out" in name else "Q8_0" if "_mod." in name else "Q5_1"


def transformer() -> QwenEditTransformer:
    width = json.loads((DEMO / "transformer" / "config.json").read_text())["joint_attention_dim"]
    torch.manual_seed(0)
    config = dict(num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=width)
    return QwenEditTransformer(**config)


@pytest.fixture(scope="module", autouse=True)
def files(host, models) -> None:
    model = transformer()
    state = model.state_dict()
    floats = gguf_files.write(models / "diffusion_models" / PACKED, state, stored_as)
    save_file(floats, models / "diffusion_models" / FLOATS)
    gguf_files.write(models / "unet_gguf" / "elsewhere.gguf", state, stored_as)
    gguf_files.write(models / "diffusion_models" / "llama.gguf", state, stored_as, architecture="llama")
    content = (models / "diffusion_models" / PACKED).read_bytes()
    (models / "diffusion_models" / "cut.gguf").write_bytes(content[:-5000])
    save_comfyui_vae(host, DEMO, models / "vae" / "gguf vae.safetensors")
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for block in range(2):
        for target in TARGETS:
            name = f"transformer_blocks.{block}.{target}"
            linear = model.get_submodule(name)
            for part, shape in (("A", (4, linear.in_features)), ("B", (linear.out_features, 4))):
                lora[f"transformer.{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.3
    save_file(lora, models / "loras" / "gguf.safetensors")


def from_file(graph, name: str, **inputs):
    """The edit with the transformer of a file; encoder and VAE stay the demo model's."""
    inputs = {"precision": "auto", "model_version": "2511"} | inputs
    alone = loader(model=name, text_encoder="none", vae="gguf vae.safetensors", **inputs)
    return changed(graph, "sampler", model=["transformer", 0]) | {"transformer": alone}


@pytest.fixture
def graph(client):
    return small_edit(client, steps=2, true_cfg_scale=1.0)


@pytest.fixture
def packed(graph):
    return from_file(graph, PACKED)


@pytest.fixture
def floats(graph):
    return from_file(graph, FLOATS)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return np.abs(one - other).max() <= ROUNDING


def with_native_lora(graph):
    inputs = {"lora_name": "gguf.safetensors", "strength_model": 1.0}
    return between(graph, ("transformer", 0), "LoraLoaderModelOnly", "model", **inputs)


def test_only_our_loader_offers_them(client):
    info = client.get("/object_info")

    def offered(which: str, combo: str) -> list:
        type_, *options = info[which]["input"]["required"][combo]
        return type_ if isinstance(type_, list) else options[0]["options"]

    ours = offered("QwenEditLoader", "model")
    assert {PACKED, "elsewhere.gguf", FLOATS} <= set(ours)
    assert not [name for name in offered("UNETLoader", "unet_name") if name.endswith(".gguf")]


def test_the_picture_is_that_of_the_dequantized_weights(client, packed, floats):
    result = run_fresh(client, packed)
    (picture,) = client.arrays(result)
    assert close(picture, edited(client, floats))
    said = note(result, "transformer")
    assert "(2511, by model_version), gguf, " in said
    assert (
        "Precision gguf: as stored in the file, 22 linears of the blocks in Q5_1, 2 linears of the blocks in Q6_K"
        in said
    )


def test_the_version_is_guessed_aloud(client, graph):
    said = note(run_fresh(client, from_file(graph, PACKED, model_version="auto")), "transformer")
    assert "(2511, by the file's name)" in said
    said = note(run_fresh(client, from_file(graph, "elsewhere.gguf", model_version="auto")), "transformer")
    assert "Warning: nothing in this file or its name says whether it is 2511 or 2509" in said


@pytest.mark.parametrize("precision", ["fp32", "fp8", "int8", "w4a4"])
def test_another_precision_dequantizes(client, graph, precision):
    for change in (lambda g: g, with_native_lora):
        ours, same = (edited(client, change(from_file(graph, name, precision=precision))) for name in (PACKED, FLOATS))
        assert close(ours, same)


def test_a_profile_does_not_apply_and_a_form_is_warned_about(client, graph):
    said = note(run_fresh(client, from_file(graph, PACKED, profile="fast")), "transformer")
    assert "Precision gguf" in said
    said = note(run_fresh(client, from_file(graph, PACKED, precision="int8")), "transformer")
    assert "Warning: the file has 22 linears of the blocks in Q5_1" in said
    assert "quantized again to int8" in said


def test_native_loras_equal_those_on_floats_and_leave_the_bytes(client, packed, floats):
    before = edited(client, packed)
    with_lora = edited(client, with_native_lora(packed))
    assert np.abs(with_lora - before).mean() > 0.005
    assert close(with_lora, edited(client, with_native_lora(floats)))
    assert np.array_equal(edited(client, packed), before)
    assert np.array_equal(edited(client, with_native_lora(packed)), with_lora)


def test_the_lora_switch_equals_native_loras(client, graph):
    def switched(name):
        edit = from_file(graph, name)
        inputs = {"lora_1": "gguf.safetensors"} | {f"lora_{i}": "none" for i in (2, 3, 4)}
        inputs |= {f"strength_{i}": 1.0 for i in range(1, 5)}
        return between(edit, ("transformer", 0), "QwenEditLoraSwitch", "model", **inputs)

    assert close(edited(client, switched(PACKED)), edited(client, with_native_lora(from_file(graph, PACKED))))


def test_freed_weights_are_read_again(client, packed):
    plain, with_lora = edited(client, packed), edited(client, with_native_lora(packed))
    free(client, cache=False)  # with the LoRA in
    assert np.array_equal(edited(client, packed), plain)
    free_all(client)
    assert np.array_equal(edited(client, with_native_lora(packed)), with_lora)


def test_streamed_blocks_give_the_same_picture(client, graph):
    streamed = from_file(graph, PACKED, offload="stream")
    for change in (lambda g: g, with_native_lora):
        assert np.array_equal(edited(client, change(streamed)), edited(client, change(from_file(graph, PACKED))))


def test_a_lora_on_conditioning_is_refused(client, packed):
    before = edited(client, packed)
    said = failure(client, lora_on_conditioning(packed, "gguf.safetensors"))
    assert said.startswith("[QE_INPUT] A LoRA on conditioning")
    assert "precision bf16" in said
    assert np.array_equal(edited(client, packed), before)


@pytest.mark.parametrize(
    ("name", "said"), [("llama.gguf", "the architecture 'llama'"), ("cut.gguf", "the download was cut off")]
)
def test_bad_files_are_refused_by_name(client, good, packed, name, said):
    good, before = edited(client, packed), sorted(look(client)["loaded"])
    message = failure(client, changed(packed, "transformer", model=name))
    assert message.startswith(f"[QE_WEIGHTS] {name}")
    assert said in message
    assert sorted(look(client)["loaded"]) == before
    assert np.array_equal(edited(client, packed), good)


def test_without_a_text_encoder_encoding_says_so(client, graph):
    said = failure(client, changed(from_file(graph, PACKED), "encode", clip=["transformer", 1]))
    assert said.startswith("[QE_INPUT] There is no CLIP")
