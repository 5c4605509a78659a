"""What can be asked of the loader. Light, because ComfyUI reads it for the node list."""

from dataclasses import dataclass

import torch

from . import folders

PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROFILES = ("auto", "quality")
OFFLOAD = ("auto", "none", "text encoder", "stream")
VERSIONS = {"auto": None, "2511": True, "2509": False}


@dataclass(frozen=True)
class LoadRequest:
    """The loader's widgets."""

    model: str
    text_encoder: str = folders.FROM_MODEL
    vae: str = folders.FROM_MODEL
    precision: str = "auto"
    attention: str = "auto"
    offload: str = "auto"
    model_version: str = "auto"
