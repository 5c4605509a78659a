"""Writes what training made in the layout that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline
from peft import LoraConfig, get_peft_model_state_dict

LORA_RANK = 8
LORA_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"]
LORA_FILE = "qwen_edit_demo_{}.safetensors"


def lora_config(initialise: bool = True) -> LoraConfig:
    """alpha equals the rank: loaders that don't read alpha from the file's metadata scale by 1, which is
    right.
    """
    return LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_RANK, init_lora_weights=initialise, target_modules=list(LORA_TARGETS)
    )


def save_pipeline(pipeline: QwenImageEditPlusPipeline, folder: Path) -> None:
    """Write the whole folder with bf16 weights (VAE: float16). The pipeline keeps its own precision."""
    before = {}
    for name in ("vae", "transformer", "text_encoder"):
        module = getattr(pipeline, name)
        before[name] = {k: v.clone() for k, v in module.state_dict().items()}
        module.to(torch.float16 if name == "vae" else torch.bfloat16)
    pipeline.save_pretrained(str(folder))
    for name, state in before.items():
        module = getattr(pipeline, name)
        module.to(torch.float32)
        module.load_state_dict(state)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def save_lora(transformer: torch.nn.Module, folder: Path, name: str) -> Path:
    """Write the transformer's adapter "default" as a diffusers LoRA file (keys
    `transformer.….lora_A.weight`).
    """
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in get_peft_model_state_dict(transformer).items()}
    config = transformer.peft_config["default"].to_dict()
    kept = ("r", "lora_alpha", "target_modules", "peft_type", "bias", "rank_pattern", "alpha_pattern")
    metadata = {key: sorted(v) if isinstance(v := config[key], set) else v for key in kept}
    metadata["peft_type"] = "LORA"
    QwenImageEditPlusPipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers=state,
        weight_name=LORA_FILE.format(name),
        transformer_lora_adapter_metadata=metadata,
    )
    path = folder / LORA_FILE.format(name)
    path.chmod(0o644)
    return path


def save_preview_factors(folder: Path, factors: list, bias: list) -> None:
    """`factors` 16×3 and `bias` 3 map a latent (normalized with the VAE's mean and std) to RGB in [-1, 1]."""
    text = json.dumps({"latent_rgb_factors": factors, "latent_rgb_factors_bias": bias}, indent=1)
    (folder / "vae" / "preview_factors.json").write_text(text + "\n")
