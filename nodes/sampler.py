"""QwenEditSampler and QwenEditStepPreset: one edit by a step preset."""

from comfy_api.latest import io

from ..qwen_edit.needs import explained_imports
from ..qwen_edit.recipes import MAX_CFG, MAX_SHIFT, MAX_STEPS, PRESETS, Recipe, StaticShift, recipe_for
from ..qwen_edit.values import check_whole
from .host.doctor import Report

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def preset_input() -> io.Combo.Input:
    """The combo that chooses a recipe, the same on every node that has one."""
    return io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default="standard",
        tooltip="draft: 20 steps, CFG 3. standard: 40, CFG 4 (the released settings). high quality: 60, CFG 5. Lightning:"
        " 8 or 4 steps without CFG, needs the Lightning LoRA. ComfyUI template: shift 3.1, CFGNorm, as ComfyUI's own"
        " workflow for this model. custom: standard with your overrides.",
    )


def recipe_overrides() -> list[io.Input]:
    """The inputs that replace single values of the preset's recipe."""
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=MAX_STEPS,
            advanced=True,
            tooltip="0: the preset's number of steps.",
        ),
        io.Float.Input(
            "true_cfg_scale",
            default=0.0,
            min=0.0,
            max=MAX_CFG,
            step=0.1,
            advanced=True,
            tooltip="True classifier-free guidance. 0: the preset's value. 1: off, twice as fast.",
        ),
        io.Float.Input(
            "shift",
            default=0.0,
            min=0.0,
            max=MAX_SHIFT,
            step=0.01,
            advanced=True,
            tooltip="A fixed time shift. 0: the preset's (dynamic: it grows with the size of the picture).",
        ),
    ]


def summary(recipe: Recipe) -> str:
    guidance = "guidance off" if recipe.true_cfg_scale == 1 else f"true CFG {recipe.true_cfg_scale:g}"
    shift = f"shift {recipe.shift.shift:g}" if isinstance(recipe.shift, StaticShift) else "dynamic shift"
    return f"{recipe.steps} step{'s' if recipe.steps > 1 else ''}, {guidance}, {shift}"


class QwenEditSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditSampler",
            display_name="Qwen Edit Sampler",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="Makes the edit, by a step preset. Draft first, then high quality with the same seed: the"
            " prompt is not encoded again.",
            search_aliases=["ksampler", "steps", "cfg", "lightning", "draft", "image edit"],
            inputs=[
                io.Model.Input("model", tooltip="From Qwen Edit Loader, with or without LoRAs."),
                io.Conditioning.Input("positive", tooltip="From Qwen Edit Encode."),
                io.Conditioning.Input("negative", tooltip="From Qwen Edit Encode. Not used when guidance is off."),
                io.Latent.Input("latent", tooltip="The size of the result; from Qwen Edit Encode."),
                preset_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The noise to start from. Equal seed, equal settings: equal picture.",
                ),
                *recipe_overrides(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, preset, seed, steps=0, true_cfg_scale=0.0, shift=0.0
    ) -> io.NodeOutput:
        check_whole("seed", seed, 0, MAX_SEED)
        with explained_imports():  # it brings diffusers: only when a node runs
            from .host import sampling

        recipe = recipe_for(preset, steps, true_cfg_scale, shift)
        findings = sampling.examine(model, recipe)
        result = sampling.sample(model, positive, negative, latent, recipe, seed)
        return io.NodeOutput(result, ui=Report([summary(recipe), *findings]))


class QwenEditStepPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditStepPreset",
            display_name="Qwen Edit Step Preset",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="The presets of Qwen Edit Sampler for ComfyUI's own samplers: connect MODEL and either SIGMAS"
            " (SamplerCustom) or steps and cfg (KSampler with euler and simple).",
            search_aliases=["ksampler", "sigmas", "scheduler", "shift", "lightning"],
            inputs=[
                io.Model.Input("model", tooltip="From Qwen Edit Loader."),
                io.Latent.Input("latent", tooltip="The schedule depends on the size of the picture."),
                preset_input(),
                *recipe_overrides(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Sigmas.Output(display_name="SIGMAS"),
                io.Int.Output(display_name="steps"),
                io.Float.Output(display_name="cfg"),
            ],
        )

    @classmethod
    def execute(cls, model, latent, preset, steps=0, true_cfg_scale=0.0, shift=0.0) -> io.NodeOutput:
        with explained_imports():
            from .host import sampling

        recipe = recipe_for(preset, steps, true_cfg_scale, shift)
        findings = sampling.examine(model, recipe)
        prepared, sigmas = sampling.apply_recipe(model, latent, recipe)
        report = Report([summary(recipe), *findings])
        return io.NodeOutput(prepared, sigmas, recipe.steps, recipe.true_cfg_scale, ui=report)
