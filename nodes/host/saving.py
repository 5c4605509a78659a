"""Pictures into ComfyUI's output folder, by its own writers of WebP and PNG."""

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...qwen_edit.errors import INPUT, NAN
from ...qwen_edit.finite import all_finite
from ...qwen_edit.manifest import contained

LARGEST_WEBP = 16383  # pixels of a side


def save(node: type[io.ComfyNode], images: torch.Tensor, filename_prefix: str, as_webp: bool) -> list[ui.SavedResult]:
    """Each picture of ``images`` ``[B, H, W, 3 or 4]`` in a file of its own, with the workflow of ``node``.

    Args:
        as_webp: lossless WebP where that holds every pixel, else PNG.

    Raises:
        ValueError: no picture, NaN or infinity, or a prefix that leads out of the output folder.
    """
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise ValueError(f"{INPUT} images is {list(images.shape)}; an IMAGE is [B, H, W, 3 or 4].")
    if not all_finite(images):
        raise ValueError(f"{NAN} The pictures hold NaN or infinity, so they are not saved. Try precision bf16.")
    _check_place(filename_prefix)
    # libwebp drops the colours of pixels that can't be seen
    fits = images.shape[-1] == 3 and max(images.shape[1:3]) <= LARGEST_WEBP
    write = _as_webp if as_webp and fits else _as_png
    pictures = images.float().split(1)  # bfloat16 has no NumPy
    return [write(node, picture, _numbered(filename_prefix, number)) for number, picture in enumerate(pictures)]


def _numbered(filename_prefix: str, number: int) -> str:
    return filename_prefix.replace("%batch_num%", str(number))


def _check_place(filename_prefix: str) -> None:
    """Raise a ValueError for a place outside the output folder, or a name that no file can have."""
    output = Path(folder_paths.get_output_directory())
    try:
        path = contained(output, f"{filename_prefix}_00000_.webp", must_exist=False)
        possible = not any(folder.is_file() for folder in path.parents)
    except ValueError:
        possible = False
    if not possible:
        raise ValueError(f"{INPUT} filename_prefix {filename_prefix!r:.80} is no place in the output folder.")


def _as_webp(node, picture: torch.Tensor, filename_prefix: str) -> ui.SavedResult:
    """One picture ``[1, H, W, 3]`` by ComfyUI's own writer of WebP, with the least effort that libwebp knows: more of it saves few
    bytes and takes several times as long."""
    return ui.ImageSaveHelper.save_animated_webp(
        picture, filename_prefix, io.FolderType.output, node, fps=1.0, lossless=True, quality=0, method=0
    )


def _as_png(node, picture: torch.Tensor, filename_prefix: str) -> ui.SavedResult:
    return ui.ImageSaveHelper.save_images(picture, filename_prefix, io.FolderType.output, node)[0]
