"""The files of a batch: what it reads in ComfyUI's input folder, and what it writes into the output folder."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import nodes

from ...qwen_edit.errors import INPUT, NAN
from ...qwen_edit.manifest import (
    MANIFEST_SUFFIXES,
    Defaults,
    Item,
    Refused,
    contained,
    is_picture,
    items_of_pictures,
    read_manifest,
    remove_leftovers,
    temporary_path,
)
from ...qwen_edit.resample import to_rgb

MAX_PIXELS = 120_000_000  # as float32 1.4 GB; PIL itself begins to refuse at 179 million


def items_of(source: str, defaults: Defaults) -> tuple[list[Item | Refused], Path]:
    """The items of a manifest or of a folder of pictures in ComfyUI's input folder, and the folder their names start from.

    Raises:
        ValueError: there is no such file or folder, it lies elsewhere, or it can't be read.
    """
    root = Path(folder_paths.get_input_directory())
    path = contained(root, source.strip() or ".")
    if path.is_file():
        return read_manifest(path, defaults), path.parent
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and is_picture(entry.name))
    if not names:
        raise ValueError(
            f"{INPUT} The folder {source!r} in ComfyUI's input folder holds no picture. Name a folder with pictures, or a"
            f" manifest ({', '.join(MANIFEST_SUFFIXES)})."
        )
    return items_of_pictures(names, defaults), path


def output_folder(name: str) -> Path:
    """A folder below ComfyUI's output folder, made if it is not there, without what an interrupted run left behind.

    Raises:
        ValueError: it lies elsewhere.
    """
    root = Path(folder_paths.get_output_directory())
    made = contained(root, name.strip() or ".", must_exist=False)
    if made.is_file():
        raise ValueError(f"{INPUT} {name!r} in ComfyUI's output folder is a file. Name a folder.")
    made.mkdir(parents=True, exist_ok=True)
    remove_leftovers(made)
    return made


def shown(folder: Path, names: Iterable[str]) -> list[dict[str, str]]:
    """Results, as ComfyUI's front end finds them."""
    subfolder = folder.relative_to(Path(folder_paths.get_output_directory()).resolve()).as_posix()
    subfolder = "" if subfolder == "." else subfolder
    return [{"filename": name, "subfolder": subfolder, "type": "output"} for name in names]


def check_size(name: str, path: Path) -> None:
    """Raise a ValueError for a picture that would take all memory, by what its file says before it is decoded."""
    with Image.open(path) as picture:
        width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{INPUT} {name!r:.200} is {width}×{height}; at most {MAX_PIXELS // 10**6} megapixels are read. Reduce it."
        )


def read_picture(name: str, content: str) -> torch.Tensor:
    """The picture as Load Image reads it, composited over white where it is transparent, ``[1, H, W, 3]``; of an animation
    the first. ``content`` tells the cache when it has changed."""
    del content
    images, masks = nodes.LoadImage().load_image(name)  # pyright: ignore[reportAttributeAccessIssue]
    image, mask = images[:1], masks[:1]
    if mask.shape[1:] != image.shape[1:3]:  # it has no alpha
        return image
    return to_rgb(torch.cat([image[..., :3], 1.0 - mask.unsqueeze(-1)], dim=-1), name)


def write_png(path: Path, picture: torch.Tensor, texts: dict[str, Any]) -> str:
    """Write a picture ``[H, W, 3]`` as Save Image does, such that ``path`` is whole whenever it exists; returns its name.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    pixels = 255.0 * picture.cpu().numpy()
    if not np.isfinite(pixels).all():
        raise ValueError(f"{NAN} The decoded picture holds NaN or infinity, so it is not saved. Try precision bf16.")
    information = PngInfo()
    for name, value in texts.items():
        information.add_text(name, json.dumps(value))
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(file, "PNG", pnginfo=None if args.disable_metadata else information, compress_level=4)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the contents
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path.name
