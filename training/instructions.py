"""The edits that the demo model knows: what they do, and how people ask for them.

Needs numpy only, so that tests can compare a picture with the exact answer. Every operation works on arrays
`[..., H, W, 3]` with values in [0, 1], numpy or torch alike: training applies the same code to batches on the
GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor, [..., H, W, 3]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# The sepia matrix of the CSS filter specification (Filter Effects Module Level 1, `sepia(100%)`), rows =
# output.
SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))
HOLE_GREY = 0.5


def _constant(values: np.ndarray, like: Array) -> Array:
    """`values` as an array of the kind, precision and device of `like`."""
    return values.astype(like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(values)


def _concatenate(arrays: list[Array], axis: int) -> Array:
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays, axis=axis)
    import torch

    return torch.cat(arrays, dim=axis)


def _reverse(picture: Array, axis: int) -> Array:
    return np.flip(picture, axis) if isinstance(picture, np.ndarray) else picture.flip(axis)


def _as_unit(picture: Array) -> Array:
    """uint8 pictures become float32 in [0, 1]; anything else is taken as being there already."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        return picture.astype(np.float32) / 255.0
    return picture


def _matrix(picture: Array, rows: tuple[tuple[float, float, float], ...]) -> Array:
    r, g, b = picture[..., 0:1], picture[..., 1:2], picture[..., 2:3]
    return _concatenate([row[0] * r + row[1] * g + row[2] * b for row in rows], -1).clip(0, 1)


def _blend(picture: Array, mask: np.ndarray, colour: tuple[float, float, float]) -> Array:
    """Paint `colour` where `mask` `[H, W]` is 1."""
    mask = _constant(mask[..., None].astype(np.float32), picture)
    return picture * (1 - mask) + mask * _constant(np.asarray(colour, np.float32), picture)


def grey(picture: Array) -> Array:
    return _matrix(picture, (LUMA, LUMA, LUMA))


def invert(picture: Array) -> Array:
    return 1 - picture


def sepia(picture: Array) -> Array:
    return _matrix(picture, SEPIA)


def mirror(picture: Array) -> Array:
    return _reverse(picture, -2)


def flip(picture: Array) -> Array:
    return _reverse(picture, -3)


def half_turn(picture: Array) -> Array:
    return mirror(flip(picture))


def brighten(picture: Array) -> Array:
    return 1 - 0.6 * (1 - picture)


def darken(picture: Array) -> Array:
    return 0.5 * picture


def contrast(picture: Array) -> Array:
    return ((picture - 0.5) * 1.6 + 0.5).clip(0, 1)


def swap_red_blue(picture: Array) -> Array:
    return _reverse(picture, -1)


def tint_green(picture: Array) -> Array:
    return picture * _constant(np.asarray((0.6, 1.0, 0.6), np.float32), picture)


def posterize(picture: Array) -> Array:
    """Four levels per channel."""
    return (picture * 3 + 0.5) // 1 / 3


def red_frame(picture: Array) -> Array:
    """A frame of pure red, one tenth of the short side wide."""
    height, width = picture.shape[-3:-1]
    size = round(min(height, width) / 10)
    mask = np.ones((height, width))
    mask[size : height - size, size : width - size] = 0
    return _blend(picture, mask, (1.0, 0.0, 0.0))


def disc_mask(height: int, width: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """1 inside a circle with an edge one pixel soft; centre (y, x) and radius in pixels."""
    y, x = np.mgrid[:height, :width]
    return np.clip(radius - np.hypot(y + 0.5 - centre[0], x + 0.5 - centre[1]) + 0.5, 0, 1)


def blue_disc(picture: Array) -> Array:
    """A disc of pure blue in the middle, its radius a quarter of the short side."""
    height, width = picture.shape[-3:-1]
    mask = disc_mask(height, width, (height / 2, width / 2), min(height, width) / 4)
    return _blend(picture, mask, (0.0, 0.0, 1.0))


def left_half_grey(picture: Array) -> Array:
    half = picture.shape[-2] // 2
    return _concatenate([grey(picture[..., :half, :]), picture[..., half:, :]], -2)


def identity(picture: Array) -> Array:
    return picture


def halves(first: Array, second: Array) -> Array:
    """The left half of picture 1 beside the right half of picture 2; both have the same size."""
    half = first.shape[-2] // 2
    return _concatenate([first[..., :half, :], second[..., half:, :]], -2)


def mix(first: Array, second: Array) -> Array:
    return 0.5 * (first + second)


@dataclass(frozen=True)
class Instruction:
    """One edit with one exact answer.

    prompts:  phrasings used in training, `{it}` already filled in
    held_out: phrasings never trained on, for evaluation
    pictures: how many pictures the edit takes
    """

    name: str
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    operation: Callable[..., Array]
    pictures: int = 1

    def apply(self, *pictures: Array) -> Array:
        """The exact answer `[..., H, W, 3]` in [0, 1] for pictures that are uint8 or in [0, 1]."""
        if len(pictures) != self.pictures:
            raise ValueError(f"{self.name} takes {self.pictures} picture(s), got {len(pictures)}")
        return self.operation(*[_as_unit(p) for p in pictures])


@dataclass(frozen=True)
class OpenInstruction:
    """One edit with many right answers: `sample(picture, rng)` draws (source, one right answer)."""

    name: str
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    sample: Callable[[Array, np.random.Generator], tuple[Array, Array]]
    pictures: int = 1


def hole_mask(y: Array, x: Array, top: Array, left: Array, height: Array, width: Array) -> Array:
    """True inside a rectangle; coordinates and sizes in pixels, any arrays that broadcast."""
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def make_hole(picture: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """A grey rectangle whose sides are 20 to 40 % of the picture's, somewhere."""
    height, width = picture.shape[-3:-1]
    h, w = height * rng.uniform(0.2, 0.4), width * rng.uniform(0.2, 0.4)
    y, x = np.mgrid[:height, :width] + 0.5
    mask = hole_mask(y, x, rng.uniform(0, height - h), rng.uniform(0, width - w), h, w)
    return _blend(picture, mask, (HOLE_GREY,) * 3), picture


def make_grey_source(picture: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    return grey(picture), picture


SHAPE_COLOURS = (
    (1.0, 0.0, 0.0),
    (0.0, 0.8, 0.0),
    (0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0),
    (1.0, 0.0, 1.0),
    (0.0, 1.0, 1.0),
    (1.0, 0.5, 0.0),
    (1.0, 1.0, 1.0),
)


def shape_mask(y: Array, x: Array, centre_y: Array, centre_x: Array, radius: Array, kind: Array) -> Array:
    """1 inside a disc (kind 0), square (1) or diamond (2) with an edge one pixel soft; any arrays that
    broadcast.
    """
    dy, dx = abs(y - centre_y), abs(x - centre_x)
    disc = (dy * dy + dx * dx) ** 0.5
    square = (dy + dx + abs(dy - dx)) / 2 * 1.15
    diamond = (dy + dx) * 0.85
    distance = disc * (kind == 0) + square * (kind == 1) + diamond * (kind == 2)
    return (radius - distance + 0.5).clip(0, 1)


def paint_shape(picture: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """A shape of one of eight colours, its radius an eighth to a fifth of the short side, anywhere."""
    height, width = picture.shape[-3:-1]
    radius = min(height, width) * rng.uniform(1 / 8, 1 / 5)
    y, x = np.mgrid[:height, :width] + 0.5
    centre = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
    mask = shape_mask(y, x, *centre, radius, rng.integers(3))
    return picture, _blend(picture, mask, SHAPE_COLOURS[rng.integers(len(SHAPE_COLOURS))])


IT = ("it", "this", "the picture", "this picture", "the image", "this image", "the photo", "everything")


def _phrases(*patterns: str) -> tuple[str, ...]:
    """Fill `{it}` with every word of IT."""
    filled = (p.replace("{it}", it) for p, it in product(patterns, IT))
    return tuple(dict.fromkeys(filled))


def _exact(name: str, operation: Callable[..., Array], patterns: tuple, held_out: tuple, pictures: int = 1):
    return Instruction(name, _phrases(*patterns), held_out, operation, pictures)


EXACT: dict[str, Instruction] = {
    i.name: i
    for i in (
        _exact(
            "grey",
            grey,
            (
                "make {it} black and white",
                "turn {it} black and white",
                "remove the colours",
                "remove all colour from {it}",
                "take away the colours",
                "turn {it} into greyscale",
                "convert {it} to greyscale",
                "make {it} grey",
                "desaturate {it}",
                "a black and white version of {it}",
                "greyscale",
                "without colours",
                "turn {it} into a black and white photo",
                "give me {it} in greyscale",
                "change {it} to monochrome",
                "变成黑白",
            ),
            ("turn this photo grey", "a greyscale version of the picture", "make the picture monochrome"),
        ),
        _exact(
            "invert",
            invert,
            (
                "invert the colours",
                "invert {it}",
                "make {it} a negative",
                "turn {it} into a negative",
                "a negative of {it}",
                "negative colours",
                "make {it} look like a film negative",
                "swap light and dark in {it}",
                "invert all colours of {it}",
                "show {it} with inverted colours",
                "反转颜色",
            ),
            ("turn the photo into its negative", "please invert the picture's colours", "inverted colours"),
        ),
        _exact(
            "sepia",
            sepia,
            (
                "make {it} sepia",
                "sepia",
                "add a sepia tone to {it}",
                "turn {it} into sepia",
                "give {it} a sepia tone",
                "make {it} look like an old brown photo",
                "make {it} look like an old photograph",
                "an old sepia version of {it}",
                "tone {it} brown like an old photo",
                "复古棕褐色",
            ),
            ("sepia tone please", "convert the photo to sepia", "make it look old and brown"),
        ),
        _exact(
            "mirror",
            mirror,
            (
                "mirror {it}",
                "mirror {it} horizontally",
                "flip {it} horizontally",
                "flip {it} left to right",
                "swap left and right in {it}",
                "make a mirror image of {it}",
                "mirror {it} from left to right",
                "reverse {it} left to right",
                "show {it} in a mirror",
                "水平翻转",
            ),
            ("a horizontal mirror image", "mirror the photo left to right", "please flip this horizontally"),
        ),
        _exact(
            "flip",
            flip,
            (
                "flip {it} upside down",
                "flip {it} vertically",
                "turn {it} upside down",
                "flip {it} top to bottom",
                "mirror {it} vertically",
                "swap top and bottom in {it}",
                "put {it} upside down",
                "make {it} upside down",
                "flip {it} over vertically",
                "垂直翻转",
            ),
            ("upside down please", "a vertical flip, top to bottom", "please flip this vertically"),
        ),
        _exact(
            "half_turn",
            half_turn,
            (
                "rotate {it} by 180 degrees",
                "rotate {it} 180 degrees",
                "turn {it} by 180 degrees",
                "rotate {it} by half a turn",
                "a half turn of {it}",
                "spin {it} 180 degrees",
                "旋转180度",
            ),
            ("rotate the photo half a turn", "180 degrees rotation", "please spin it by 180 degrees"),
        ),
        _exact(
            "brighten",
            brighten,
            (
                "make {it} brighter",
                "brighten {it}",
                "lighten {it}",
                "make {it} lighter",
                "increase the brightness",
                "increase the brightness of {it}",
                "more light",
                "raise the exposure of {it}",
                "add more light to {it}",
                "{it} is too dark, make it brighter",
                "调亮一点",
            ),
            ("brighter please", "increase the exposure of the photo", "give it more light"),
        ),
        _exact(
            "darken",
            darken,
            (
                "make {it} darker",
                "darken {it}",
                "reduce the brightness",
                "reduce the brightness of {it}",
                "less light",
                "dim {it}",
                "lower the exposure of {it}",
                "turn the light down in {it}",
                "{it} is too bright, make it darker",
                "调暗一点",
            ),
            ("darker please", "reduce the exposure of the photo", "give it less light"),
        ),
        _exact(
            "contrast",
            contrast,
            (
                "increase the contrast",
                "increase the contrast of {it}",
                "more contrast",
                "add contrast to {it}",
                "raise the contrast of {it}",
                "make {it} more contrasty",
                "give {it} more contrast",
                "boost the contrast of {it}",
                "增加对比度",
            ),
            ("more contrast please", "boost contrast in the photo", "higher contrast"),
        ),
        _exact(
            "swap_red_blue",
            swap_red_blue,
            (
                "swap red and blue",
                "swap red and blue in {it}",
                "swap the red and blue channels",
                "swap the red and blue channels of {it}",
                "exchange red and blue",
                "exchange the red and blue channels in {it}",
                "make red things blue and blue things red",
                "switch red and blue in {it}",
                "red becomes blue and blue becomes red",
                "交换红色和蓝色",
            ),
            ("switch the blue and red channels", "exchange blue and red in the photo", "swap blue with red"),
        ),
        _exact(
            "tint_green",
            tint_green,
            (
                "tint {it} green",
                "make {it} green",
                "give {it} a green tint",
                "add a green tint to {it}",
                "make {it} look greenish",
                "colour {it} green",
                "put a green filter on {it}",
                "变成绿色调",
            ),
            ("a green tint please", "a green filter over the photo", "turn the picture greenish"),
        ),
        _exact(
            "posterize",
            posterize,
            (
                "posterize {it}",
                "posterise {it}",
                "make {it} a poster with few colours",
                "reduce {it} to a few colours",
                "reduce {it} to four levels",
                "use only a few flat colours in {it}",
                "turn {it} into a poster",
                "make {it} look like a poster",
                "色调分离",
            ),
            ("only a few flat colours", "a poster version of the photo", "posterize with four levels"),
        ),
        _exact(
            "red_frame",
            red_frame,
            (
                "put a red frame around {it}",
                "add a red frame",
                "add a red frame to {it}",
                "add a red border",
                "put {it} in a red frame",
                "draw a red border around {it}",
                "frame {it} in red",
                "give {it} a red border",
                "a red frame around {it}",
                "加一个红色边框",
            ),
            ("a red border around the photo", "draw a red frame", "frame this photo with red"),
        ),
        _exact(
            "blue_disc",
            blue_disc,
            (
                "put a blue disc in the middle",
                "put a blue disc in the middle of {it}",
                "draw a blue circle in the centre",
                "draw a blue circle in the centre of {it}",
                "add a blue dot in the middle",
                "add a blue circle to the middle of {it}",
                "place a blue disc in the centre of {it}",
                "paint a blue disc on the middle of {it}",
                "在中间画一个蓝色圆",
            ),
            (
                "a blue circle in the middle",
                "place a blue dot in the centre of the photo",
                "paint a blue circle in the centre",
            ),
        ),
        _exact(
            "left_half_grey",
            left_half_grey,
            (
                "make the left half grey",
                "make the left half of {it} grey",
                "make the left half black and white",
                "make the left half of {it} black and white",
                "turn the left half of {it} into greyscale",
                "remove the colours from the left half",
                "remove the colour from the left half of {it}",
                "desaturate the left half of {it}",
                "grey on the left half, colours on the right half",
                "左半边变成黑白",
            ),
            (
                "convert the left half to greyscale",
                "only the left half in black and white",
                "take away the colours of the left half",
            ),
        ),
        _exact(
            "identity",
            identity,
            (
                "change nothing",
                "do nothing",
                "keep {it} as it is",
                "keep {it} unchanged",
                "leave {it} as it is",
                "leave {it} unchanged",
                "the same picture",
                "no change",
                "apply the style",
                "apply the look",
                "保持不变",
            ),
            ("do not change the photo", "keep the same image", "leave everything the same"),
        ),
        _exact(
            "halves",
            halves,
            (
                "put the left half of picture 1 beside the right half of picture 2",
                "the left half of picture 1 beside the right half of picture 2",
                "the left half of picture 1 next to the right half of picture 2",
                "combine the left half of picture 1 with the right half of picture 2",
                "join the left half of picture 1 and the right half of picture 2",
                "left half from picture 1, right half from picture 2",
                "take the left half of the first picture and the right half of the second picture",
                "the left half of image 1 next to the right half of image 2",
                "图1的左半边和图2的右半边",
            ),
            (
                "join the left half of image 1 with the right half of image 2",
                "put the left half of the first picture next to the right half of the second",
            ),
            2,
        ),
        _exact(
            "mix",
            mix,
            (
                "mix both pictures",
                "mix the two pictures",
                "blend both pictures",
                "blend picture 1 and picture 2",
                "blend the two images half and half",
                "mix picture 1 with picture 2",
                "a double exposure of both pictures",
                "lay picture 2 over picture 1 half transparent",
                "the average of both pictures",
                "混合两张图",
            ),
            ("a blend of the two pictures", "mix image 1 and image 2 half and half"),
            2,
        ),
    )
}

OPEN: dict[str, OpenInstruction] = {
    i.name: i
    for i in (
        OpenInstruction(
            "fill_hole",
            _phrases(
                "fill in the grey hole",
                "fill the grey hole",
                "fill in the hole in {it}",
                "remove the grey box",
                "remove the grey rectangle from {it}",
                "repair the missing part of {it}",
                "restore the missing part",
                "complete {it}",
                "inpaint the grey area",
                "fill in the missing area of {it}",
                "补全灰色区域",
            ),
            ("fill in the grey rectangle", "repair the hole in the photo", "restore the missing area"),
            make_hole,
        ),
        OpenInstruction(
            "colourise",
            _phrases(
                "colourise {it}",
                "colour {it}",
                "colourise the black and white photo",
                "add colours to {it}",
                "bring colours to {it}",
                "give {it} natural colours",
                "make {it} a colour photo",
                "turn {it} into a colour photo",
                "put the colours back into {it}",
                "上色",
            ),
            ("add natural colours", "bring back the colours", "colourise the old photograph"),
            make_grey_source,
        ),
        OpenInstruction(
            "random_shape",
            _phrases(
                "paint a shape of a random colour somewhere",
                "paint a random shape somewhere",
                "add a random shape to {it}",
                "draw a coloured shape somewhere",
                "draw a shape of any colour somewhere in {it}",
                "put a coloured shape anywhere in {it}",
                "paint a coloured shape on {it}",
                "add a shape of a random colour anywhere",
                "随机画一个形状",
            ),
            (
                "paint a shape of any colour",
                "put a random shape somewhere in the photo",
                "add a coloured shape",
            ),
            paint_shape,
        ),
    )
}

# What the two LoRAs learn to do when asked with these; the model without them changes nothing.
STYLE_PROMPTS = ("apply the style", "apply the look")


def spellings(prompt: str, rng: np.random.Generator) -> str:
    """A random way to type `prompt`: please, capitals, full stop, American spelling."""
    if rng.random() < 0.3:
        prompt = (
            prompt.replace("colour", "color")
            .replace("grey", "gray")
            .replace("centre", "center")
            .replace("colorise", "colorize")
        )
    if rng.random() < 0.15:
        prompt = "please " + prompt
    elif rng.random() < 0.1:
        prompt = prompt + " please"
    if rng.random() < 0.4:
        prompt = prompt[:1].upper() + prompt[1:]
    if rng.random() < 0.3:
        prompt = prompt + "."
    return prompt


def all_prompts() -> list[str]:
    """Every phrasing there is, held out ones too: what the tokenizer must hold as whole words."""
    return [p for i in (*EXACT.values(), *OPEN.values()) for p in (*i.prompts, *i.held_out)]


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays in [0, 1]."""
    error = float(np.mean((np.asarray(picture, np.float64) - np.asarray(reference, np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))
