"""diffusers' own pipeline on the demo model (or any folder of the kind): the reference that tests compare
with.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline


def pass_token_types(text_encoder: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Give the vision-language encoder the `mm_token_type_ids` that diffusers 0.42 forgets.

    Without them transformers 5 silently uses one-dimensional positions for the pictures
    (diffusers issue 14194). 1 marks the tokens of a picture, 0 text.
    """

    def add(module, args, kwargs):
        if kwargs.get("mm_token_type_ids") is None and kwargs.get("input_ids") is not None:
            kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == module.config.image_token_id).int()
        return args, kwargs

    return text_encoder.register_forward_pre_hook(add, with_kwargs=True)


def load_reference_pipeline(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> QwenImageEditPlusPipeline:
    """`QwenImageEditPlusPipeline` from a diffusers folder, offline, with `pass_token_types` on its text
    encoder.

    The pipeline's fixed picture areas (384² for the vision-language encoder, 1024² for the reference latents)
    are module constants of `diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus`; see
    `reference_area`.
    """
    pipeline = QwenImageEditPlusPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    pipeline.to(device)
    pass_token_types(pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class reference_area:
    """`with reference_area(256 * 256):` makes the reference latents of that area (pixels) instead of 1024².

    With the output's own area the reference grid is the output grid, which is how the demo model was trained.
    """

    def __init__(self, pixels: int):
        self.pixels = pixels

    def __enter__(self):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        self.module, self.before = module, module.VAE_IMAGE_SIZE
        module.VAE_IMAGE_SIZE = self.pixels

    def __exit__(self, *exception):
        self.module.VAE_IMAGE_SIZE = self.before
