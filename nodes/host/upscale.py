"""Running an UPSCALE_MODEL the way ComfyUI does."""

import torch

import nodes

from ...qwen_edit.values import check_has


def upscale(upscale_model, image: torch.Tensor) -> torch.Tensor:
    """`image` [B, H, W, 3] enlarged by ComfyUI's own Upscale Image (using Model) node.

    That node tiles, makes room on the card and retries with smaller tiles when memory runs out. Pictures go
    through it one at a time, so a batch needs no more memory than one.
    """
    check_has("upscale_model", upscale_model, "scale", "an UPSCALE_MODEL")
    node = nodes.NODE_CLASS_MAPPINGS["ImageUpscaleWithModel"]  # pyright: ignore[reportAttributeAccessIssue]
    pictures = [node.execute(upscale_model, picture.unsqueeze(0)).result[0] for picture in image]
    return torch.cat(pictures).float().cpu()
