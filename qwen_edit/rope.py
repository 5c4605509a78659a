"""Token positions and the rotary table of Qwen-Image's joint attention.

A token's position is three numbers: frame (0 for the output, n for reference n), row and column. diffusers
and ComfyUI agree on them only for even grids with no reference larger than the output, so the convention is
a parameter:

- ``"diffusers"``: rows and columns are centred with the larger half negative; text starts after the
  largest picture (diffusers ``models/transformers/transformer_qwenimage.py``, ``QwenEmbedRope``).
- ``"comfyui"``: the smaller half is negative; text starts after the output picture
  (ComfyUI ``comfy/ldm/qwen_image/model.py``).
"""

from functools import lru_cache
from typing import Literal

import torch

Positions = Literal["diffusers", "comfyui"]
Grid = tuple[int, int]  # rows, columns of tokens (a token is 2x2 latents, 16x16 pixels)

THETA = 10000.0


@lru_cache(maxsize=8)  # 4 MiB each at 1024² with one reference
def rope_table(
    grids: tuple[Grid, ...],
    text_length: int,
    axes_dims: tuple[int, int, int],
    positions: Positions,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every token's rotation angles, float32.

    Args:
        grids: token grids of the output and of each reference, in that order.
        text_length: number of text tokens.
        axes_dims: head channels that frame, row and column rotate (16, 56, 56 in the released model).

    Returns:
        Of the text and of the image tokens, each ``[2, tokens, sum(axes_dims) // 2]``.
    """
    # Inference tensors must not outlive the mode in a cache that training or plain Python may read.
    with torch.inference_mode(False):
        frequencies = [1.0 / torch.pow(THETA, torch.arange(0, dim, 2).to(torch.float32).div(dim)) for dim in axes_dims]
        first_text = _first_text_position(grids, positions)
        text = torch.arange(first_text, first_text + text_length)
        angles = [torch.cat([torch.outer(text, f) for f in frequencies], dim=1)]
        for frame, (rows, columns) in enumerate(grids):
            row = torch.arange(rows) - _half(rows, positions)
            column = torch.arange(columns) - _half(columns, positions)
            along = (
                torch.outer(torch.tensor([frame]), frequencies[0])[:, None, :],
                torch.outer(row, frequencies[1])[:, None, :],
                torch.outer(column, frequencies[2])[None, :, :],
            )
            angles.append(torch.cat([a.expand(rows, columns, -1) for a in along], dim=-1).flatten(0, 1))
        text_angles, image_angles = angles[0], torch.cat(angles[1:])
        text, image = (torch.stack([a.cos(), a.sin()]).to(device) for a in (text_angles, image_angles))
        return text, image


def _half(size: int, positions: Positions) -> int:
    return size - size // 2 if positions == "diffusers" else size // 2


def _first_text_position(grids: tuple[Grid, ...], positions: Positions) -> int:
    counted = grids if positions == "diffusers" else grids[:1]
    return max(max(rows // 2, columns // 2) for rows, columns in counted)
