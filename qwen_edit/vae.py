"""The arithmetic of the video VAE on one frame, where it is a 2D network.

Source of the network: Wan-Video/Wan2.1 ``wan/modules/vae.py``; Qwen-Image's VAE is the same one. Its convolutions
are causal: before the first frame they see zeros. So on a single frame only the last temporal slice of a kernel
counts, and a 3x3x3 convolution is a 3x3 one.

All tensors are ``[B, C, H, W]`` in channels_last: the norm then runs over contiguous channels, and tensor cores take
the convolutions without a conversion before and after each.
"""

import torch
import torch.nn.functional as F

SMALLEST_NORM = 1e-12  # F.normalize's, with which Wan's norm divides


def convolve_frame(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int]
) -> torch.Tensor:
    """A causal 3D convolution of a first frame, stride 1.

    The slice of ``weight [O, I, T, h, w]`` stays a view: a copy in the layout of its kernel is made by the backend
    for each call anyway (at most 2.6 MB in bf16 at the released size), and none has to be kept.
    """
    return F.conv2d(x, weight[:, :, -1], bias, padding=padding)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Wan's norm over channels: ``x / |x| * sqrt(C) * gamma``; ``gamma`` has ``C`` elements in any shape."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)
    return (x * (x.shape[1] ** 0.5 / length)).mul_(gamma.to(x).view(-1, 1, 1))
