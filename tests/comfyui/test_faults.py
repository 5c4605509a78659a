"""Bad input and faults on the real server: each is refused or survived, and the next good edit is as before."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from comfy_client import Interrupted, PromptRejected
from comfy_process import save_comfyui_vae
from edits import between, changed, edited, failure, fresh, look, note, picture, run_fresh, small_edit
from every_node import INFO, complaint, every_node, is_link, linked, only, widgets
from graphs import node
from safetensors.torch import load_file, save_file
from test_lora import lora_state
from test_sameness import DEMO

from qwen_edit.transformer import QwenEditTransformer

pytestmark = pytest.mark.server


# Files


def transformer_state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A transformer whose heads are the released model's and whose text width is the demo encoder's."""
    width = json.loads((DEMO / "transformer" / "config.json").read_text())["joint_attention_dim"]
    torch.manual_seed(0)
    model = QwenEditTransformer(num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=width)
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


def _html(path):
    path.write_text("<!DOCTYPE html><html><body>404: not found</body></html>")


def _lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 40000000000\n")


def _pickle(path):
    torch.save({"img_in.weight": torch.zeros(2)}, path)


def _truncated(path):
    save_file(transformer_state(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def _trailing(path):
    save_file(transformer_state(), path)
    path.write_bytes(path.read_bytes() + b"more")


def _overlapping(path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"img_in.weight": entry, "txt_in.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def _huge_header(path):
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{" + b" " * 600)


def _empty(path):
    path.write_bytes(b"")


def _flux(path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2), "img_in.weight": torch.zeros(2, 2)}, path)


def _lora(path):
    save_file(lora_state(1), path)


def _missing(path):
    state = transformer_state()
    for name in ("transformer_blocks.1.attn.to_q.weight", "proj_out.bias"):
        del state[name]
    save_file(state, path)


def _unexpected(path):
    save_file(transformer_state() | {f"extra.{i}.weight": torch.zeros(2) for i in range(7)}, path)


def _no_end_of_blocks(path):
    """A name that announces a thousand million blocks, each of which would have to be built to be missed."""
    state = transformer_state()
    save_file(state | {"transformer_blocks.999999999.attn.to_q.weight": torch.zeros(2)}, path)


def _gap(path):
    save_file({k.replace("blocks.1.", "blocks.4."): v for k, v in transformer_state().items()}, path)


def _unknown_format(path):
    state = transformer_state()
    name = "transformer_blocks.1.attn.to_q"
    state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.int8)
    state[f"{name}.comfy_quant"] = torch.tensor(list(b'{"format": "int3_tilewise"}'), dtype=torch.uint8)
    save_file(state, path)


BAD_FILES = {
    "web page": (_html, "web page"),
    "lfs pointer": (_lfs, "Git LFS pointer"),
    "pickle": (_pickle, "zip or pickle"),
    "truncated": (_truncated, "damaged or was not downloaded to its end"),
    "trailing bytes": (_trailing, "damaged"),
    "overlapping offsets": (_overlapping, "damaged"),
    "huge header": (_huge_header, "no safetensors header"),
    "empty": (_empty, "empty or cut off"),
    "flux": (_flux, "found FLUX"),
    "lora": (_lora, "found a LoRA"),
    "missing": (_missing, "2 tensors are missing"),
    "unexpected": (_unexpected, "7 tensors are unexpected (extra.0.weight, extra.1.weight, extra.2.weight,"),
    "a thousand million blocks": (_no_end_of_blocks, "blocks"),
    "gap": (_gap, "missing"),
    "unknown format": (_unknown_format, "transformer_blocks.1.attn.to_q.weight has the format 'int3_tilewise'"),
}
UNREADABLE = (
    "web page",
    "lfs pointer",
    "pickle",
    "truncated",
    "trailing bytes",
    "overlapping offsets",
    "huge header",
    "empty",
)
OTHER_MODELS = ("flux", "lora")


@pytest.fixture(scope="module")
def companions(host, models) -> dict:
    """The loader's inputs for a text encoder and a VAE that exist, in single files of the right kinds."""
    key = "model.layers.0.self_attn.k_proj.bias"
    save_file({key: torch.zeros(512)}, models / "text_encoders" / "te.safetensors")
    save_comfyui_vae(host, DEMO, models / "vae" / "vae.safetensors")
    return {"text_encoder": "te.safetensors", "vae": "vae.safetensors"}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_chosen_as_model_is_refused_by_name(client, graph, good, models, companions, kind):
    make, message = BAD_FILES[kind]
    path = models / "diffusion_models" / f"bad {kind}.safetensors"
    make(path)
    before = look(client)["loaded"]
    said = failure(client, changed(graph, "loader", model=path.name, **companions))
    assert said.startswith("[QE_WEIGHTS]")
    assert path.stem in said
    assert message in said
    assert kind not in UNREADABLE or f"({path.stat().st_size:,} bytes)" in said
    assert kind not in OTHER_MODELS or "this loader needs the transformer of Qwen-Image-Edit" in said
    assert look(client)["loaded"] == before


@pytest.mark.parametrize("which", ["text_encoder", "vae"])
@pytest.mark.parametrize("kind", ["web page", "truncated", "flux", "pickle"])
def test_a_bad_encoder_or_vae_file_is_refused_by_name(client, graph, good, models, which, kind):
    path = models / {"text_encoder": "text_encoders", "vae": "vae"}[which] / f"bad {kind}.safetensors"
    BAD_FILES[kind][0](path)
    said = failure(client, changed(graph, "loader", **{which: path.name}))
    assert said.startswith("[QE_WEIGHTS]")
    assert path.name in said


def test_a_text_encoder_that_sees_no_pictures_is_refused(client, graph, good, models):
    path = models / "text_encoders" / "qwen_2.5_7b.safetensors"
    save_file({"model.layers.0.self_attn.k_proj.bias": torch.zeros(512)}, path)
    said = failure(client, changed(graph, "loader", text_encoder=path.name))
    assert said.startswith("[QE_WEIGHTS] qwen_2.5_7b.safetensors is Qwen2.5 7B for text only")
    assert "Choose Qwen2.5-VL 7B" in said


def demo_copy(models, name: str):
    folder = models / "diffusers" / name
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("loras"))
    return folder


def _no_shard(folder):
    index = {"metadata": {}, "weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    part = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    part.rename(part.with_name("part-1.safetensors"))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _no_config(folder):
    (folder / "transformer" / "config.json").unlink()


def _broken_config(folder):
    (folder / "transformer" / "config.json").write_text('{"num_layers": ')


def _other_config(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 7}))


def _other_width(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"joint_attention_dim": 64}))


def _no_vae(folder):
    shutil.rmtree(folder / "vae")


def _cut_encoder(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _no_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


BAD_FOLDERS = {
    "without a shard": (_no_shard, "part-2.safetensors"),
    "without a config": (_no_config, "config.json"),
    "with a broken config": (_broken_config, "config.json"),
    "with another config": (_other_config, "tensors are missing"),
    "with another width": (_other_width, "the model needs"),
    "without a vae": (_no_vae, "vae"),
    "with a cut encoder": (_cut_encoder, "model.safetensors"),
    "without a tokenizer": (_no_tokenizer, "tokenizer"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_an_incomplete_folder_is_refused_by_name(client, graph, good, models, kind):
    break_it, message = BAD_FOLDERS[kind]
    break_it(demo_copy(models, kind))
    before = look(client)["loaded"]
    said = failure(client, changed(graph, "loader", model=f"folder: {kind}"))
    assert said.startswith("[QE_WEIGHTS]")
    assert kind in said
    assert message in said
    assert look(client)["loaded"] == before


def test_a_file_that_is_replaced_behind_its_name_is_read_again(client, graph, good, models):
    folder = demo_copy(models, "replaced")
    from_copy = changed(graph, "loader", model="folder: replaced")
    assert np.array_equal(edited(client, from_copy), good)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({k: v * 0.5 if k == "proj_out.weight" else v for k, v in state.items()}, path)
    assert not np.array_equal(edited(client, from_copy), good)


# Values

NAN, INF = float("nan"), float("inf")
SEEDS, SIDES = [-1, 2**64], [-16, 65, 8, 10**12]
GUIDANCE, SHIFTS, STRENGTHS = [NAN, INF, -1.0, 0.5, 1e30], [NAN, -INF, -0.1, 1e9], [NAN, INF, -11.0, 1e308]
NUMBERS = {
    ("sampler", "steps"): [-1, 1001, 10**30],
    ("sampler", "true_cfg_scale"): GUIDANCE,
    ("sampler", "shift"): SHIFTS,
    ("sampler", "seed"): SEEDS,
    ("encode", "width"): SIDES,
    ("encode", "height"): SIDES,
    **{("switch", f"strength_{slot}"): STRENGTHS for slot in range(1, 5)},
    ("cache", "tolerance"): [NAN, INF, -0.1, 1.1],
    ("preset", "steps"): [-1, 1001],
    ("preset", "true_cfg_scale"): GUIDANCE,
    ("preset", "shift"): SHIFTS,
    ("sweep", "seed"): SEEDS,
    ("sweep", "true_cfg_scale"): GUIDANCE,
    ("sweep", "shift"): SHIFTS,
    ("batch", "seed"): SEEDS,
    ("batch", "megapixels"): [NAN, INF, -0.1, 4.1],
    ("batch", "width"): SIDES,
    ("batch", "height"): SIDES,
    ("batch", "steps"): [-1, 1001],
    ("batch", "true_cfg_scale"): GUIDANCE,
    ("batch", "shift"): SHIFTS,
    ("batch", "wave"): [0, 65],
    ("batch", "together"): [-1, 17],
    ("resize", "megapixels"): [NAN, INF, 0.0, 4.1],
    ("resize", "longest_side"): [31, 2049, -64],
    ("restore", "feather"): [-1, 257],
}


@pytest.fixture
def every(client):
    return every_node(client)


@pytest.mark.parametrize("which", sorted({which for which, _ in NUMBERS}))
def test_numbers_out_of_range_are_refused_as_widgets_and_as_links(client, every, good, which):
    for (_, name), values in ((key, values) for key, values in NUMBERS.items() if key[0] == which):
        for value in values:
            said = complaint(client, changed(every, which, **{name: value}), which)
            assert name in said, (name, value, said)
            said = complaint(client, linked(every, which, name, value), which)
            assert said.startswith("[QE_INPUT]"), (name, value, said)
            assert name in said, (name, value, said)


WRONG = {
    "INT": [2.5, True, "4"],
    "FLOAT": [True, "4", None],
    "STRING": [5, None],
    "COMBO": [5, None, ["auto"]],
    "BOOLEAN": [1, "yes"],
}
# The pack's sentences about files that are not offered name them as people do.
FILES = ("model", "text_encoder", "vae", "lora_1", "lora_2", "lora_3", "lora_4")


def test_values_of_the_wrong_type_through_a_link_are_refused(client, every, good):
    for which, name, kind in widgets(every):
        for value in WRONG[kind]:
            said = complaint(client, linked(every, which, name, value), which)
            assert said.startswith("[QE_INPUT]"), (which, name, value, said)
            assert name in said or name in FILES, (which, name, value, said)


PASSED_ON = (("logger", "value"), ("report", "image"))  # whatever it is


def test_anything_else_through_a_models_or_a_pictures_link_is_refused(client, every, good):
    for which, one in every.items():
        links = [name for name, value in one["inputs"].items() if is_link(value) and (which, name) not in PASSED_ON]
        for name in links if one["class_type"] in INFO else ():
            for value in (5, None):
                if (name, value) != ("mask", None):
                    said = complaint(client, linked(every, which, name, value), which)
                    assert said.startswith("[QE_INPUT]"), (which, name, value, said)


def switch_inputs(name: str, strength: float = 1.0) -> dict:
    inputs = {f"lora_{i}": "none" for i in range(1, 5)} | {f"strength_{i}": 1.0 for i in range(1, 5)}
    return inputs | {"lora_1": name, "strength_1": strength}


COMBOS = [
    ("loader", "model"),
    ("loader", "text_encoder"),
    ("loader", "vae"),
    *[("switch", f"lora_{slot}") for slot in range(1, 5)],
    ("loader", "profile"),
    ("loader", "precision"),
    ("loader", "attention"),
    ("loader", "offload"),
    ("loader", "model_version"),
    ("encode", "reference_size"),
    ("sampler", "preset"),
    ("accelerate", "attention"),
    ("switch", "mode"),
    ("preset", "preset"),
    ("keep", "format"),
    ("sweep", "preset"),
    ("sweep", "theme"),
    ("batch", "preset"),
    ("batch", "reference_size"),
    ("resize", "target"),
    ("resize", "fit"),
    ("report", "export"),
    ("report", "theme"),
]
PATHS = [
    "../{}",
    "{root}/{}",
    "x\0{}",
    r"\\host\share\{}",
    "folder: ../secret",
    "checkpoint: ../{}",
    "demo: ../../{}",
    "",
    "nonsense",
]


@pytest.mark.parametrize("which", sorted({which for which, _ in COMBOS}))
def test_a_combo_takes_only_what_it_offers(client, every, good, models, which):
    """Paths that lead out of ComfyUI's folders are refused before anything runs, and through links as well."""
    save_file(transformer_state(), models / "secret.safetensors")
    save_file(lora_state(1), models / "secret lora.safetensors")
    if not (models / "secret").exists():
        shutil.copytree(DEMO, models / "secret", ignore=shutil.ignore_patterns("loras"))
    for name in (name for node_id, name in COMBOS if node_id == which):
        secret = "secret lora.safetensors" if name.startswith("lora_") else "secret.safetensors"
        for pattern in PATHS if name in FILES else PATHS[-3:]:
            value = pattern.format(secret, root=models)
            with pytest.raises(PromptRejected, match=name):
                client.queue(only(changed(every, which, **{name: value}), which))
            said = complaint(client, linked(every, which, name, value), which)
            assert said.startswith("[QE_INPUT]"), (name, value, said)


def test_every_widget_of_every_node_is_tried(client, every):
    assert {one["class_type"] for one in every.values()} >= set(INFO)
    tried = {"COMBO": set(COMBOS), "INT": set(NUMBERS), "FLOAT": set(NUMBERS)}
    missed = [
        (which, name) for which, name, kind in widgets(every) if (which, name) not in tried.get(kind, [(which, name)])
    ]
    assert missed == []


# Pictures and latents


def with_picture(graph, shape: str, fill: str):
    replaced = changed(graph, "encode", **{"pictures.picture_1": ["odd", 0]})
    del replaced["picture_1"]
    return replaced | {"odd": node("ProbePicture", shape=shape, fill=fill)}


@pytest.mark.parametrize(
    ("shape", "fill", "word"),
    [
        ("1,64,64,3", "nan", "[QE_NAN]"),
        ("1,64,64,3", "inf", "[QE_NAN]"),
        ("0,64,64,3", "0.5", "[QE_INPUT]"),
        ("1,0,64,3", "0.5", "[QE_INPUT]"),
        ("1,64,0,3", "0.5", "[QE_INPUT]"),
        ("1,64,64,7", "0.5", "[QE_INPUT]"),
        ("1,2,64,64,3", "0.5", "[QE_INPUT]"),
    ],
)
def test_a_picture_that_is_none_is_refused_with_its_shape(client, graph, good, shape, fill, word):
    said = failure(client, with_picture(graph, shape, fill))
    assert said.startswith(word)
    if word == "[QE_INPUT]":
        assert f"[{shape.replace(',', ', ')}]" in said


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("1,1,1,3", (32, 32)),
        ("1,8,320,3", (32, 320)),
        ("1,320,8,3", (320, 32)),  # 40:1
        ("1,63,65,3", (64, 64)),
        ("1,64,64,1", (64, 64)),
        ("1,64,64,4", (64, 64)),
        ("1,64,64", (64, 64)),
    ],
)
def test_odd_pictures_follow_the_documented_rule(client, graph, good, shape, size):
    """Sides become multiples of 32, at least 32; grey and mask-shaped pictures get three channels."""
    assert edited(client, with_picture(graph, shape, "ramp")).shape == (*size, 3)


def test_a_grey_picture_equals_its_three_channel_copy(client, graph, good):
    grey, rgb = (edited(client, with_picture(graph, f"1,64,64,{c}", "0.25")) for c in (1, 3))
    assert np.array_equal(grey, rgb)


def test_alpha_is_composited_over_white(client, graph, good):
    transparent = edited(client, with_picture(graph, "1,64,64,4", "0.0"))
    white = edited(client, with_picture(graph, "1,64,64,3", "1.0"))
    assert np.array_equal(transparent, white)


def test_a_side_of_20000_pixels_goes_through_smart_resize(client, graph, good):
    wide = with_picture(graph, "1,1000,20000,3", "0.5")
    wide["resize"] = node(
        "QwenEditSmartResize", image=["odd", 0], target="longest side", megapixels=1.0, longest_side=320, fit="pad"
    )
    wide = changed(wide, "encode", **{"pictures.picture_1": ["resize", 0]})
    result = run_fresh(client, wide)
    assert client.arrays(result)[0].shape == (32, 320, 3)
    assert "20000×1000" in note(result, "resize")


def test_references_of_different_sizes(client, good):
    pictures = [picture(0), picture(1, 96, 48), picture(2, 33, 129)]
    three = edited(client, small_edit(client, *pictures))
    assert three.shape == (64, 64, 3)
    assert not np.array_equal(three, good)


def test_more_than_three_pictures_warn(client, good):
    result = run_fresh(client, small_edit(client, *(picture(i) for i in range(4))))
    assert "Warning: 4 pictures" in note(result, "encode")


def test_an_empty_prompt_warns(client, good):
    result = run_fresh(client, small_edit(client, picture(0), prompt=" "))
    assert "Warning: the prompt is empty" in note(result, "encode")


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_a_latent_with_bad_numbers_is_refused(client, graph, good, kind):
    said = failure(client, between(graph, ("encode", 2), "ProbeDamage", "latent", kind=kind))
    assert said.startswith("[QE_NAN]")


@pytest.mark.parametrize(("kind", "shape"), [("video", "[1, 16, 3, 8, 8]"), ("empty", "[0, 16, 1, 8, 8]")])
def test_a_latent_of_another_shape_is_refused(client, graph, good, kind, shape):
    said = failure(client, between(graph, ("encode", 2), "ProbeDamage", "latent", kind=kind))
    assert said.startswith("[QE_INPUT]")
    assert shape in said


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_nan_from_the_model_makes_no_picture_and_names_attention_and_precision(client, server, graph, good, kind):
    before = set(server.output.rglob("*.png"))
    said = failure(client, between(graph, ("loader", 0), "ProbePatch", "model", kind=kind))
    assert said.startswith("[QE_NAN]")
    assert "Precision fp32" in said
    assert "attention pytorch" in said
    assert set(server.output.rglob("*.png")) == before


def test_out_of_memory_is_survived(client, graph, good):
    said = failure(client, between(graph, ("loader", 0), "ProbePatch", "model", kind="oom"))
    assert "memory" in said.lower()


# Prompts


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>"])
def test_special_tokens_in_a_prompt_are_text(client, graph, good, token):
    result = run_fresh(client, changed(graph, "encode", prompt=f"make it {token} grey"))
    assert "Special tokens in the prompt are taken as text." in note(result, "encode")
    assert client.arrays(result)[0].shape == good.shape
    assert run_fresh(client, changed(graph, "encode", negative=token)).images()


def test_an_empty_prompt_edits(client, graph, good):
    assert edited(client, changed(graph, "encode", prompt="", negative="")).shape == good.shape


def test_a_prompt_of_100k_characters_is_bounded_with_a_note(client, graph, good):
    result = run_fresh(client, changed(graph, "encode", prompt="make it grey " * 8000))
    assert "104,000 characters; the first 8,000 are used" in note(result, "encode")


def test_control_characters_and_lone_surrogates_in_a_prompt(client, graph, good):
    for prompt in ("\x00\x01\x7f", "\ud800 grey", "👩‍👩‍👧‍👦 把它变成黑白 عربى"):
        assert edited(client, changed(graph, "encode", prompt=prompt)).shape == good.shape


# Batches


def test_a_batch_of_two_pictures_is_two_edits_each_as_alone(client, good):
    pictures = [picture(0), picture(5)]
    alone = [edited(client, small_edit(client, p)) for p in pictures]
    both = small_edit(client, *pictures)
    both["batch"] = node("ImageBatch", image1=["picture_1", 0], image2=["picture_2", 0])
    both = changed(both, "encode", **{"pictures.picture_1": ["batch", 0], "pictures.picture_2": None})
    together = client.arrays(run_fresh(client, both))
    assert len(together) == 2
    assert not np.array_equal(*alone)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1 / 255


def test_lists_of_uneven_length_are_refused(client, good):
    graph = small_edit(client, picture(0), picture(1))
    graph["batch"] = node("ImageBatch", image1=["picture_1", 0], image2=["picture_2", 0])
    graph["batch3"] = node("ImageBatch", image1=["batch", 0], image2=["picture_2", 0])
    inputs = {"pictures.picture_1": ["batch", 0], "pictures.picture_2": ["batch3", 0]}
    said = failure(client, changed(graph, "encode", **inputs))
    assert said.startswith("[QE_INPUT]")
    assert "picture_2 has 3 entries, but picture_1 has 2" in said


def test_the_first_of_a_latent_batch_equals_the_single_one(client, graph, good):
    result = run_fresh(client, between(graph, ("encode", 2), "ProbeDamage", "latent", kind="twice"))
    arrays = client.arrays(result)
    assert len(arrays) == 2
    assert np.abs(arrays[0] - good).max() <= 1 / 255
    assert np.abs(arrays[1] - good).max() > 1 / 255  # noise of its own


# What other nodes put on a MODEL or its conditioning


@pytest.mark.parametrize(
    ("kind", "named"),
    [("block", "double_block patches"), ("replace", "replaced blocks"), ("attention", "an attention override")],
)
def test_patches_that_are_not_honoured_are_refused_by_name(client, graph, good, kind, named):
    said = failure(client, between(graph, ("loader", 0), "ProbePatch", "model", kind=kind))
    assert said.startswith("[QE_INPUT]")
    assert named in said


def test_a_native_patch_node_is_refused_by_name(client, graph, good):
    said = failure(client, between(graph, ("loader", 0), "TomePatchModel", "model", ratio=0.3))
    assert "[QE_INPUT]" in said
    assert "attn1_patch patches" in said


def test_a_controlnet_is_refused_by_name(client, graph, good):
    said = failure(client, between(graph, ("encode", 0), "ProbeControl", "conditioning"))
    assert said.startswith("[QE_INPUT]")
    assert "ControlNet" in said


def with_method(client, graph, method: str):
    node_type = "FluxKontextMultiReferenceLatentMethod"
    return between(graph, ("encode", 0), node_type, "conditioning", reference_latents_method=method)


@pytest.mark.parametrize(("method", "named"), [("offset", "'offset'"), ("uxo/uno", "'uxo'")])
def test_a_reference_method_that_is_not_known_is_refused(client, graph, good, method, named):
    said = failure(client, with_method(client, graph, method))
    assert said.startswith("[QE_INPUT]")
    assert f"the reference method {named}" in said


def test_the_reference_methods_of_this_family_are_honoured(client, graph, good):
    """The demo model was made with t = 0 for references, so that method changes nothing; the other does."""
    graph = changed(graph, "sampler", true_cfg_scale=1.0)
    plain = edited(client, graph)
    assert np.array_equal(edited(client, with_method(client, graph, "index_timestep_zero")), plain)
    assert not np.array_equal(edited(client, with_method(client, graph, "index")), plain)


def test_easycache_runs_on_our_model(client, server, graph, good):
    """A wrapper of kind DIFFUSION_MODEL: with a threshold of 0 nothing changes, with 3 steps are skipped."""
    graph = changed(graph, "sampler", steps=10, true_cfg_scale=1.0)
    plain = edited(client, graph)
    settings = dict(start_percent=0.0, end_percent=1.0, verbose=True)
    idle = between(graph, ("loader", 0), "EasyCache", "model", reuse_threshold=0.0, **settings)
    assert np.array_equal(edited(client, idle), plain)
    skipping = between(graph, ("loader", 0), "EasyCache", "model", reuse_threshold=3.0, **settings)
    assert edited(client, skipping).shape == plain.shape
    assert "EasyCache - skipped" in server.log.read_text(errors="replace")


def test_conditioning_of_another_encoder_is_refused(client, graph, good):
    said = failure(client, between(graph, ("encode", 0), "ProbeWiden", "conditioning"))
    assert said.startswith("[QE_INPUT]")
    assert "text encoder of another model" in said


def test_a_model_of_another_kind_is_refused(client, graph, good):
    said = failure(client, between(graph, ("loader", 0), "ProbePatch", "model", kind="foreign"))
    assert said.startswith("[QE_INPUT] This MODEL was not loaded by QwenEditLoader")


# Choices of the loader


@pytest.mark.parametrize("attention", ["cudnn", "sage", "flash4"])
def test_attention_that_does_not_run_here_falls_back_visibly(client, graph, good, attention):
    result = run_fresh(client, changed(graph, "loader", attention=attention))
    assert f"Warning: attention pytorch runs instead of {attention}" in note(result, "loader")
    assert np.array_equal(client.arrays(result)[0], good)


def test_the_loader_says_which_attention_runs_and_why(client, graph, good):
    result = run_fresh(client, changed(graph, "loader", attention="math"))
    assert "Attention math: as asked" in note(result, "loader")
    assert "Warning" not in note(result, "loader")
    # another order of additions in float32, at most one step of 255 after the VAE
    assert np.abs(client.arrays(result)[0].astype(int) - good.astype(int)).max() <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_run(client, graph, good, precision):
    result = run_fresh(client, changed(graph, "loader", precision=precision))
    (array,) = client.arrays(result)
    assert 0 < np.abs(array - good).max() < 0.1
    assert f", {precision}, " in note(result, "loader")
    assert ("fp16 overflows" in note(result, "loader")) is (precision == "fp16")


# Cancel


def interrupt_at_step(client, graph, step: int) -> list[int]:
    """Cancel when the sampler has finished `step`; the steps that were reported in all."""
    seen: list[int] = []
    prompt_id = client.queue(fresh(graph))

    def on_event(event):
        # while weights are read, the same node counts to 100
        if event.type == "progress" and event.data["node"] == "sampler" and event.data["max"] == 40:
            seen.append(event.data["value"])
            if event.data["value"] == step:
                client.interrupt(prompt_id)

    with pytest.raises(Interrupted):
        client.wait(prompt_id, on_event, timeout_s=120)
    return seen


@pytest.mark.parametrize("lora", [False, True])
def test_cancel_stops_within_a_step_and_leaves_everything_as_before(client, graph, good, models, lora):
    save_file(lora_state(1), models / "loras" / "cancelled.safetensors")
    if lora:
        graph = between(graph, ("loader", 0), "QwenEditLoraSwitch", "model", **switch_inputs("cancelled.safetensors"))
    before = edited(client, graph)
    assert np.array_equal(before, good) is not lora
    # large enough that a step outlasts the way of the cancel request through HTTP
    long = changed(changed(graph, "sampler", steps=40), "encode", width=384, height=384)
    seen = interrupt_at_step(client, long, 2)
    assert seen[-1] <= 4
    assert np.array_equal(edited(client, graph), before)


def test_cancel_while_weights_are_read(client, graph, good, models):
    demo_copy(models, "cancelled")
    loading = changed(graph, "loader", model="folder: cancelled")
    cancelled = between(loading, ("encode", 2), "ProbeCancelLoading", "value", nonce="1")
    with pytest.raises(Interrupted, match="QwenEditSampler"):
        run_fresh(client, cancelled)
    assert True in look(client)["shells"]["QwenEditModel"]  # nothing half-read
    assert np.array_equal(edited(client, loading), good)
