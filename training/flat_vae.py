"""AutoencoderKLQwenImage for single pictures, with 2D convolutions.

A causal 3×3×3 kernel pads time with zeros in front, so for one frame only its last temporal slice counts, and
the temporal convolutions of the up- and downsamplers are skipped for the first frame. Training this module
costs a third; `to_diffusers` writes its weights into the last slices and zeros elsewhere. Names match
diffusers' state dict.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import nn


def norm_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """RMS norm over the channels of `[B, C, H, W]`, then SiLU."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    scaled = x * (x.shape[1] ** 0.5 / length).to(x.dtype)
    return F.silu(scaled * gamma.view(1, -1, 1, 1).to(x.dtype))


class Norm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = Norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = Norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        same = channels_in == channels_out
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(norm_silu(x, self.norm1.gamma))
        return self.conv_shortcut(x) + self.conv2(norm_silu(h, self.norm2.gamma))


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        normed = F.normalize(x.float(), dim=1).to(x.dtype) * c**0.5 * self.norm.gamma.view(1, -1, 1, 1)
        q, k, v = self.to_qkv(normed).reshape(b, 1, 3 * c, h * w).transpose(2, 3).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.squeeze(1).transpose(1, 2).reshape(b, c, h, w))


class MidBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resample(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        up = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
        self.resample = nn.Sequential(up, nn.Conv2d(channels, channels // 2, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resample(x)


class UpBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, blocks: int, last: bool):
        super().__init__()
        channels = [channels_in] + [channels_out] * blocks
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in itertools.pairwise(channels)])
        self.upsamplers = None if last else nn.ModuleList([Upsample(channels_out)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(nn.Module):
    def __init__(self, base: int, channels_out: int, multipliers: list[int], blocks: int):
        super().__init__()
        dims = [base * m for m in [1, *multipliers]]
        self.conv_in = nn.Conv2d(3, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (a, b) in enumerate(itertools.pairwise(dims)):
            self.down_blocks += [ResidualBlock(a if i == 0 else b, b) for i in range(blocks)]
            if level < len(multipliers) - 1:
                self.down_blocks.append(Downsample(b))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = Norm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], channels_out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        # float32 also under autocast: the last layers spread what is nearly equal in the features before them
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_out(norm_silu(x.float(), self.norm_out.gamma))


class Decoder(nn.Module):
    def __init__(self, base: int, channels_in: int, multipliers: list[int], blocks: int):
        super().__init__()
        dims = [base * m for m in [multipliers[-1], *multipliers[::-1]]]
        self.conv_in = nn.Conv2d(channels_in, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for level, (a, b) in enumerate(itertools.pairwise(dims)):
            last = level == len(multipliers) - 1
            self.up_blocks.append(UpBlock(a if level == 0 else a // 2, b, blocks + 1, last))
        self.norm_out = Norm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_silu(x, self.norm_out.gamma))


class FlatVAE(nn.Module):
    """Pictures `[B, 3, H, W]` in [-1, 1] to latents `[B, 16, H/8, W/8]` and back."""

    def __init__(self, config: dict):
        super().__init__()
        self.z_dim = config["z_dim"]
        shape = config["base_dim"], list(config["dim_mult"]), config["num_res_blocks"]
        self.encoder = Encoder(shape[0], 2 * self.z_dim, shape[1], shape[2])
        self.decoder = Decoder(shape[0], self.z_dim, shape[1], shape[2])
        self.quant_conv = nn.Conv2d(2 * self.z_dim, 2 * self.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.z_dim, self.z_dim, 1)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """The mean of the posterior, which is all that inference uses."""
        moments = self.encoder(pictures)
        with torch.autocast(moments.device.type, enabled=False):
            return self.quant_conv(moments)[:, : self.z_dim]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Not clamped; diffusers clamps to [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def from_diffusers(vae: AutoencoderKLQwenImage) -> FlatVAE:
    flat = FlatVAE(dict(vae.config))
    shapes = {name: value.shape for name, value in flat.state_dict().items()}
    state = {}
    for name, value in vae.state_dict().items():
        if name not in shapes:
            continue  # temporal convolutions, unused for one frame
        if value.ndim == 5:
            value = value[:, :, -1]
        state[name] = value.reshape(shapes[name])
    flat.load_state_dict(state)
    return flat


def to_diffusers(flat: FlatVAE, vae: AutoencoderKLQwenImage, log_variance: float = -6.0) -> None:
    """Write `flat`'s weights into `vae`. The posterior's variance was not trained: it becomes a small
    constant.
    """
    z = flat.z_dim
    source = {name: value.detach().float().cpu() for name, value in flat.state_dict().items()}
    source["quant_conv.weight"][z:] = 0
    source["quant_conv.bias"][z:] = log_variance
    state = vae.state_dict()
    for name, value in state.items():
        if name not in source:
            state[name] = torch.zeros_like(value)
        elif value.ndim == 5:
            state[name] = torch.zeros_like(value)
            state[name][:, :, -1] = source[name]
        else:
            state[name] = source[name].reshape(value.shape).to(value.dtype)
    vae.load_state_dict(state)
