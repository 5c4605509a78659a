"""The demo model as it ships: its shape, its limits, and that it edits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import held_out_photograph
from training.instructions import EXACT, psnr
from training.pipeline import load_reference_pipeline, reference_area

FOLDER = Path(__file__).parents[1] / "demo_model"
RESULTS = Path(__file__).parents[1] / "training" / "results" / "demo_model.json"


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    return load_reference_pipeline(FOLDER)


def edit(pipeline, pictures: list[np.ndarray], prompt: str, steps: int = 4, scale: float = 1.0) -> np.ndarray:
    """The pipeline's picture `[H, W, 3]` in [0, 1], reference grid = output grid."""
    height, width = pictures[0].shape[:2]
    with reference_area(height * width):
        result = pipeline(
            image=[Image.fromarray(p) for p in pictures],
            prompt=prompt,
            negative_prompt=" " if scale > 1 else None,
            true_cfg_scale=scale,
            num_inference_steps=steps,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
    return result.images[0]


def test_sizes():
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 24 * 2**20
    assert max(f.stat().st_size for f in files) <= 15 * 2**20


def test_classes():
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImageEditPlusPipeline"
    assert {k: v[1] for k, v in index.items() if not k.startswith("_")} == {
        "processor": "Qwen2VLProcessor",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }


def test_configuration(pipeline):
    assert pipeline.transformer.config.zero_cond_t
    assert pipeline.transformer.config.in_channels == 64
    assert pipeline.vae.config.num_res_blocks == 2
    assert list(pipeline.vae.config.dim_mult) == [1, 2, 4, 4]
    scheduler = pipeline.scheduler.config
    assert (scheduler.base_shift, scheduler.max_shift, scheduler.shift_terminal) == (0.5, 0.9, 0.02)


def test_template_is_64_tokens(pipeline):
    prefix = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(prefix)["input_ids"]) == pipeline.prompt_template_encode_start_idx == 64


def test_any_text_tokenizes(pipeline):
    text = "".join(chr(i) for i in range(1, 0x1_8000) if not 0xD800 <= i < 0xE000) + "编辑 🖼️ " * 1000
    ids = pipeline.tokenizer(text)["input_ids"]
    assert max(ids) < len(pipeline.tokenizer)
    assert pipeline.tokenizer.unk_token_id not in ids


def test_user_text_cannot_add_pictures(pipeline):
    ids = pipeline.tokenizer("<|image_pad|>", split_special_tokens=True)["input_ids"]
    assert pipeline.text_encoder.config.image_token_id not in ids


def test_preview_factors():
    factors = json.loads((FOLDER / "vae" / "preview_factors.json").read_text())
    assert np.shape(factors["latent_rgb_factors"]) == (16, 3)
    assert np.shape(factors["latent_rgb_factors_bias"]) == (3,)


def test_vae_reconstructs(pipeline):
    photograph = held_out_photograph("astronaut")
    tensor = torch.from_numpy(photograph).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(tensor).latent_dist.mode()
        decoded = pipeline.vae.decode(latents).sample[0, :, 0].permute(1, 2, 0)
    assert psnr((decoded.numpy() + 1) / 2, photograph / 255) > 25.5
    mean, std = (np.array(pipeline.vae.config[k]) for k in ("latents_mean", "latents_std"))
    normalized = (latents[0, :, 0].numpy() - mean[:, None, None]) / std[:, None, None]
    assert 0.5 < normalized.std() < 2


def test_two_pictures(pipeline):
    pictures = [held_out_photograph(n) for n in ("astronaut", "chelsea")]
    result = edit(pipeline, pictures, EXACT["halves"].prompts[0])
    assert psnr(result, EXACT["halves"].apply(*pictures)) > 24


@pytest.mark.parametrize("style", ["pencil_sketch", "warm_film"])
def test_loras_name_layers_of_the_transformer(pipeline, style):
    from safetensors import safe_open

    names = {n for n, m in pipeline.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    with safe_open(FOLDER / "loras" / f"qwen_edit_demo_{style}.safetensors", "pt") as file:
        assert "lora_adapter_metadata" in file.metadata()
        for key in file.keys():  # noqa: SIM118 - not a dict
            layer, _ = key.removeprefix("transformer.").rsplit(".lora_", 1)
            assert layer in names


@pytest.mark.parametrize("name", ["grey", "sepia", "darken"])
def test_exact_instructions_on_a_photograph_never_seen(pipeline, name):
    """The edit is near its exact answer, and far nearer than another instruction's result."""
    picture = held_out_photograph("chelsea", 128, 128)
    answer = EXACT[name].apply(picture)
    right = psnr(edit(pipeline, [picture], EXACT[name].prompts[0]), answer)
    wrong = psnr(edit(pipeline, [picture], EXACT["invert"].prompts[0]), answer)
    assert right >= 22
    assert right >= wrong + 6


def test_it_is_in_the_registry_package():
    """The templates open with it, so who installs by ComfyUI Manager needs it too."""
    ignored = (FOLDER.parent / ".comfyignore").read_text("utf-8").splitlines()
    assert not [line for line in ignored if line.startswith("demo_model")]
