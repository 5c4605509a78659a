"""Pictures on their way to the model, exactly as diffusers' pipeline prepares them.

diffusers works on 8-bit PIL pictures and resizes them with LANCZOS, for the vision-language encoder and for the
reference latents alike (``VaeImageProcessor.resize``). ComfyUI's IMAGE is float in [0, 1]; it is rounded to 8 bits
first, so that both see the same pixels.
"""

import numpy as np
import torch
from PIL import Image


def to_pil(image: torch.Tensor) -> Image.Image:
    """One picture ``[H, W, 3]``, float in [0, 1] -> 8-bit RGB, rounded to nearest."""
    array = image.detach().float().cpu().mul(255).round_().clamp_(0, 255).to(torch.uint8).numpy()
    return Image.fromarray(array, mode="RGB")


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """8-bit RGB -> ``[1, H, W, 3]`` float32 in [0, 1]."""
    pixels = np.asarray(picture).astype(np.float32)
    pixels /= 255
    return torch.from_numpy(pixels).unsqueeze(0)


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """LANCZOS to exactly ``width`` x ``height`` pixels; the same object when the size is already right."""
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS)
