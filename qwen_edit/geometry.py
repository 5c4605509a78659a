"""From a picture of any size to one the model likes, and back to the pixel.

A `Geometry` maps a whole-pixel box of the source onto a whole-pixel box of the model picture. Whole content
sizes make the horizontal and vertical scales differ by less than half a pixel over the side; because the same
two boxes are used on the way back, an identity edit returns with no shift and no zoom, whatever the sizes.

Rules
- Both sides of the model picture are multiples of 32, from 32 to 2048. By area, the sizes are those of
  diffusers' `QwenImageEditPlusPipeline` as long as no side passes 2048 (aspect ratios up to 1:4 at one
  megapixel); beyond it the longest side is 2048. That bounds the memory of everything that follows, whatever
  comes in.
- A source over 2048 px on its longest side is therefore always reduced first; restoring it enlarges the edit.
- pad: the whole picture, centred, the rest filled with the picture mirrored at its edge. Mirrored content
  keeps the statistics and the contours of a photograph up to the border, where a flat bar or smeared edge
  pixels would be something for the model to continue or to edit. crop: the largest centred part with the
  target's shape. stretch: the whole picture on the whole target.
- The content is never thinner than one pixel: a 20000×1 picture becomes 2048×1, padded to 2048×32.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .resample import resize, to_rgb

MULTIPLE = 32
MAX_SIDE = 2048
DEFAULT_AREA = 1024 * 1024
FITS = ("pad", "crop", "stretch")


class Box(NamedTuple):
    """A rectangle in whole pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Geometry:
    """The way from a source picture to the model picture and back. Sizes and boxes are in pixels.

    `source_box` of the source fills `content_box` of the target. `source` is the picture itself ([B, H, W,
    C], the caller's own tensor, not a copy), from which the restored picture takes what the edit does not
    cover; pure size calculations leave it None.
    """

    source_width: int
    source_height: int
    target_width: int
    target_height: int
    fit: str
    source_box: Box
    content_box: Box
    source: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def scale(self) -> tuple[float, float]:
        """Target pixels per source pixel, horizontally and vertically."""
        return (
            self.content_box.width / self.source_box.width,
            self.content_box.height / self.source_box.height,
        )

    @property
    def reduced_first(self) -> bool:
        """Whether the source is larger than any model picture may be."""
        return max(self.source_width, self.source_height) > MAX_SIDE

    def describe(self) -> str:
        """One line for the node: sizes, scale, and what was padded or cut off, in pixels."""
        x, y = self.scale
        scale = f"{x:.3g}" if abs(x - y) <= 0.005 * max(x, y) else f"{x:.3g}×{y:.3g}"
        sizes = f"{self.source_width}×{self.source_height} → {self.target_width}×{self.target_height}"
        text = f"{sizes}, scale {scale}"
        if self.fit == "pad":
            right = self.target_width - self.content_box.width
            bottom = self.target_height - self.content_box.height
            text += f", {max(right, bottom)} px padding" if right or bottom else ", no padding"
        if self.fit == "crop":
            right = self.source_width - self.source_box.width
            bottom = self.source_height - self.source_box.height
            text += f", {max(right, bottom)} source px cut off" if right or bottom else ", nothing cut off"
        return text + (f", reduced (over {MAX_SIDE} px)" if self.reduced_first else "")


def calculate_dimensions(area: float, ratio: float) -> tuple[int, int]:
    """(width, height), multiples of 32, of about `area` px² with width / height near `ratio`.

    diffusers' formula to the letter (`pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`), which the
    model's vision-language input (384²) and reference latents (1024²) are sized by. A side can come out as 0
    for extreme ratios, as there; `target_by_area` is the guarded one. Raises ValueError `[QE_INPUT]` unless
    both are finite and positive.
    """
    for name, value in (("area", area), ("ratio", ratio)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"[QE_INPUT] {name}: got {value}, expected a finite number above 0.")
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(width / MULTIPLE) * MULTIPLE, round(height / MULTIPLE) * MULTIPLE


def target_by_area(width: int, height: int, area: float = DEFAULT_AREA) -> tuple[int, int]:
    """(width, height) of the model picture for a source, by area in px²; see the rules above."""
    _check_source(width, height)
    if not (math.isfinite(area) and MULTIPLE**2 <= area <= MAX_SIDE**2):
        raise ValueError(
            f"[QE_INPUT] area: got {area} px² ({area / 2**20:g} megapixels), expected {MULTIPLE**2} px² to "
            f"{MAX_SIDE**2} px² (4 megapixels)."
        )
    target = calculate_dimensions(area, width / height)
    if max(target) > MAX_SIDE:
        return target_by_longest_side(width, height, MAX_SIDE)
    return max(MULTIPLE, target[0]), max(MULTIPLE, target[1])


def target_by_longest_side(width: int, height: int, side: float = 1024) -> tuple[int, int]:
    """(width, height) of the model picture for a source, the longest side being `side` px to the nearest
    32.
    """
    _check_source(width, height)
    if not (math.isfinite(side) and MULTIPLE <= side <= MAX_SIDE):
        raise ValueError(f"[QE_INPUT] longest_side: got {side}, expected {MULTIPLE} to {MAX_SIDE} px.")
    scale = side / max(width, height)
    return nearest_multiple(width * scale), nearest_multiple(height * scale)


def plan(width: int, height: int, target: tuple[int, int], fit: str = "pad") -> Geometry:
    """The geometry that takes a source of width × height px to `target` (width, height).

    Raises ValueError `[QE_INPUT]` for an empty source, a target that is not a multiple of 32 from 32 to 2048,
    or an unknown fit.
    """
    _check_source(width, height)
    target_width, target_height = target
    for side in target:
        if side % MULTIPLE or not MULTIPLE <= side <= MAX_SIDE:
            raise ValueError(
                f"[QE_INPUT] target size: got {target_width}×{target_height}, expected multiples of "
                f"{MULTIPLE} from {MULTIPLE} to {MAX_SIDE} px."
            )
    source_box = Box(0, 0, width, height)
    content_box = Box(0, 0, target_width, target_height)
    if fit == "pad":
        scale = min(target_width / width, target_height / height)
        content_box = _centred(target_width, target_height, width * scale, height * scale)
    elif fit == "crop":
        scale = max(target_width / width, target_height / height)
        source_box = _centred(width, height, target_width / scale, target_height / scale)
    elif fit != "stretch":
        raise ValueError(f"[QE_INPUT] fit: got {fit!r}, expected one of {', '.join(FITS)}.")
    return Geometry(width, height, target_width, target_height, fit, source_box, content_box)


def apply(geometry: Geometry, image: torch.Tensor) -> torch.Tensor:
    """The model picture of `image`: [B, H, W, C] of the geometry's source size to [B, target H, target W, 3].

    Returns float32 on the CPU, never a view of the input. Raises ValueError as `to_rgb` does, and
    `[QE_INPUT]` for a picture of another size.
    """
    rgb = to_rgb(image)
    _check_size("image", rgb, geometry.source_width, geometry.source_height)
    source, content = geometry.source_box, geometry.content_box
    scaled = resize(
        rgb,
        content.width,
        content.height,
        (
            float(source.x),
            float(source.y),
            float(source.x + source.width),
            float(source.y + source.height),
        ),
    )
    right = geometry.target_width - content.x - content.width
    bottom = geometry.target_height - content.y - content.height
    padding = ((0, 0), (content.y, bottom), (content.x, right), (0, 0))
    return torch.from_numpy(np.pad(scaled.numpy(), padding, mode="symmetric"))


def restore(
    geometry: Geometry,
    edited: torch.Tensor,
    mask: torch.Tensor | None = None,
    feather: int = 0,
) -> torch.Tensor:
    """The edited picture back at the source's size and place: [B, H, W, 3], float32 on the CPU.

    `edited` is [B, h, w, C] of the target size, or of the same shape larger or smaller (an upscaled edit). B
    must be a multiple of the source's batch; picture i belongs to source i modulo that batch. What a crop cut
    off comes from the source. With `mask` ([B or 1, H, W], 1 = edited, of the source's or the target's size),
    pixels where it is 0 are the source's own bit for bit, and the edit fades in over `feather` source px
    inside it. Raises ValueError `[QE_INPUT]` or `[QE_NAN]`.
    """
    rgb = to_rgb(edited, "edited image")
    batch, height, width, _ = rgb.shape
    zoom_x, zoom_y = width / geometry.target_width, height / geometry.target_height
    if abs(geometry.target_height * zoom_x - height) > 1.0 and abs(geometry.target_width * zoom_y - width) > 1.0:
        raise ValueError(
            f"[QE_INPUT] edited image: got {width}×{height}, expected {geometry.target_width}×"
            f"{geometry.target_height} or a multiple of it. Connect the geometry of the Smart Resize that "
            "made it."
        )
    sources = 1 if geometry.source is None else geometry.source.shape[0]
    if batch % sources:
        raise ValueError(
            f"[QE_INPUT] edited image: got a batch of {batch} for a source batch of {sources}, expected "
            f"{sources} or a multiple of it (picture i belongs to source i modulo {sources})."
        )
    content, box = geometry.content_box, geometry.source_box
    result = resize(
        rgb,
        box.width,
        box.height,
        (
            content.x * zoom_x,
            content.y * zoom_y,
            min(float(width), (content.x + content.width) * zoom_x),
            min(float(height), (content.y + content.height) * zoom_y),
        ),
    )
    whole = (box.width, box.height) == (geometry.source_width, geometry.source_height)
    if whole and mask is None:
        return result.clone() if result.data_ptr() == edited.data_ptr() else result
    source = _source(geometry, batch)
    if not whole:
        pasted = source.clone()
        pasted[:, box.y : box.y + box.height, box.x : box.x + box.width] = result
        result = pasted
    if mask is None:
        return result
    weight = _weights(geometry, mask, batch, feather).unsqueeze(-1)
    blended = torch.lerp(source, result, weight)
    return torch.where(weight == 0, source, torch.where(weight == 1, result, blended))


def feather_inside(mask: torch.Tensor, feather: int) -> torch.Tensor:
    """How much of the edit each pixel takes: [B, H, W] in [0, 1], exactly 0 where the mask is 0.

    The weight grows with the distance to the outside, reaching the mask's own value `feather` px from the
    border. Parts too thin for that reach it at their middle. The picture's own border is no seam: nothing
    fades there.
    """
    # ComfyUI brings scipy; imported here because it takes a while and few prompts need it
    from scipy.ndimage import distance_transform_edt, maximum_filter

    weights = mask.clone()
    for weight, inside in zip(weights, (mask > 0).numpy(), strict=True):
        if feather == 0 or not inside.any() or inside.all():
            continue
        rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
        part = (
            slice(max(0, rows[0] - 1), rows[-1] + 2),
            slice(max(0, columns[0] - 1), columns[-1] + 2),
        )
        distance = np.asarray(distance_transform_edt(inside[part]), dtype=np.float32)
        depth = np.minimum(distance, feather + 1)
        thickest = maximum_filter(depth, size=2 * feather + 1)
        weight[part] *= torch.from_numpy(depth / np.maximum(thickest, 1))
    return weights


def _weights(geometry: Geometry, mask: torch.Tensor, batch: int, feather: int) -> torch.Tensor:
    """The blending weights [B, H, W] at source size for a mask at source or target size."""
    if not 0 <= feather <= 256:
        raise ValueError(f"[QE_INPUT] feather: got {feather}, expected 0 to 256 px.")
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"[QE_INPUT] mask: got the shape {list(mask.shape)}, expected [B, H, W].")
    mask = mask.detach().to(device="cpu", dtype=torch.float32)
    if not bool(torch.isfinite(mask).all()) or float(mask.min()) < 0 or float(mask.max()) > 1:
        raise ValueError(
            f"[QE_INPUT] mask: values from {float(mask.min()):g} to {float(mask.max()):g}, expected 0 to 1."
        )
    count, height, width = mask.shape
    if batch % count:
        raise ValueError(f"[QE_INPUT] mask: got {count} masks for {batch} pictures, expected 1 or {batch}.")
    size, source_size = (width, height), (geometry.source_width, geometry.source_height)
    target_size = (geometry.target_width, geometry.target_height)
    if size != source_size and size == target_size:
        box, content = geometry.source_box, geometry.content_box
        edges = (content.x, content.y, content.x + content.width, content.y + content.height)
        part = resize(mask.unsqueeze(-1), box.width, box.height, edges, Image.Resampling.BILINEAR).squeeze(-1)
        mask = torch.zeros((count, geometry.source_height, geometry.source_width))
        mask[:, box.y : box.y + box.height, box.x : box.x + box.width] = part
    elif size != source_size:
        raise ValueError(
            f"[QE_INPUT] mask: got {width}×{height}, expected the source's {source_size[0]}×{source_size[1]} "
            f"or the model picture's {target_size[0]}×{target_size[1]}. Load Image gives an empty 64×64 mask "
            "for a picture without transparency: paint one, or disconnect it."
        )
    return feather_inside(mask, feather).repeat(batch // count, 1, 1)


def _source(geometry: Geometry, batch: int) -> torch.Tensor:
    """The source as RGB, repeated to `batch`."""
    if geometry.source is None:
        raise ValueError(
            "[QE_INPUT] geometry: it carries no source picture, which a crop or a mask needs. Use the "
            "geometry output of Smart Resize."
        )
    source = to_rgb(geometry.source, "source image")
    _check_size("source image", source, geometry.source_width, geometry.source_height)
    return source if source.shape[0] == batch else source.repeat(batch // source.shape[0], 1, 1, 1)


def nearest_multiple(side: float) -> int:
    """The multiple of 32 nearest to a side in px, at least 32."""
    return max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE)


def _centred(outer_width: int, outer_height: int, width: float, height: float) -> Box:
    """A box of the nearest whole size, at least one pixel, in the middle of the outer rectangle."""
    inner_width = min(outer_width, max(1, round(width)))
    inner_height = min(outer_height, max(1, round(height)))
    return Box((outer_width - inner_width) // 2, (outer_height - inner_height) // 2, inner_width, inner_height)


def _check_source(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"[QE_INPUT] image: got {width}×{height} px, expected at least 1×1.")


def _check_size(name: str, image: torch.Tensor, width: int, height: int) -> None:
    if (image.shape[2], image.shape[1]) != (width, height):
        raise ValueError(
            f"[QE_INPUT] {name}: got {image.shape[2]}×{image.shape[1]}, expected {width}×{height}, the size "
            "that this geometry was made for."
        )
