"""QwenEditSave: pictures as files, in a third of the time that a PNG takes."""

import os

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..qwen_edit.errors import INPUT, NAN
from ..qwen_edit.finite import all_finite
from ..qwen_edit.values import check_choice, check_kind

WEBP, PNG = "webp, lossless", "png"
LARGEST_WEBP = 16383  # pixels of a side


class QwenEditSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditSave",
            display_name="Qwen Edit Save",
            category="Qwen Edit Fast",
            description="Saves pictures in a third of the time that ComfyUI's Save Image takes: as lossless WebP, pixel for"
            " pixel what a PNG holds, in smaller files. The workflow is in them too.",
            search_aliases=["save image", "export image", "webp", "png", "output image", "faster"],
            inputs=[
                io.Image.Input("images", tooltip="What to save, as it comes out of VAE Decode or Restore Size."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="As in Save Image: folders with /, and %date:yyyy-MM-dd% or %Node.widget% for values.",
                ),
                io.Combo.Input(
                    "format",
                    options=[WEBP, PNG],
                    default=WEBP,
                    tooltip="Both keep every pixel. PNG, slower, is for programs that read no WebP; it is also taken for pictures with"
                    " transparency, or with a side over 16383 pixels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, filename_prefix="ComfyUI", format=WEBP) -> io.NodeOutput:
        check_kind("images", images, torch.Tensor, "an IMAGE")
        check_kind("filename_prefix", filename_prefix, str, "a text")
        check_choice("format", format, (WEBP, PNG))
        if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
            raise ValueError(f"{INPUT} images is {list(images.shape)}; an IMAGE is [B, H, W, 3 or 4].")
        if not all_finite(images):
            raise ValueError(f"{NAN} The pictures hold NaN or infinity, so they are not saved. Try precision bf16.")
        _check_place(filename_prefix, images)
        pictures = images.float()  # bfloat16 has no NumPy
        # libwebp drops the colours of pixels that can't be seen
        as_webp = format == WEBP and images.shape[-1] == 3 and max(images.shape[1:3]) <= LARGEST_WEBP
        save = _as_webp if as_webp else _as_png
        saved = [save(cls, p, _numbered(filename_prefix, number)) for number, p in enumerate(pictures.split(1))]
        return io.NodeOutput(images, ui=ui.SavedImages(saved))


def _numbered(filename_prefix: str, number: int) -> str:
    return filename_prefix.replace("%batch_num%", str(number))


def _check_place(filename_prefix: str, images: torch.Tensor) -> None:
    """Raise a ValueError for a place outside the output folder, or a name that no file can have."""
    prefix, size = _numbered(filename_prefix, 0), (images.shape[2], images.shape[1])
    try:
        folder, name, *_ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory(), *size)
        os.stat(os.path.join(folder, f"{name}_00000_.webp"))
    except FileNotFoundError:
        pass  # as nearly always
    except PermissionError:
        raise
    except Exception as e:  # for what lies outside ComfyUI raises a bare Exception
        raise ValueError(
            f"{INPUT} filename_prefix {filename_prefix!r:.80} is no place in the output folder: {e}"
        ) from e


def _as_webp(cls, picture: torch.Tensor, filename_prefix: str) -> ui.SavedResult:
    """One picture ``[1, H, W, 3]`` by ComfyUI's own writer of WebP, with the least effort that libwebp knows: more of it saves few
    bytes and takes several times as long."""
    return ui.ImageSaveHelper.save_animated_webp(
        picture, filename_prefix, io.FolderType.output, cls, fps=1.0, lossless=True, quality=0, method=0
    )


def _as_png(cls, picture: torch.Tensor, filename_prefix: str) -> ui.SavedResult:
    return ui.ImageSaveHelper.save_images(picture, filename_prefix, io.FolderType.output, cls)[0]
