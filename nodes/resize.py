"""Smart resize and restore: any picture to a size the model likes, and the edit back to its size and
place."""

import dataclasses

import torch
from comfy_api.latest import io, ui

from ..qwen_edit import geometry as geo
from ..qwen_edit.values import check_choice, check_kind, check_number, check_whole
from .host.upscale import upscale

GeometryType = io.Custom("QWEN_EDIT_GEOMETRY")
TARGETS = ["area", "longest side"]
MIN_MEGAPIXELS, MAX_MEGAPIXELS = 0.01, 4.0
MAX_FEATHER = 256  # pixels


class QwenEditSmartResize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QwenEditSmartResize",
            display_name="Qwen Edit Smart Resize",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="Brings a picture of any size to one the model likes: about one megapixel, sides "
            "multiples of 32, aspect ratio kept. Restore Size undoes it to the pixel.",
            search_aliases=["resize", "scale", "megapixels", "fit"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture to edit, of any size. Transparent pictures are composited over "
                    "white, grey ones get three channels. The input is never changed.",
                ),
                io.Combo.Input(
                    "target",
                    options=TARGETS,
                    default="area",
                    tooltip="area: the sizes the model was trained on, by megapixels. longest side: by pixels.",
                ),
                io.Float.Input(
                    "megapixels",
                    default=1.0,
                    min=MIN_MEGAPIXELS,
                    max=MAX_MEGAPIXELS,
                    step=0.01,
                    round=0.0001,
                    tooltip="Area of the model picture when the target is area, in units of 1024×1024 "
                    "pixels. 1.0 is what the official pipeline uses. No side passes 2048 px.",
                ),
                io.Int.Input(
                    "longest_side",
                    default=1024,
                    min=geo.MULTIPLE,
                    max=geo.MAX_SIDE,
                    step=geo.MULTIPLE,
                    tooltip="Longest side of the model picture in pixels when the target is longest side; "
                    "rounded to the nearest multiple of 32.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(geo.FITS),
                    default="pad",
                    advanced=True,
                    tooltip="What happens to the few pixels between the aspect ratios. pad: the picture is "
                    "mirrored at its edges and the margin is removed by Restore Size. crop: the edges stay "
                    "as they are in the source. stretch: the picture is distorted and Restore Size undoes "
                    "it.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    is_output_list=True,
                    tooltip="The model picture; a batch as a list of pictures.",
                ),
                GeometryType.Output(
                    display_name="geometry",
                    is_output_list=True,
                    tooltip="The way back, for Restore Size. It carries the source picture.",
                ),
                io.Int.Output(display_name="width", tooltip="Width of the model picture in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the model picture in pixels."),
            ],
        )

    @classmethod
    def execute(cls, image, target, megapixels, longest_side, fit) -> io.NodeOutput:
        check_choice("target", target, TARGETS)
        check_number("megapixels", megapixels, MIN_MEGAPIXELS, MAX_MEGAPIXELS)
        check_whole("longest_side", longest_side, geo.MULTIPLE, geo.MAX_SIDE)
        check_choice("fit", fit, geo.FITS)
        rgb = geo.to_rgb(image)
        height, width = rgb.shape[1:3]
        if target == "area":
            size = geo.target_by_area(width, height, megapixels * 2**20)
        else:
            size = geo.target_by_longest_side(width, height, longest_side)
        plan = geo.plan(width, height, size, fit)
        # Encode makes an edit of each picture of a batch; each then finds its own source on the way back.
        geometries = [dataclasses.replace(plan, source=source) for source in image.split(1)]
        pictures = list(geo.apply(plan, rgb).split(1))
        return io.NodeOutput(pictures, geometries, *size, ui=ui.PreviewText(plan.describe()))


class QwenEditRestoreSize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QwenEditRestoreSize",
            display_name="Qwen Edit Restore Size",
            category="Qwen Edit Fast",
            has_intermediate_output=True,  # its report is shown again when it comes from the cache
            description="Brings the edited picture back to the size and place of the source, without shift "
            "or zoom. With a mask, the pixels outside it are the source's own.",
            search_aliases=["resize back", "uncrop", "unpad", "composite", "stitch"],
            inputs=[
                io.Image.Input("image", tooltip="The edited picture, as it comes out of VAE Decode."),
                GeometryType.Input("geometry", tooltip="From the Smart Resize that made the model picture."),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="Enlarges the edit before it is fitted into a larger source. Without one, "
                    "LANCZOS enlarges it. Not run when the source is no larger than the model picture.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the edit may show (white), at the source's size or the model picture's. "
                    "Everything outside is the source, bit for bit.",
                ),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=MAX_FEATHER,
                    advanced=True,
                    tooltip="Width of the seam in source pixels, inside the mask. 0 cuts hard. Used only with a mask.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The edit at the source's size and place.")],
        )

    @classmethod
    def execute(cls, image, geometry, upscale_model=None, mask=None, feather=16) -> io.NodeOutput:
        check_kind("geometry", geometry, geo.Geometry, "the geometry output of Smart Resize")
        check_whole("feather", feather, 0, MAX_FEATHER)
        edited = geo.to_rgb(image, "edited image")
        text = f"{edited.shape[2]}×{edited.shape[1]} → {geometry.source_width}×{geometry.source_height}"
        if upscale_model is not None and min(geometry.scale) < 1.0:
            edited = upscale(upscale_model, edited)
            text += f", through an upscale model ({edited.shape[2]}×{edited.shape[1]})"
        if mask is not None:
            check_kind("mask", mask, torch.Tensor, "a MASK")
            text += f", {float((mask > 0).float().mean()):.0%} of the picture edited"
        restored = geo.restore(geometry, edited, mask, feather)
        return io.NodeOutput(restored, ui=ui.PreviewText(text))
