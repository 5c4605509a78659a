"""Step presets: everything that decides how one edit is sampled, in one frozen dataclass.

Steps and true CFG of draft, standard and high quality are what guides for this model give; their "guidance"
values (5.0, 7.0, 8.5) are not here because Qwen-Image-Edit is not guidance-distilled and ignores them (diffusers
``pipeline_qwenimage_edit_plus.py`` warns and drops the value). The schedule is the released model's
``scheduler/scheduler_config.json``; Lightning's is the one published with its LoRA (lightx2v/Qwen-Image-Lightning);
"ComfyUI template" is ComfyUI's own template for 2511.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from .errors import INPUT
from .rope import Positions
from .values import check_choice, is_number


@dataclass(frozen=True)
class DynamicShift:
    """Exponential time shift whose mu grows with the number of output tokens (diffusers ``calculate_shift``)."""

    base_shift: float = 0.5
    max_shift: float = 0.9
    base_seq_len: int = 256
    max_seq_len: int = 8192
    shift_terminal: float | None = 0.02

    def mu(self, tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_seq_len - self.base_seq_len)
        return tokens * slope + self.base_shift - slope * self.base_seq_len


@dataclass(frozen=True)
class StaticShift:
    """ComfyUI's AuraFlow shift: sigma = shift * t / (1 + (shift - 1) * t), scheduler "simple"."""

    shift: float


@dataclass(frozen=True)
class Recipe:
    """How to sample one edit.

    ``cfg_rescale``: "norm" rescales the guided velocity to the conditional's norm per token (diffusers' pipeline),
    "comfyui" is ComfyUI's CFGNorm node, "none" is plain CFG.
    """

    steps: int
    true_cfg_scale: float
    shift: DynamicShift | StaticShift = DynamicShift()
    cfg_rescale: Literal["norm", "comfyui", "none"] = "norm"
    positions: Positions = "diffusers"


STANDARD = Recipe(steps=40, true_cfg_scale=4.0)
_LIGHTNING = DynamicShift(base_shift=math.log(3), max_shift=math.log(3), shift_terminal=None)

# The order is the order of the combo on the nodes and may only grow at its end.
PRESETS: dict[str, Recipe] = {
    "draft": replace(STANDARD, steps=20, true_cfg_scale=3.0),
    "standard": STANDARD,
    "high quality": replace(STANDARD, steps=60, true_cfg_scale=5.0),
    "Lightning 8": Recipe(steps=8, true_cfg_scale=1.0, shift=_LIGHTNING),
    "Lightning 4": Recipe(steps=4, true_cfg_scale=1.0, shift=_LIGHTNING),
    "ComfyUI template": Recipe(40, 4.0, StaticShift(3.1), cfg_rescale="comfyui", positions="comfyui"),
    "custom": STANDARD,
}

MAX_STEPS = 1000
MAX_CFG = 100.0
MAX_SHIFT = 100.0


def recipe_for(preset: str, steps: int = 0, true_cfg_scale: float = 0.0, shift: float = 0.0) -> Recipe:
    """The preset's recipe with overrides; an override of 0 keeps the preset's value.

    Args:
        preset: a key of ``PRESETS``.
        shift: a static time shift (3 moves half of the steps above sigma 0.75).

    Raises:
        ValueError: an unknown preset, or a value outside its range (NaN included).
    """
    check_choice("preset", preset, PRESETS)
    if not (is_number(steps, int) and 0 <= steps <= MAX_STEPS):
        raise ValueError(f"{INPUT} steps is {steps}; it must be 0 (the preset's value) or 1 to {MAX_STEPS}.")
    if not (is_number(true_cfg_scale) and (true_cfg_scale == 0 or 1 <= true_cfg_scale <= MAX_CFG)):
        raise ValueError(
            f"{INPUT} true_cfg_scale is {true_cfg_scale}; it must be 0 (the preset's value), 1 (guidance off, twice"
            f" as fast) or a number up to {MAX_CFG:g}."
        )
    if not (is_number(shift) and 0 <= shift <= MAX_SHIFT):
        raise ValueError(f"{INPUT} shift is {shift}; it must be 0 (the preset's value) or up to {MAX_SHIFT:g}.")
    recipe = PRESETS[preset]
    return replace(
        recipe,
        steps=steps or recipe.steps,
        true_cfg_scale=true_cfg_scale or recipe.true_cfg_scale,
        shift=StaticShift(shift) if shift else recipe.shift,
    )


def dynamic_sigmas(shift: DynamicShift, steps: int, tokens: int) -> torch.Tensor:
    """Sigmas ``[steps + 1]``, float32, from 1 to 0, as diffusers' scheduler gives them to the pipeline.

    Args:
        tokens: output tokens (pixels / 256); references do not count.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if steps == 1:  # nothing to stretch: diffusers divides zero by zero here
        return torch.tensor([1.0, 0.0])
    # diffusers annotates shift_terminal as float and sigmas as optional; None and a tensor are what they are here.
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift_terminal=shift.shift_terminal,  # pyright: ignore[reportArgumentType]
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=shift.mu(tokens))
    return scheduler.sigmas


def sigma_table(shift: DynamicShift, steps: int, tokens: int) -> torch.Tensor:
    """The same schedule as a fine ascending table ``[steps * k]`` of about 10,000 sigmas, float32.

    Every k-th entry from the top is a sigma of ``dynamic_sigmas``. Formulas: ``time_shift`` (exponential) and
    ``stretch_shift_to_terminal`` of diffusers' ``FlowMatchEulerDiscreteScheduler``; the stretch depends on the
    number of steps.
    """
    size = steps * math.ceil(10_000 / steps)
    power = math.exp(shift.mu(tokens))
    t = torch.arange(1, size + 1, dtype=torch.float64) / size
    shifted = power / (power + 1 / t - 1)
    if shift.shift_terminal is not None and steps > 1:
        last = power / (power + steps - 1)
        shifted = 1 - (1 - shifted) * (1 - shift.shift_terminal) / (1 - last)
    return shifted.clamp_min(1e-6).float()


def rescale_to_cond(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """True CFG whose result has, in every 2x2 patch, the norm of the conditional prediction.

    The same as diffusers' rescale over the last dimension of the packed velocity. Any common factor (ComfyUI
    hands over sigma times the velocity) cancels out of the ratio.

    Args:
        cond, uncond: ``[B, 16, 1, h, w]``; odd h or w are padded for the norm, as packing pads them.
    """
    guided = uncond + scale * (cond - uncond)
    return guided * (_patch_norm(cond) / _patch_norm(guided).clamp_min(1e-12))


def _patch_norm(x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[-2:]
    squared = torch.nn.functional.pad(x.square().sum(dim=1, keepdim=True), (0, width % 2, 0, height % 2))
    patches = squared.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).sum(dim=(-3, -1))
    norm = patches.sqrt().repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    return norm[..., :height, :width]
