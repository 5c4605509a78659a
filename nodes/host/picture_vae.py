"""ComfyUI's video VAE (``comfy.ldm.wan.vae``) on single pictures as the 2D network that it then is.

One VAE's network, its encoder and its decoder become instances of the subclasses below. Modules, parameters and their names stay
ComfyUI's own, so its memory manager, its casts and its tiling see no difference; other VAEs are not touched, and more
frames than one take ComfyUI's path.
"""

from typing import Any

import comfy.ops
import comfy.sd
import torch
from comfy.ldm.wan.vae import AttentionBlock, CausalConv3d, Decoder3d, Encoder3d, Resample, ResidualBlock, WanVAE
from torch import nn
from torch.nn.functional import silu

from ...qwen_edit.vae import convolve_frame, rms_norm


class PictureEncoder(Encoder3d):
    def forward(self, x, feat_cache=None, feat_idx=[0], final=False):  # noqa: B006 (ComfyUI's signature)
        """``[B, 3, T, H, W]`` -> ``[B, 2 * z_dim, T', H/8, W/8]``."""
        if feat_cache is not None or x.shape[2] != 1:
            return super().forward(x, feat_cache, feat_idx, final)
        return _run_stages(self.conv1, [*self.downsamples, *self.middle], self.head, x)


class PictureDecoder(Decoder3d):
    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006 (ComfyUI's signature)
        """``[B, z_dim, T, h, w]`` -> a list of chunks ``[B, 3, T', 8h, 8w]``."""
        if feat_cache is not None or x.shape[2] != 1:
            return super().forward(x, feat_cache, feat_idx)
        return [_run_stages(self.conv1, [*self.middle, *self.upsamples], self.head, x)]


class PictureVAE(WanVAE):
    """Writes into ComfyUI's own output tensor; by default ComfyUI converts on the CPU and copies there once more."""

    comfy_has_chunked_io = True

    def encode(self, x, device=None):
        return super().encode(x if device is None else x.to(device))

    def decode(self, z, output_buffer=None):
        out = super().decode(z)
        return out if output_buffer is None else output_buffer.copy_(out.to(output_buffer.dtype))

    def decode_output_shape(self, shape):
        batch, _, frames, height, width = shape
        return batch, self.decoder.head[-1].out_channels, 4 * frames - 3, 8 * height, 8 * width


def run_pictures_in_2d(vae: comfy.sd.VAE) -> None:
    """Single pictures of this VAE take the 2D form from now on. It must hold a ``comfy.ldm.wan.vae.WanVAE``."""
    vae.first_stage_model.__class__ = PictureVAE
    vae.first_stage_model.encoder.__class__ = PictureEncoder
    vae.first_stage_model.decoder.__class__ = PictureDecoder


def _run_stages(first: CausalConv3d, blocks: list[Any], head: Any, x: torch.Tensor) -> torch.Tensor:
    x = _convolve(first, x[:, :, 0].contiguous(memory_format=torch.channels_last))
    for block in blocks:
        if isinstance(block, ResidualBlock):
            x = _residual(block, x)
        elif isinstance(block, AttentionBlock):
            x = _attention(block, x)
        elif isinstance(block, Resample):
            x = block.resample(x)  # without its time_conv, which a first frame skips
        else:
            raise TypeError(f"ComfyUI's Wan VAE has a block that is not known here: {type(block).__name__}.")
    norm, _, last = head
    # Back to ComfyUI's layout here: a later copy on the CPU would be slower.
    return _convolve(last, silu(rms_norm(x, norm.gamma), inplace=True)).contiguous().unsqueeze(2)


def _residual(block: ResidualBlock, x: torch.Tensor) -> torch.Tensor:
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    h = _convolve(conv1, silu(rms_norm(x, norm1.gamma), inplace=True))
    h = _convolve(conv2, silu(rms_norm(h, norm2.gamma), inplace=True))
    return h.add_(x if isinstance(block.shortcut, nn.Identity) else _convolve(block.shortcut, x))


def _attention(block: AttentionBlock, x: torch.Tensor) -> torch.Tensor:
    q, k, v = block.to_qkv(rms_norm(x, block.norm.gamma)).chunk(3, dim=1)
    return block.proj(block.optimized_attention(q, k, v)).add_(x)


def _convolve(layer: CausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """The layer on one frame, with its weights from wherever ComfyUI's memory manager has them."""
    comfy.ops.run_every_op()
    weight, bias, offload_stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    out = convolve_frame(x, weight, bias, layer.padding[1:])
    comfy.ops.uncast_bias_weight(layer, weight, bias, offload_stream)
    return out
