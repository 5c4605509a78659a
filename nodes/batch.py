"""QwenEditBatch: a folder or a manifest of edits, written as they finish; started again, it goes on where it was."""

import time

from comfy_api.latest import io

from ..qwen_edit.doctor import examine_vae
from ..qwen_edit.manifest import NOT_IDENTITY, Defaults, settings_of
from ..qwen_edit.needs import explained_imports
from ..qwen_edit.recipes import recipe_for
from ..qwen_edit.values import check_choice, check_kind, check_number, check_whole
from .host.encoding import MAX_SIDE, REFERENCE_SIZES, check_size, require_clip
from .sampler import MAX_SEED, preset_input, recipe_overrides, summary

MAX_MEGAPIXELS = 4.0
MAX_WAVE = 64
MAX_TOGETHER = 16


class QwenEditBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditBatch",
            display_name="Qwen Edit Batch",
            category="Qwen Edit Fast",
            description="Any number of edits in one run: a folder of pictures with one prompt, or a manifest with a picture,"
            " prompt, seed and size on each line. Results are written as they finish. A bad item is reported and skipped;"
            " a run that was stopped goes on where it was.",
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.dynprompt, io.Hidden.unique_id],
            search_aliases=["folder", "manifest", "csv", "queue", "many pictures", "批处理", "文件夹"],
            inputs=[
                io.Model.Input("model", tooltip="From Qwen Edit Loader, with or without LoRAs."),
                io.Clip.Input("clip", tooltip="From Qwen Edit Loader or any loader of qwen_2.5_vl_7b."),
                io.Vae.Input("vae", tooltip="From Qwen Edit Loader or any loader of qwen_image_vae."),
                io.String.Input(
                    "source",
                    default="",
                    tooltip="In ComfyUI's input folder: a folder of pictures, or a manifest (.csv or .jsonl) with one edit on"
                    " each line. Empty: the pictures of the input folder itself.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What to change, for items that have no prompt of their own.",
                ),
                io.String.Input(
                    "negative",
                    default=" ",
                    advanced=True,
                    tooltip="The negative prompt, for items that have none of their own.",
                ),
                preset_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="For items that have no seed of their own. Another seed makes new results, so keep it fixed to go on"
                    " with a run.",
                ),
                io.Float.Input(
                    "megapixels",
                    default=1.0,
                    min=0.0,
                    max=MAX_MEGAPIXELS,
                    step=0.01,
                    tooltip="Area of the results, in picture 1's aspect ratio. The model likes 1.0. 0: picture 1's own size.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    step=16,
                    advanced=True,
                    tooltip="Pixels of the results, for items that have no size of their own. 0: as megapixels says.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    step=16,
                    advanced=True,
                    tooltip="Pixels of the results, for items that have no size of their own. 0: as megapixels says.",
                ),
                io.Combo.Input(
                    "reference_size",
                    options=list(REFERENCE_SIZES),
                    default=REFERENCE_SIZES[0],
                    advanced=True,
                    tooltip="As on Qwen Edit Encode. output grid: picture 1 gets the result's size, so that pixels line up.",
                ),
                io.String.Input(
                    "output",
                    default="qwen_edit_batch",
                    tooltip="The folder in ComfyUI's output folder. What is there already is not made again. Only one server"
                    " may write into it.",
                ),
                *recipe_overrides(),
                io.Int.Input(
                    "wave",
                    default=4,
                    min=1,
                    max=MAX_WAVE,
                    advanced=True,
                    tooltip="Items that are encoded before they are sampled. More: the text encoder and the transformer take"
                    " turns on a small card less often. As many again are read ahead into RAM.",
                ),
                io.Int.Input(
                    "together",
                    default=0,
                    min=0,
                    max=MAX_TOGETHER,
                    advanced=True,
                    tooltip="Items of equal size and length of prompt in one forward, at most a wave. 0: up to 4 while they"
                    " together have at most a megapixel, which is faster. 1: one by one, the same picture to the last bit as"
                    " alone.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Int.Output(display_name="written"),
                io.Int.Output(display_name="already there"),
                io.Int.Output(display_name="failed"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> int:
        return time.time_ns()  # files come and go: every run looks, and makes what is not there

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        source,
        prompt,
        negative,
        preset,
        seed,
        megapixels,
        width,
        height,
        reference_size,
        output,
        steps=0,
        true_cfg_scale=0.0,
        shift=0.0,
        wave=4,
        together=0,
    ) -> io.NodeOutput:
        check_whole("seed", seed, 0, MAX_SEED)
        check_whole("wave", wave, 1, MAX_WAVE)
        check_whole("together", together, 0, MAX_TOGETHER)
        check_number("megapixels", megapixels, 0, MAX_MEGAPIXELS)
        check_size(width, height)
        check_choice("reference_size", reference_size, REFERENCE_SIZES)
        for name, value in (("source", source), ("prompt", prompt), ("negative", negative), ("output", output)):
            check_kind(name, value, str, "a text")
        require_clip(clip)
        with explained_imports():  # they bring diffusers: only when a node runs
            from .host import batch, batch_files, sampling
            from .host.doctor import Report, report
            from .host.vae import vae_facts

        recipe = recipe_for(preset, steps, true_cfg_scale, shift)
        findings = [*report(examine_vae(vae_facts(vae))), *sampling.examine(model, recipe)]
        items, base = batch_files.items_of(source, Defaults(prompt, negative, seed, width, height))
        folder = batch_files.output_folder(output)
        hidden = cls.hidden
        settings = batch.Settings(
            recipe=recipe,
            reference_size=reference_size,
            megapixels=megapixels,
            wave=wave,
            together=together,
            identity=settings_of(hidden.dynprompt.get_node, hidden.unique_id, NOT_IDENTITY),
            metadata={"prompt": hidden.prompt} | (hidden.extra_pnginfo or {}),
        )
        tally = batch.Batch(model, clip, vae, settings, base, folder).run(items)
        text = tally.report(len(items))
        shown = Report([summary(recipe), *findings, text]).as_dict() | {
            "images": batch_files.shown(folder, tally.latest),
            "failed": [{"line": bad.line, "reason": bad.reason} for bad in tally.failed],
        }
        return io.NodeOutput(text, tally.written, tally.there, len(tally.failed), ui=shown)
