"""What can be asked of the loader and the LoRA switch. Light, because ComfyUI reads it for the node list."""

from dataclasses import dataclass

from . import folders

OFFLOAD = ("auto", "none", "text encoder", "stream")
LORA_MODES = ("auto", "resident", "fused")  # append only: saved workflows hold these names
VERSIONS = {"auto": None, "2511": True, "2509": False}


@dataclass(frozen=True)
class LoadRequest:
    """The loader's widgets."""

    model: str
    text_encoder: str = folders.FROM_MODEL
    vae: str = folders.FROM_MODEL
    profile: str = "auto"
    precision: str = "auto"
    attention: str = "auto"
    offload: str = "auto"
    model_version: str = "auto"
