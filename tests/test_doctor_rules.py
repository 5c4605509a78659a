"""Every rule of the doctor finds what it is for, and nothing in a sound edit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_edit.doctor import (
    MODEL_RULES,
    NO_MARK,
    RUN_RULES,
    VAE_RULES,
    LoraFacts,
    ModelFacts,
    RunFacts,
    VaeFacts,
    examine_model,
    examine_run,
    examine_vae,
    is_lightning,
    lightning_steps,
    without_paths,
)
from qwen_edit.recipes import PRESETS

MODEL = ModelFacts(
    model="qwen_image_edit_2511_bf16",
    version="2511",
    version_by="the file's mark",
    precision="bf16",
    attention="cudnn",
    attention_wanted="auto",
    attention_why="measured",
    attention_fell_back=False,
    kernels="triton",
    kernels_why="runs",
    kernels_fell_back=False,
)
RUN = RunFacts(MODEL.model, "2511", 40, 4.0)
VAE = VaeFacts("qwen_image_vae.safetensors", "comfy.ldm.wan.vae.WanVAE", True)
FAST = "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16"
FUSED = "qwen_image_edit_2511_fp8_e4m3fn_scaled_lightning_8steps_v1.0"
LORA = LoraFacts(f"{FAST}.safetensors", 1.0, 720)
STYLE = LoraFacts("film.safetensors", 1.0, 720)
LIGHTNING = replace(RUN, steps=4, true_cfg_scale=1.0, loras=(LORA,))

# code -> facts with it, facts next to them without it, what the sentence tells to do
MODEL_CASES = {
    "version-guessed": ({"version": "2509", "version_by": None}, {"version_by": "model_version"}, "model_version"),
    "mark-missing": ({"version_by": "the file's name"}, {"version_by": "the file's name", "version": "2509"}, "2509"),
    "mark-ignored": (
        {"version": "2509", "version_by": NO_MARK},
        {"version": "2509", "version_by": NO_MARK, "model": "qwen_image_edit_2509_bf16"},
        "load it with Qwen Edit Loader",
    ),
    "attention-fell-back": (
        {"attention": "pytorch", "attention_wanted": "sage", "attention_fell_back": True},
        {"attention": "pytorch", "attention_wanted": "pytorch"},
        "Choose attention 'auto'",
    ),
    "kernels-fell-back": ({"kernels_fell_back": True}, {"kernels": "pytorch"}, "slower"),
    "fp16": ({"precision": "fp16"}, {"precision": "fp8"}, "choose precision bf16"),
    "sage": ({"attention": "sage"}, {"attention": "flash"}, "'pytorch'"),
    "server-flags": ({"flags": ("--fast fp16_accumulation",)}, {"flags": ()}, "start it without"),
}
RUN_CASES = {
    "lightning-twice": (
        replace(LIGHTNING, model=FUSED, loras=(LORA,), steps=8),
        replace(LIGHTNING, model=FUSED, loras=(STYLE,), steps=8),
        "switch the Lightning LoRA off",
    ),
    "lightning-cfg": (replace(LIGHTNING, true_cfg_scale=4.0), LIGHTNING, "'Lightning 4'"),
    "lightning-steps": (replace(LIGHTNING, steps=20), replace(LIGHTNING, steps=8), "'Lightning 4'"),
    "lightning-missing": (replace(LIGHTNING, loras=(STYLE,)), LIGHTNING, "4-step Lightning LoRA on"),
    "lora-other-model": (
        replace(RUN, loras=(replace(STYLE, applied=300, skipped=100),)),
        replace(RUN, loras=(replace(STYLE, applied=301, skipped=99),)),
        "switch it off",
    ),
    "lora-strengths": (
        replace(RUN, loras=(STYLE, replace(STYLE, strength=-1.1))),
        replace(LIGHTNING, loras=(LORA, STYLE, STYLE)),
        "lower them",
    ),
}
VAE_CASES = {
    "vae-family": (replace(VAE, kind="AutoencoderKL", of_this_family=False), VAE, "qwen_image_vae"),
    "vae-statistics": (replace(VAE, replaces_that_of="my folder"), VAE, "'from the model folder'"),
}


def codes(findings) -> list[str]:
    return [finding.code for finding in findings]


def check(findings, code: str, tells: str) -> None:
    assert codes(findings) == [code]
    assert tells in findings[0].sentence
    assert findings[0].line in (f"Warning: {findings[0].sentence}", f"Note: {findings[0].sentence}")
    assert "\n" not in findings[0].line


@pytest.mark.parametrize("code", MODEL_CASES)
def test_rules_for_a_model(code):
    found, sound, tells = MODEL_CASES[code]
    check(examine_model(replace(MODEL, **found)), code, tells)
    assert examine_model(replace(MODEL, **sound)) == ()


@pytest.mark.parametrize("code", RUN_CASES)
def test_rules_for_a_run(code):
    found, sound, tells = RUN_CASES[code]
    check(examine_run(found), code, tells)
    assert examine_run(sound) == ()


@pytest.mark.parametrize("code", VAE_CASES)
def test_rules_for_a_vae(code):
    found, sound, tells = VAE_CASES[code]
    check(examine_vae(found), code, tells)
    assert examine_vae(sound) == ()


def test_every_rule_has_a_case():
    assert [len(MODEL_CASES), len(RUN_CASES), len(VAE_CASES)] == [len(MODEL_RULES), len(RUN_RULES), len(VAE_RULES)]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_as_they_are_meant_leave_nothing_to_say(preset):
    recipe = PRESETS[preset]
    run = replace(RUN, steps=recipe.steps, true_cfg_scale=recipe.true_cfg_scale)
    if recipe.true_cfg_scale == 1:
        run = replace(run, loras=(LoraFacts(f"Qwen-Image-Edit-2511-Lightning-{recipe.steps}steps.safetensors", 1.0),))
    assert examine_run(run) == ()


@pytest.mark.parametrize("steps", [2, 4, 8, 9, 40])
def test_an_8_step_file_runs_with_5_to_16_steps(steps):
    run = replace(LIGHTNING, model=FUSED, loras=(), steps=steps)
    assert codes(examine_run(run)) == ([] if 4 < steps <= 16 else ["lightning-steps"])


def test_weights_changed_by_something_without_a_name_may_be_lightning():
    assert examine_run(replace(LIGHTNING, loras=(), other_patches=True)) == ()


def test_two_lightning_loras_are_one_too_many():
    twice = replace(LIGHTNING, loras=(LORA, replace(LORA, name="Lightning-8steps.safetensors")))
    assert codes(examine_run(twice)) == ["lightning-twice"]


@pytest.mark.parametrize(
    ("name", "steps"),
    [(FAST, (4,)), (FUSED, (8,)), ("my 4-step mix", (4,)), ("LIGHTNING_v2", (4, 8)), ("turbo-8step", (8,))],
)
def test_names_of_lightning_files(name, steps):
    assert is_lightning(name)
    assert lightning_steps(name) == steps


@pytest.mark.parametrize(
    "name", ["film_4000steps", "film_v4_steps200", "qwen_image_edit_2511_bf16", "48steps", "x4.8steps"]
)
def test_names_of_other_files(name):
    assert not is_lightning(name)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("tuned file /home/me/ComfyUI/user/attention.json is old", "tuned file attention.json is old"),
        (r"(C:\Users\me\attention.json) says", "(attention.json) says"),
        ("ImportError: '/usr/lib/x/libcuda.so.1': no file", "ImportError: 'libcuda.so.1': no file"),
        ("and/or, 561 TFLOP/s, bf16 (or fp32)", "and/or, 561 TFLOP/s, bf16 (or fp32)"),
    ],
)
def test_paths_are_cut_down_to_file_names(text, public):
    assert without_paths(text) == public


def test_known_folders_with_spaces_are_cut_too():
    assert without_paths("file /home/my models/user/a.json", "/home/my models/user/") == "file a.json"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_finding_has_a_name_for_the_page(language: str):
    texts = Path(__file__).resolve().parents[1] / "locales" / language / "main.json"
    names = json.loads(texts.read_text("utf-8"))["qwenEditFast"]["findings"]
    assert names.keys() == MODEL_CASES.keys() | RUN_CASES.keys() | VAE_CASES.keys()
    assert all(names.values())
