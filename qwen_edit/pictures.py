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
    # in numpy: torch starts all threads for each of the passes, which takes longer than the passes
    values = image.detach().float().cpu().numpy() * np.float32(255)
    np.rint(values, out=values)
    np.clip(values, 0, 255, out=values)
    return Image.fromarray(values.astype(np.uint8), mode="RGB")


def to_tensor(picture: Image.Image, device: torch.device | str = "cpu") -> torch.Tensor:
    """8-bit RGB -> ``[1, H, W, 3]`` float32 in [0, 1] on a device, the same bits on each."""
    pixels = torch.from_numpy(np.array(picture)).unsqueeze(0).to(device).float()
    # by a tensor: by a number, CUDA multiplies with its rounded reciprocal
    return pixels.div_(torch.full((), 255.0, device=device))


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """LANCZOS to exactly ``width`` x ``height`` pixels; the same object when the size is already right."""
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS)
