"""Presets and schedules against diffusers' pipeline and scheduler."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

from qwen_edit.recipes import PRESETS, DynamicShift, dynamic_sigmas, recipe_for, rescale_to_cond, sigma_table

SCHEDULER = Path(__file__).parents[1] / "demo_model" / "scheduler"


def test_the_presets_are_those_of_the_document():
    values = {name: (r.steps, r.true_cfg_scale) for name, r in PRESETS.items()}
    assert values == {
        "draft": (20, 3.0),
        "standard": (40, 4.0),
        "high quality": (60, 5.0),
        "Lightning 8": (8, 1.0),
        "Lightning 4": (4, 1.0),
        "ComfyUI template": (40, 4.0),
        "custom": (40, 4.0),
    }


@pytest.mark.parametrize("steps", [2, 4, 20, 40, 60])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 9216])
def test_sigmas_are_those_of_the_pipeline(steps, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        json.loads((SCHEDULER / "scheduler_config.json").read_text())
    )
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    torch.testing.assert_close(dynamic_sigmas(DynamicShift(), steps, tokens), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_one_step_goes_from_noise_to_picture():
    """diffusers' scheduler gives NaN here (it stretches by zero over zero)."""
    assert dynamic_sigmas(DynamicShift(), 1, 256).tolist() == [1.0, 0.0]
    assert sigma_table(DynamicShift(), 1, 256)[-1] == 1.0


@pytest.mark.parametrize("preset", ["standard", "high quality", "Lightning 4"])
def test_the_table_holds_the_schedule(preset):
    """Picking from the table as ComfyUI's scheduler "simple" does gives the recipe's sigmas."""
    recipe = PRESETS[preset]
    table = sigma_table(recipe.shift, recipe.steps, 4096)
    picked = [float(table[-(1 + int(i * len(table) / recipe.steps))]) for i in range(recipe.steps)]
    torch.testing.assert_close(
        torch.tensor([*picked, 0.0]), dynamic_sigmas(recipe.shift, recipe.steps, 4096), rtol=1e-6, atol=1e-6
    )


def test_lightning_shifts_by_three():
    sigmas = dynamic_sigmas(PRESETS["Lightning 4"].shift, 4, 4096)
    expected = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-6)


def test_overrides():
    recipe = recipe_for("draft", steps=7, true_cfg_scale=2.5)
    assert (recipe.steps, recipe.true_cfg_scale, recipe.shift) == (7, 2.5, PRESETS["draft"].shift)
    assert recipe_for("draft") == PRESETS["draft"]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"preset": "fast"}, "preset"),
        ({"steps": -1}, "steps"),
        ({"steps": 100_000}, "steps"),
        ({"true_cfg_scale": math.nan}, "true_cfg_scale"),
        ({"true_cfg_scale": math.inf}, "true_cfg_scale"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale"),
        ({"shift": math.nan}, "shift"),
        ({"shift": -3.0}, "shift"),
    ],
)
def test_bad_values_are_named(overrides, word):
    with pytest.raises(ValueError, match=rf"\[QE_INPUT\].*{word}"):
        recipe_for(**{"preset": "standard"} | overrides)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_rescale_is_the_pipelines_on_packed_velocity(size):
    height, width = size
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 16, 1, height, width, generator=generator) for _ in range(2))
    got = rescale_to_cond(cond, uncond, 4.0)

    def pack(x):
        x = torch.nn.functional.pad(x[:, :, 0], (0, width % 2, 0, height % 2))
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4)

    packed_cond, packed_uncond = pack(cond), pack(uncond)
    guided = packed_uncond + 4.0 * (packed_cond - packed_uncond)
    expected = guided * (packed_cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(pack(got), expected, rtol=1e-5, atol=1e-6)
