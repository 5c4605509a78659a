"""Recipes carried out by ComfyUI's sampler: schedule, guidance, progress, preview and cancel are borrowed."""

import math
from collections.abc import Callable, Sequence

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_cfg import CFGNorm
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

from ...qwen_edit.doctor import Finding, examine_model, examine_run
from ...qwen_edit.errors import INPUT, NAN
from ...qwen_edit.finite import all_finite
from ...qwen_edit.perf import record_step
from ...qwen_edit.recipes import DynamicShift, Recipe, dynamic_sigmas, rescale_to_cond, sigma_table
from ...qwen_edit.values import check_kind
from .doctor import report
from .facts import facts_of_model, log_run, run_facts
from .forward import STEPS, KnownSteps
from .model import HostTransformer, with_positions
from .reference_cache import KEY as REFERENCES
from .status import count


def examine(model, recipe: Recipe) -> list[Finding]:
    """The doctor's findings for the node that samples by this recipe, or prepares it.

    Raises:
        ValueError: the MODEL is of another family.
    """
    require_ours(model)
    facts = facts_of_model(model)
    return report(examine_run(run_facts(model, recipe)), unseen=examine_model(facts))


def apply_recipe(model, latent: dict, recipe: Recipe):
    """A clone of ``model`` that samples by the recipe, and its sigmas ``[steps + 1]``.

    The clone carries guidance rescale, positions and the shifted schedule, so that ComfyUI's own samplers give the
    same picture with it (KSampler: euler, scheduler "simple").

    Raises:
        ValueError: the MODEL is of another family or the LATENT of another shape.
    """
    require_ours(model)
    return _prepare(model, native_latent(model, latent), recipe)


def _prepare(model, latent: dict, recipe: Recipe):
    clone = with_positions(model, recipe.positions)
    if recipe.cfg_rescale == "norm":
        clone.set_model_sampler_cfg_function(_rescaled_cfg)
    elif recipe.cfg_rescale == "comfyui":
        clone = CFGNorm.execute(clone, 1.0).args[0]
    if isinstance(recipe.shift, DynamicShift):
        tokens = math.ceil(latent["samples"].shape[-2] / 2) * math.ceil(latent["samples"].shape[-1] / 2)
        sigmas = dynamic_sigmas(recipe.shift, recipe.steps, tokens)
        clone.add_object_patch("model_sampling", _ShiftedTable(recipe.shift, recipe.steps, tokens))
    else:
        clone = ModelSamplingAuraFlow().patch_aura(clone, recipe.shift.shift)[0]
        sampling = clone.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", recipe.steps)
    return clone, sigmas


def sample(
    model, positive, negative, latent: dict, recipe: Recipe, seed: int | Sequence[int], callback: Callable | None = None
) -> dict:
    """One edit, or several of equal size in one forward: LATENT in, LATENT out, with ComfyUI's preview and cancel.

    Args:
        seed: of one edit, or one for each picture of the LATENT, whose noise is then the same as alone.
        callback: takes (step, x0, x, steps) after each step; None: ComfyUI's progress bar for these steps.

    Raises:
        ValueError: the result holds NaN or infinity; the message names attention and precision.
    """
    require_ours(model)
    for name, conditioning in (("positive", positive), ("negative", negative)):
        check_kind(name, conditioning, list, "a CONDITIONING")
    log_run(model, recipe)
    latent = native_latent(model, latent)
    prepared, sigmas = _prepare(model, latent, recipe)
    samples = latent["samples"]
    steps = KnownSteps(sigmas.tolist())
    if not _timesteps_may_change(prepared):
        prepared.model_options["transformer_options"][STEPS] = steps
    if isinstance(seed, int):
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    else:
        each = zip(samples.split(1), seed, strict=True)
        noise = torch.cat([comfy.sample.prepare_noise(picture, own) for picture, own in each])
    result = comfy.sample.sample_custom(
        prepared,
        noise,
        recipe.true_cfg_scale,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        _on_card(positive, prepared.load_device),
        _on_card(negative, prepared.load_device),
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=_counted(callback or latent_preview.prepare_callback(prepared, recipe.steps), steps),
        seed=seed if isinstance(seed, int) else seed[0],  # euler draws no more noise
    )
    check_finite(result, model)
    count("edits", len(result))
    return latent | {"samples": result}


def _on_card(conditioning: list, device: torch.device) -> list:
    """Text and references where the forward takes them. From RAM ComfyUI joins and copies them in every step, and as that
    memory is not pinned, the next step is prepared only when the card is done with the one before."""
    result = []
    for embeds, values in conditioning:
        if "reference_latents" in values:
            values = values | {"reference_latents": [latent.to(device) for latent in values["reference_latents"]]}
        result.append([embeds.to(device), values])
    return result


def join(conditionings: Sequence[list]) -> list:
    """The CONDITIONINGs of several edits as one for all of them in one forward (see ``joins``)."""
    if len(conditionings) == 1:
        return conditionings[0]
    embeds, values = zip(*(conditioning[0] for conditioning in conditionings), strict=True)
    references = [torch.cat(same) for same in zip(*(value["reference_latents"] for value in values), strict=True)]
    return [[torch.cat(embeds), values[0] | {"reference_latents": references}]]


def joins(conditioning: list) -> tuple:
    """Equal for CONDITIONINGs that one forward can take together without padding, which would cost a mask in attention."""
    embeds, values = conditioning[0]
    others = tuple(sorted((name, id(value)) for name, value in values.items() if name != "reference_latents"))
    return embeds.shape, tuple(latent.shape for latent in values["reference_latents"]), others


def _timesteps_may_change(model) -> bool:
    """Whether somebody else's wrapper stands between the sampler and the forward, and could ask for another timestep."""
    others = any(key != REFERENCES for by_key in model.wrappers.values() for key in by_key)
    return others or "model_function_wrapper" in model.model_options


def _counted(callback, steps: KnownSteps):
    """ComfyUI's callback (progress, preview), with each step in the performance log."""

    def each_step(step, x0, x, total_steps):
        steps.done = step + 1
        callback(step, x0, x, total_steps)
        record_step()

    return each_step


def require_ours(model) -> None:
    """Raise a ValueError unless the MODEL holds our transformer."""
    check_kind("model", model, ModelPatcher, "a MODEL")
    if not isinstance(model.model.diffusion_model, HostTransformer):
        raise ValueError(
            f"{INPUT} This MODEL was not loaded by QwenEditLoader. Load the model with it, or use ComfyUI's own nodes."
        )


def native_latent(model, latent: dict) -> dict:
    """The LATENT as ``[B, 16, 1, h, w]``; empty ones of other nodes are brought to this shape as KSampler does.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    check_kind("latent", latent, dict, "a LATENT")
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    if samples.ndim != 5 or samples.shape[1] != 16 or samples.shape[2] != 1 or 0 in samples.shape:
        raise ValueError(
            f"{INPUT} The LATENT is {list(samples.shape)}; this model needs [batch, 16, 1, height/8, width/8]."
            " Connect the one from QwenEditEncode."
        )
    if not all_finite(samples):
        raise ValueError(f"{NAN} The LATENT that goes in holds NaN or infinity.")
    return {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")} | {"samples": samples}


def check_finite(samples: torch.Tensor, model) -> None:
    if all_finite(samples):
        return
    transformer: HostTransformer = model.model.diffusion_model
    precision = transformer.precision
    attention = transformer.attention.name
    hint = ""
    if precision.dtype == torch.float16:
        hint = " fp16 overflows in this model; choose bf16."
    elif precision.form is not None:
        hint = " Choose profile 'quality'."
    elif attention not in ("pytorch", "math"):
        hint = " Choose attention 'pytorch'."
    raise ValueError(
        f"{NAN} The result holds NaN or infinity, so no picture was made from it. Precision {precision.name}, attention"
        f" {attention}.{hint} If a LoRA is active, try without it."
    )


def _rescaled_cfg(args: dict) -> torch.Tensor:
    if math.isclose(args["cond_scale"], 1.0):
        return args["cond"]
    return rescale_to_cond(args["cond"], args["uncond"], args["cond_scale"])


class _ShiftedTable(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """ComfyUI's sampling object with the recipe's schedule as its table, so that the scheduler "simple" of native
    samplers picks the recipe's own sigmas at the recipe's number of steps."""

    def __init__(self, shift: DynamicShift, steps: int, tokens: int):
        super().__init__()
        self.register_buffer("sigmas", sigma_table(shift, steps, tokens))

    def percent_to_sigma(self, percent):
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        return self.sigmas[round((1.0 - percent) * (len(self.sigmas) - 1))].item()
