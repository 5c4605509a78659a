"""The VAE of a diffusers folder or a single file as ComfyUI's VAE, made for pictures."""

import json
from pathlib import Path

import comfy.ldm.wan.vae
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import load_file

from ...qwen_edit.checkpoints import check_names, read_config, read_header, weight_files
from ...qwen_edit.doctor import VaeFacts
from ...qwen_edit.errors import WEIGHTS
from ...qwen_edit.values import check_has
from .memory import prepare_once
from .picture_vae import run_pictures_in_2d


def statistics(folder: Path) -> dict | None:
    """Latent mean, deviation and preview factors of the folder's VAE; None when they are the released VAE's."""
    config = read_config(folder / "vae")
    preview = folder / "vae" / "preview_factors.json"
    if not preview.is_file():
        return None
    return {k: config[k] for k in ("latents_mean", "latents_std")} | json.loads(preview.read_text(encoding="utf-8"))


def load_vae(folder: Path) -> comfy.sd.VAE:
    """ComfyUI's VAE with the weights of ``folder/vae``.

    Raises:
        ValueError: the VAE is not one of this family, or its names do not map.
    """
    config = read_config(folder / "vae")
    if config.get("num_res_blocks", 2) != 2 or config.get("dim_mult", [1, 2, 4, 4]) != [1, 2, 4, 4]:
        raise ValueError(f"{WEIGHTS} {folder.name}/vae: ComfyUI reads VAEs of this family with 2 residual blocks only.")
    state = {}
    for path in weight_files(folder / "vae"):
        read_header(path)
        state |= load_file(path)
    names = _comfy_names(config.get("base_dim", 96))
    check_names(f"{folder.name}/vae", names.keys(), state.keys())
    vae = comfy.sd.VAE(sd={comfy_name: state[name] for name, comfy_name in names.items()})
    return _for_pictures(vae)


def load_single_vae(path: Path, prefix: str = "") -> comfy.sd.VAE:
    """ComfyUI's VAE with the weights of a single file in Wan's own names, after ``prefix``.

    Raises:
        ValueError: ComfyUI takes it for another VAE than Qwen-Image's.
    """
    state = comfy.utils.load_torch_file(str(path))
    vae = comfy.sd.VAE(sd={k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    if not isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE):
        raise ValueError(
            f"{WEIGHTS} {path.name} is not the VAE of Qwen-Image: ComfyUI reads it as"
            f" {type(vae.first_stage_model).__module__}. Choose qwen_image_vae.safetensors."
        )
    return _for_pictures(vae)


def vae_facts(vae, name: str | None = None, replaces_that_of: str | None = None) -> VaeFacts:
    """What the doctor goes by; of any VAE of ComfyUI.

    Args:
        name, replaces_that_of: see ``VaeFacts``.
    """
    check_has("vae", vae, "decode", "a VAE")
    network = vae.first_stage_model
    ours = isinstance(network, comfy.ldm.wan.vae.WanVAE) and vae.latent_channels == 16
    return VaeFacts(name, f"{type(network).__module__}.{type(network).__name__}", ours, replaces_that_of)


def _for_pictures(vae: comfy.sd.VAE) -> comfy.sd.VAE:
    vae.not_video = True  # or an IMAGE batch of two would be encoded as a video
    run_pictures_in_2d(vae)
    prepare_once(vae.patcher)
    return vae


def _comfy_names(width: int) -> dict[str, str]:
    """diffusers' tensor name -> ComfyUI's: diffusers' own conversion of the original names, inverted."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        original = comfy.ldm.wan.vae.WanVAE(
            dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], image_channels=3, conv_out_channels=3, dropout=0.0,
        ).state_dict()  # fmt: skip
    return {new: old for new, old in convert_wan_vae_to_diffusers({k: k for k in original}).items()}
