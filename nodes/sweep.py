"""QwenEditStepSweep: how many steps this picture and this instruction need."""

from comfy_api.latest import io, ui

from ..qwen_edit.chart_style import NO_MATPLOTLIB, THEMES, note_picture
from ..qwen_edit.needs import explained_imports
from ..qwen_edit.sweep import as_json, parse_sweep, sentence, sweep_table
from ..qwen_edit.sweep_chart import contact_sheet, draw_sweep
from ..qwen_edit.values import check_choice, check_whole
from .host.doctor import Report
from .perf import theme_input
from .pictures import as_image
from .sampler import MAX_SEED, preset_input, recipe_overrides


class QwenEditStepSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        overrides = [one for one in recipe_overrides() if one.id != "steps"]
        return io.Schema(
            node_id="QwenEditStepSweep",
            display_name="Qwen Edit Step Sweep",
            category="Qwen Edit Fast",
            description="Makes the same edit with several numbers of steps or presets and shows what each costs in time and"
            " in likeness to the longest, where more steps stop paying, and all pictures side by side.",
            search_aliases=["steps", "quality", "benchmark", "compare", "psnr", "ssim"],
            inputs=[
                io.Model.Input("model", tooltip="From Qwen Edit Loader, with or without LoRAs."),
                io.Conditioning.Input("positive", tooltip="From Qwen Edit Encode."),
                io.Conditioning.Input("negative", tooltip="From Qwen Edit Encode. Not used when guidance is off."),
                io.Latent.Input("latent", tooltip="The size of the result, of one picture; from Qwen Edit Encode."),
                io.Vae.Input("vae", tooltip="Makes the pictures that are compared."),
                io.String.Input(
                    "sweep",
                    default="4, 8, 12, 20, 40",
                    tooltip="Numbers of steps, names of presets (draft, standard, high quality, Lightning 8, Lightning 4,"
                    " ComfyUI template), or both, separated by commas; 2 to 16. The longest is what the others are"
                    " compared with.",
                ),
                preset_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The noise that every run starts from. Each picture is the one that Qwen Edit Sampler makes with"
                    " this seed.",
                ),
                *overrides,
                theme_input(),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="SSIM and PSNR against time, 900 pixels wide."),
                io.Image.Output(display_name="contact sheet", tooltip="All pictures side by side, with their labels."),
                io.String.Output(display_name="table", tooltip="The numbers as text."),
                io.Image.Output(display_name="pictures", tooltip="The pictures as a batch, in the order of the sweep."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, vae, sweep, preset, seed, true_cfg_scale=0.0, shift=0.0, theme="dark"
    ) -> io.NodeOutput:
        check_whole("seed", seed, 0, MAX_SEED)
        check_choice("theme", theme, THEMES)
        import torch

        with explained_imports():  # they bring diffusers: only when a node runs
            from .host import sampling, sweeping

        points = parse_sweep(sweep, preset, true_cfg_scale, shift)
        findings = dict.fromkeys(found for point in points for found in sampling.examine(model, point.recipe))
        outcomes, reference, knee, pictures = sweeping.sweep(model, positive, negative, latent, vae, points, seed)
        made = [(picture, one) for picture, one in zip(pictures, outcomes, strict=True) if picture is not None]
        labels = [f"{one.name}, {one.seconds:.1f} s" for _, one in made]
        sheet = contact_sheet([picture for picture, _ in made], labels)
        failed = [f"{one.name} failed: {one.error}" for one in outcomes if one.error is not None]
        shown = [sentence(outcomes, reference, knee), *failed, *findings]
        try:
            chart = as_image(draw_sweep(outcomes, reference, knee, theme))
        except ImportError:
            chart = as_image(note_picture(NO_MATPLOTLIB))
            shown.append(NO_MATPLOTLIB)
        on_node = ui.PreviewImage(chart, cls=cls).as_dict() | Report(shown).as_dict()
        on_node["sweep"] = (as_json(outcomes, reference, knee),)
        table = sweep_table(outcomes, reference, knee)
        return io.NodeOutput(chart, sheet, table, torch.cat([picture for picture, _ in made]), ui=on_node)
