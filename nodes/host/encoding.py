"""One edit's instruction and pictures through ComfyUI's CLIP and VAE, of whichever loader."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import node_helpers
import torch
from PIL import Image

from ...qwen_edit import pictures as pic
from ...qwen_edit.errors import INPUT
from ...qwen_edit.geometry import MULTIPLE, calculate_dimensions, nearest_multiple
from ...qwen_edit.resample import to_rgb
from ...qwen_edit.text_encoder import EDIT_TEMPLATE, as_plain_text, with_pictures
from ...qwen_edit.values import check_choice, check_kind, is_number
from .clip import leave_card, require_clip, shared_pictures
from .prompts import Seen, encode_prompts

__all__ = [
    "MAX_PICTURES",
    "MAX_SIDE",
    "REFERENCE_SIZES",
    "Edit",
    "Encoder",
    "broadcast",
    "check_size",
    "leave_card",
    "require_clip",
    "split_batches",
]

MAX_PICTURES = 10
TESTED_PICTURES = 3
MAX_SIDE = 8192
MAX_AREA = 2048 * 2048
VISION_AREA = 384 * 384  # diffusers' CONDITION_IMAGE_SIZE
OFFICIAL_AREA = 1024 * 1024  # diffusers' VAE_IMAGE_SIZE
REFERENCE_SIZES = ("output grid", "one megapixel")
GRID = 16  # pixels per token
SAME_ASPECT = 0.05

Pixels = dict[Hashable, Any]  # pictures on their way to the encoders, by what was done to them


@dataclass(frozen=True)
class Edit:
    """One edit as the node's widgets and links say it. ``pictures``: each ``[1, H, W, C]``, float in [0, 1]."""

    prompt: str
    negative: str
    pictures: tuple[torch.Tensor, ...]
    width: int = 0
    height: int = 0
    reference_size: str = REFERENCE_SIZES[0]


def split_batches(name: str, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A list of IMAGEs as a list of single pictures: an IMAGE batch counts as that many pictures.

    Raises:
        ValueError: an empty batch.
    """
    for image in images:
        if not isinstance(image, torch.Tensor) or image.ndim < 3 or image.shape[0] == 0:
            raise ValueError(
                f"{INPUT} {name}: got {getattr(image, 'shape', type(image))}, expected pictures [B, H, W, C]."
            )
    return [single for image in images for single in image.split(1)]


def broadcast(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Rows of equally long lists; a list of one value serves every row.

    Raises:
        ValueError: two lists have different lengths, neither of them one.
    """
    rows = max(len(values) for values in columns.values())
    uneven = {name: len(values) for name, values in columns.items() if len(values) not in (1, rows)}
    if uneven:
        longest = next(name for name, values in columns.items() if len(values) == rows)
        named = ", ".join(f"{name} has {count}" for name, count in uneven.items())
        raise ValueError(
            f"{INPUT} {longest} has {rows} entries, but {named}. Each list must have one entry, or as many as the longest."
        )
    for index in range(rows):
        yield {name: values[index] if len(values) == rows else values[0] for name, values in columns.items()}


class Encoder:
    """Encodes edits one after the other, through one CLIP and one VAE, of whichever loader.

    What two prompts or two successive edits have in common is done once; a picture is the same when it is the same
    tensor. Results wait for one more edit only, so memory does not grow with the length of a list.
    """

    def __init__(self, clip, vae):
        self.clip, self.vae = clip, vae
        self._now: dict[Hashable, Any] = {}
        self._before: dict[Hashable, Any] = {}
        self._seen: Seen = {}  # by the encoder's vision tower

    @classmethod
    def prepare(cls, edit: Edit) -> tuple[tuple, Pixels]:
        """The part of ``encode`` that needs neither CLIP nor VAE and may run in any thread.

        Returns:
            The sizes of result and references, equal for edits that fit into one forward, and what ``encode`` takes.

        Raises:
            ValueError: as ``encode``.
        """
        desk = cls(None, None)
        sizes = [desk._once(desk._original, picture).size for picture in edit.pictures]
        width, height, _ = output_size(edit.width, edit.height, sizes[0])
        grids = [
            reference_size(edit.reference_size, number, own[0] / own[1], width, height)
            for number, own in enumerate(sizes)
        ]
        for picture, size in zip(edit.pictures, grids, strict=True):
            desk._once(desk._small, picture)
            desk._once(desk._resized, picture, size)
        return ((width, height), *grids), desk._now

    def encode(self, edit: Edit, prepared: Pixels | None = None) -> tuple[list, list, dict, list[str]]:
        """Positive and negative conditioning, an empty LATENT, and notes for the node.

        Args:
            prepared: what ``prepare`` made of the same edit.

        The vision-language encoder sees each picture at 384² area; the reference latents lie on the output's grid or
        at one megapixel. Both are resized from 8-bit with LANCZOS, as diffusers' pipeline does.

        Raises:
            ValueError: a size that the model can't take, or a picture without pixels.
        """
        self._before = self._now
        # what the edit before has of the same pictures stands for more: their latents and what the encoder saw
        self._now = {key: self._before.get(key, made) for key, made in (prepared or {}).items()}
        held = {id(result) for result in self._before.values()}
        self._seen = {picture: features for picture, features in self._seen.items() if picture in held}
        for name, text in (("prompt", edit.prompt), ("negative", edit.negative)):
            check_kind(name, text, str, "a text")
        sizes = [self._once(self._original, picture).size for picture in edit.pictures]
        width, height, notes = output_size(edit.width, edit.height, sizes[0])
        if len(sizes) > TESTED_PICTURES:
            notes.append(f"Warning: {len(sizes)} pictures; the model was trained with up to {TESTED_PICTURES}.")

        if not edit.prompt.strip():
            notes.append("Warning: the prompt is empty; write what to change in the picture.")

        references = []
        with ThreadPoolExecutor(1) as beside:
            # resized for the text encoder while this thread waits for the VAE
            beside.submit(lambda: [self._once(self._small, picture) for picture in edit.pictures])
            for number, (picture, own) in enumerate(zip(edit.pictures, sizes, strict=True)):
                size = reference_size(edit.reference_size, number, own[0] / own[1], width, height)
                references.append(self._once(self._reference, picture, size))
                if size != own:
                    notes.append(f"Picture {number + 1}: {own[0]}×{own[1]} → {size[0]}×{size[1]}")

        texts = []
        for text in (edit.prompt, edit.negative):
            plain, said = as_plain_text(text)
            texts.append(plain)
            notes += said
        conditionings = [
            node_helpers.conditioning_set_values(encoded, {"reference_latents": references})
            for encoded in self._conditionings(texts, edit.pictures)
        ]
        device = comfy.model_management.intermediate_device()
        samples = torch.zeros([1, 16, 1, height // 8, width // 8], device=device)
        return (
            conditionings[0],
            conditionings[1],
            {"samples": samples},
            [f"{width}×{height}", *dict.fromkeys(notes)],
        )

    def _once(self, make: Callable[..., Any], *given: Hashable) -> Any:
        key = (make.__name__, *given)  # tensors hash by identity, and the key keeps them alive
        if not self._has(key):
            self._now[key] = make(*given)
        return self._now[key]

    def _has(self, key: Hashable) -> bool:
        if key not in self._now and key in self._before:
            self._now[key] = self._before[key]
        return key in self._now

    def _original(self, picture: torch.Tensor) -> Image.Image:
        return pic.to_pil(to_rgb(picture)[0])

    def _reference(self, picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        # 8 bits travel, and what ComfyUI does to the picture before its VAE is done there too
        return self.vae.encode(pic.to_tensor(self._once(self._resized, picture, size), self.vae.device))

    def _resized(self, picture: torch.Tensor, size: tuple[int, int]) -> Image.Image:
        return pic.resize(self._once(self._original, picture), *size)

    def _small(self, picture: torch.Tensor) -> torch.Tensor:
        original = self._once(self._original, picture)
        size = _of_area(VISION_AREA, original.width / original.height)
        return pic.to_tensor(pic.resize(original, *size))

    def _vision(self, *images: torch.Tensor) -> Any:
        return shared_pictures(self.clip, images)

    def _conditionings(self, texts: Sequence[str], pictures: Sequence[torch.Tensor]) -> list[list]:
        keys = {text: ("conditioning", text, *pictures) for text in texts}
        new = [text for text, key in keys.items() if not self._has(key)]
        images = self._once(self._vision, *(self._once(self._small, picture) for picture in pictures))
        tokens = [
            self.clip.tokenize(with_pictures(text, len(pictures)), images=images, llama_template=EDIT_TEMPLATE)
            for text in new
        ]
        for text, encoded in zip(new, encode_prompts(self.clip, tokens, self._seen), strict=True):
            self._now[keys[text]] = encoded
        return [self._now[keys[text]] for text in texts]


def check_size(width: int, height: int) -> None:
    """Raise a ValueError unless each side is 0 or a multiple of 16 inside its range."""
    for name, value in (("width", width), ("height", height)):
        if not is_number(value, int) or (value and not (GRID <= value <= MAX_SIDE and value % GRID == 0)):
            raise ValueError(
                f"{INPUT} {name} is {value!r:.80}; it must be 0 (from picture 1) or a multiple of {GRID} from {GRID} to {MAX_SIDE}."
            )


def output_size(width: int, height: int, picture: tuple[int, int]) -> tuple[int, int, list[str]]:
    """Pixels of the result and notes. 0 takes picture 1's side, or follows its aspect ratio from the other side.

    Raises:
        ValueError: a side that is no multiple of 16 or outside its range.
    """
    check_size(width, height)
    wanted_width = width or (height * picture[0] / picture[1] if height else picture[0])
    wanted_height = height or (width * picture[1] / picture[0] if width else picture[1])
    notes = []
    scale = math.sqrt(MAX_AREA / (wanted_width * wanted_height))
    if scale < 1:
        notes.append(
            f"Warning: reduced to {MAX_AREA / 2**20:g} megapixels (scale {scale:.3g}); use Qwen Edit Smart Resize."
        )
        wanted_width, wanted_height = wanted_width * scale, wanted_height * scale
        width = height = 0
    return width or nearest_multiple(wanted_width), height or nearest_multiple(wanted_height), notes


def reference_size(rule: str, number: int, ratio: float, width: int, height: int) -> tuple[int, int]:
    """Pixels of reference ``number`` (from 0) with aspect ``ratio`` for a result of ``width`` x ``height``."""
    check_choice("reference_size", rule, REFERENCE_SIZES)
    if rule == "one megapixel":
        return _of_area(OFFICIAL_AREA, ratio)
    if number == 0 and abs(math.log(ratio * height / width)) < max(SAME_ASPECT, MULTIPLE / min(width, height)):
        return width, height
    return _of_area(width * height, ratio)


def _of_area(area: int, ratio: float) -> tuple[int, int]:
    """diffusers' size for this area; where that has a side of 0, the strip of the least width that has the area."""
    size = calculate_dimensions(area, ratio)
    if all(size):
        return size
    longest = nearest_multiple(area / MULTIPLE)
    return (longest, MULTIPLE) if ratio > 1 else (MULTIPLE, longest)
