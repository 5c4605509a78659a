"""QwenEditEncode: instruction and pictures to conditioning, reference latents and an empty LATENT."""

from comfy_api.latest import io

from ..qwen_edit.doctor import examine_vae
from ..qwen_edit.errors import INPUT
from .host.doctor import Report, report
from .host.encoding import (
    MAX_PICTURES,
    MAX_SIDE,
    REFERENCE_SIZES,
    Edit,
    Encoder,
    broadcast,
    leave_card,
    require_clip,
    split_batches,
)
from .host.vae import vae_facts


class QwenEditEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditEncode",
            display_name="Qwen Edit Encode",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="The instruction and one or more pictures, as the model was trained to see them. Lists of pictures"
            " and prompts make a batch: one edit for each.",
            search_aliases=["prompt", "instruction", "text encode", "image edit", "reference", "提示词", "指令"],
            is_input_list=True,
            inputs=[
                io.Clip.Input("clip", tooltip="From Qwen Edit Loader or any loader of qwen_2.5_vl_7b."),
                io.Vae.Input("vae", tooltip="From Qwen Edit Loader or any loader of qwen_image_vae."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What to change, in any language. Name pictures as 'Picture 1', 'Picture 2'.",
                ),
                io.String.Input(
                    "negative",
                    default=" ",
                    advanced=True,
                    tooltip="The official negative prompt is a single space. Not used when guidance is off.",
                ),
                io.Autogrow.Input(
                    "pictures",
                    template=io.Autogrow.TemplateNames(
                        io.Image.Input(
                            "picture",
                            tooltip="The picture to edit, then references. More than three is untested.",
                        ),
                        names=[f"picture_{i + 1}" for i in range(MAX_PICTURES)],
                        min=1,
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    step=16,
                    tooltip="Pixels of the result. 0: picture 1's, rounded to 32.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    step=16,
                    tooltip="Pixels of the result. 0: picture 1's, rounded to 32.",
                ),
                io.Combo.Input(
                    "reference_size",
                    options=list(REFERENCE_SIZES),
                    default=REFERENCE_SIZES[0],
                    advanced=True,
                    tooltip="output grid: picture 1 gets the result's size, so that pixels line up. one megapixel: every picture"
                    " at 1024² area, as the official pipeline does.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", is_output_list=True),
                io.Conditioning.Output(display_name="negative", is_output_list=True),
                io.Latent.Output(display_name="LATENT", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, clip, vae, prompt, negative, pictures, width, height, reference_size) -> io.NodeOutput:
        given = {name: split_batches(name, images) for name, images in _in_order(pictures) if images}
        if not given:
            raise ValueError(f"{INPUT} No picture is connected. Connect at least picture_1.")
        require_clip(clip[0])
        columns = {"prompt": prompt, "negative": negative, "width": width, "height": height, **given}
        encoder = Encoder(clip[0], vae[0])
        results, notes = [], report(examine_vae(vae_facts(vae[0])))
        for number, row in enumerate(broadcast(columns), 1):
            edit = Edit(
                prompt=row["prompt"],
                negative=row["negative"],
                pictures=tuple(row[name] for name in given),
                width=row["width"],
                height=row["height"],
                reference_size=reference_size[0],
            )
            *result, said = encoder.encode(edit)
            results.append(result)
            notes += [f"{number}: {note}" for note in said] if len(columns["prompt"]) > 1 else said
        leave_card(clip[0])
        positive, negative_out, latent = (list(column) for column in zip(*results, strict=True))
        return io.NodeOutput(positive, negative_out, latent, ui=Report(notes))


def _in_order(pictures: dict) -> list[tuple[str, list]]:
    """picture_2 before picture_10: as numbers, not as words."""
    return sorted(pictures.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
