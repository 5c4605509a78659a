"""LANCZOS on float pictures with sub-pixel boxes, and the rule that turns any picture into RGB.

diffusers and ComfyUI resize 8-bit PIL images. Here each channel goes through PIL's mode "F" instead: the same
filter and the same placement of pixel centres (output pixel i is centred on box.x + (i + 0.5) * scale),
without rounding to 1/255 on the way in and out. One channel of one picture is in flight at a time, so the
extra memory is one channel, not one batch.
"""

import numpy as np
import torch
from PIL import Image

from .finite import all_finite

# PIL first averages whole blocks of pixels when the picture shrinks by more than this, then filters. Three is
# the value PIL documents as "almost indistinguishable from" filtering alone; it keeps a 20000-pixel side
# affordable.
REDUCING_GAP = 3.0


def to_rgb(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """A picture as float32 RGB on the CPU; the input is never written to.

    `image` is [B, H, W, C] with C = 1 (grey, repeated), 2 (grey and alpha), 3, or 4 (RGB and alpha), or a
    mask-shaped [B, H, W], read as grey. Alpha is composited over white. Returns [B, H, W, 3]; it may share
    memory with `image`. Raises ValueError `[QE_INPUT]` for another shape, an integer dtype or an empty
    picture, and `[QE_NAN]` for NaN or Inf.
    """
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"[QE_INPUT] {name}: got {type(image).__name__}, expected a picture tensor [B, H, W, C].")
    shape = list(image.shape)
    if not image.is_floating_point():
        raise ValueError(
            f"[QE_INPUT] {name}: got {image.dtype} {shape}, expected floats from 0 to 1. Divide 8-bit values by 255."
        )
    if image.ndim == 3 and shape[-1] > 4:
        image = image.unsqueeze(-1)
    if image.ndim != 4 or image.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            f"[QE_INPUT] {name}: got the shape {shape}, expected [B, H, W, C] with 1 to 4 channels, or a "
            "mask [B, H, W]. A single picture needs a batch dimension of 1."
        )
    if 0 in shape:
        raise ValueError(
            f"[QE_INPUT] {name}: got the empty shape {shape}, expected at least one picture of at least 1×1 pixel."
        )
    image = image.detach().to(device="cpu", dtype=torch.float32)
    if not all_finite(image):
        nan, inf = int(torch.isnan(image).sum()), int(torch.isinf(image).sum())
        raise ValueError(
            f"[QE_NAN] {name}: {nan} NaN and {inf} Inf values in {shape}, expected finite values from 0 to "
            "1. Look at what made the picture; for a sampled one, try another attention or precision."
        )
    if image.shape[-1] in (2, 4):
        alpha = image[..., -1:]
        image = image[..., :-1] * alpha + (1.0 - alpha)
    return image.expand(-1, -1, -1, 3)


def resize(
    image: torch.Tensor,
    width: int,
    height: int,
    box: tuple[float, float, float, float] | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> torch.Tensor:
    """Resample [B, H, W, C] float32 to [B, height, width, C].

    `box` (left, top, right, bottom in pixels, fractions allowed) is the part of the picture that fills the
    result; None is the whole. The filter's overshoot is cut off at [0, 1], or at the input's own range where
    that is wider, so pictures stay pictures and unusual ranges survive. Returns the input itself where
    nothing has to change.
    """
    batch, in_height, in_width, channels = image.shape
    whole = (0.0, 0.0, float(in_width), float(in_height))
    box = whole if box is None else box
    if (width, height) == (in_width, in_height) and box == whole:
        return image
    low, high = min(0.0, float(image.min())), max(1.0, float(image.max()))
    result = np.empty((batch, height, width, channels), dtype=np.float32)
    for b in range(batch):
        for c in range(channels):
            channel = Image.fromarray(np.ascontiguousarray(image[b, :, :, c].numpy()))
            scaled = channel.resize((width, height), resample, box=box, reducing_gap=REDUCING_GAP)
            np.clip(np.asarray(scaled), low, high, out=result[b, :, :, c])
    return torch.from_numpy(result)
