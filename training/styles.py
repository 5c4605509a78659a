"""The looks that the two LoRAs learn, as array operations on `[..., H, W, 3]` in [0, 1], numpy or torch."""

from __future__ import annotations

import numpy as np

from training.instructions import Array, _concatenate, _constant, grey


def _box_blur(picture: Array, radius: int) -> Array:
    """Mean over (2·radius + 1)² pixels; the border repeats."""
    for axis, size in ((-3, picture.shape[-3]), (-2, picture.shape[-2])):
        total = 0
        for shift in range(-radius, radius + 1):
            index = np.clip(np.arange(size) + shift, 0, size - 1)
            total = total + (picture[..., index, :, :] if axis == -3 else picture[..., index, :])
        picture = total / (2 * radius + 1)
    return picture


def pencil_sketch(picture: Array) -> Array:
    """Colour dodge of the grey picture with its blurred negative: white paper, dark lines at edges."""
    tone = grey(picture)
    blurred = _box_blur(_box_blur(1 - tone, 3), 3)
    return (tone / (1.02 - blurred)).clip(0, 1) ** 1.5


def warm_film(picture: Array) -> Array:
    """Warm curves with lifted blacks, a little less colour, darker corners."""
    height, width = picture.shape[-3:-1]
    soft = 0.8 * picture + 0.2 * grey(picture)
    r = 0.06 + 0.94 * soft[..., 0:1] ** 0.8
    g = 0.04 + 0.90 * soft[..., 1:2]
    b = 0.03 + 0.70 * soft[..., 2:3] ** 1.15
    y, x = np.mgrid[:height, :width] + 0.5
    distance = ((y / height - 0.5) ** 2 + (x / width - 0.5) ** 2) * 2  # 1 in the corners
    vignette = _constant((1 - 0.5 * distance)[..., None], picture)
    return (_concatenate([r, g, b], -1) * vignette).clip(0, 1)


STYLES = {"pencil_sketch": pencil_sketch, "warm_film": warm_film}
