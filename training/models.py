"""The parts of the demo model, untrained, and the folder that holds them.

Every class is the one the real model has (see `model_index.json` of Qwen-Image-Edit-2511); only sizes differ.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from training.tokenizer import build_tokenizer

TEXT_WIDTH = 128
# 56 pixels per merged vision token (the real model has 28): a 384² picture is 49 text tokens instead of 196.
VISION_PATCH = 28


def build_vae() -> AutoencoderKLQwenImage:
    """3.5 M parameters. ComfyUI's loader hard-codes dim_mult and num_res_blocks and reads the width from the
    file.
    """
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def build_transformer() -> QwenImageTransformer2DModel:
    """6.9 M parameters: 5 double-stream blocks of width 192."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
        zero_cond_t=True,
    )


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": VISION_PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * VISION_PATCH,
            "fullatt_block_indexes": [0, 1],
            "out_hidden_size": TEXT_WIDTH,
            "tokens_per_second": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.bos_token_id = token("<|endoftext|>")
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    kind = {"patch_size": VISION_PATCH, "merge_size": 2, "temporal_patch_size": 2}
    factor = 2 * VISION_PATCH
    size = {"shortest_edge": 2 * 2 * factor**2, "longest_edge": factor**2 * 1280}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **kind),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, **kind),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The configuration of Qwen-Image-Edit-2511's scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def build_pipeline(vocabulary: Path, seed: int = 0) -> QwenImageEditPlusPipeline:
    """The whole model with fresh float32 weights; `vocabulary` holds Qwen2.5's vocab.json and merges.txt."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary)
    return QwenImageEditPlusPipeline(
        scheduler=build_scheduler(),
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=build_processor(tokenizer),
        transformer=build_transformer(),
    )
