"""The forward of Qwen-Image-Edit's transformer over weights with diffusers' names.

``denoise`` is the whole model on one page. Tokens lie in this order: text in its own stream; output, then
references, in the image stream. What depends only on the timestep (modulation) and only on the geometry
(rotary tables) is computed outside the block loop. With ``zero_cond_t`` (2511) reference tokens are modulated
as at t = 0, output tokens at t: two slices, because references always follow.

The reference for every line is diffusers ``models/transformers/transformer_qwenimage.py``; the tests compare
with it and with ComfyUI's own transformer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import nn

from .attention import Attend, KernelChoice, resolve
from .rope import Grid, Positions, rope_table, rotate


@dataclass(frozen=True)
class LowRank:
    """An adapter on one linear: adds ``scale * (x A^T) B^T``. ``a`` is ``[r, in]``, ``b`` ``[out, r]``."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


# Active adapters by the linear that they add to.
Adapters = Mapping[nn.Module, Sequence[LowRank]]
NO_ADAPTERS: Adapters = {}


def linear(module: nn.Module, x: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    y = module(x)
    for adapter in adapters.get(module, ()):
        y = y + F.linear(F.linear(x, adapter.a), adapter.b) * adapter.scale
    return y


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one half of a block, each ``[B, 1, C]``."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class TokenModulation:
    """Applies one ``Modulation`` to the first ``split`` tokens and another to the rest."""

    def __init__(self, head: Modulation, tail: Modulation | None, split: int):
        self.head, self.tail, self.split = head, tail, split

    def modulate(self, x: torch.Tensor) -> torch.Tensor:
        """``x * (1 + scale) + shift``, into a new tensor."""
        y = torch.empty_like(x)
        for part, out, mod in self._parts(x, y):
            torch.addcmul(mod.shift, part, 1 + mod.scale, out=out)
        return y

    def add_gated(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """``x += gate * y`` in place: x is the residual stream and nothing else holds it."""
        for part, update, mod in self._parts(x, y):
            part.addcmul_(mod.gate, update)

    def _parts(self, x: torch.Tensor, y: torch.Tensor):
        if self.tail is None:
            return [(x, y, self.head)]
        split = self.split
        return [(x[:, :split], y[:, :split], self.head), (x[:, split:], y[:, split:], self.tail)]


def _modulations(module, temb: torch.Tensor, batch: int, split: int, adapters: Adapters):
    """The two halves (attention, MLP) of a block's modulation. temb ``[B or 2B, C]``: t, then t = 0."""
    activation, projection = module[0], module[1]
    halves = linear(projection, activation(temb), adapters).chunk(2, dim=-1)
    result = []
    for half in halves:
        parts = [p.unsqueeze(1) for p in half.chunk(3, dim=-1)]
        head = Modulation(*(p[:batch] for p in parts))
        tail = Modulation(*(p[batch:] for p in parts)) if temb.shape[0] > batch else None
        result.append(TokenModulation(head, tail, split))
    return result


def _mlp(module, x: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    up, down = module.net[0].proj, module.net[2]
    return linear(down, F.gelu(linear(up, x, adapters), approximate="tanh"), adapters)


def _norm(module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)


def _joint_attention(attn, image, text, rope, mask, attend: Attend, adapters: Adapters):
    """Both streams attend to each other: text first, then image. Returns (image, text), each ``[B, L, C]``."""
    heads = attn.heads

    def project(x, to_q, to_k, to_v, norm_q, norm_k):
        q, k, v = (linear(m, x, adapters).unflatten(-1, (heads, -1)) for m in (to_q, to_k, to_v))
        return _norm(norm_q, q), _norm(norm_k, k), v

    text_qkv = project(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
    image_qkv = project(image, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(text_qkv, image_qkv, strict=True))
    out = attend(rotate(q, rope), rotate(k, rope), v, mask).flatten(2, 3)
    text_out, image_out = out[:, : text.shape[1]], out[:, text.shape[1] :]
    return linear(attn.to_out[0], image_out, adapters), linear(attn.to_add_out, text_out, adapters)


def block_forward(block, image, text, temb, split, rope, mask, attend: Attend, adapters: Adapters):
    """One double-stream block. image ``[B, Li, C]``, text ``[B, Lt, C]``, both updated in place; returns both."""
    batch = image.shape[0]
    image_mod1, image_mod2 = _modulations(block.img_mod, temb, batch, split, adapters)
    text_mod1, text_mod2 = _modulations(block.txt_mod, temb[:batch], batch, 0, adapters)

    image_out, text_out = _joint_attention(
        block.attn,
        image_mod1.modulate(block.img_norm1(image)),
        text_mod1.modulate(block.txt_norm1(text)),
        rope, mask, attend, adapters,
    )  # fmt: skip
    image_mod1.add_gated(image, image_out)
    text_mod1.add_gated(text, text_out)

    image_mod2.add_gated(image, _mlp(block.img_mlp, image_mod2.modulate(block.img_norm2(image)), adapters))
    text_mod2.add_gated(text, _mlp(block.txt_mlp, text_mod2.modulate(block.txt_norm2(text)), adapters))
    if image.dtype == torch.float16:  # as diffusers does: this family overflows in fp16
        image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
    return image, text


def denoise(
    model: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    grids: tuple[Grid, ...],
    *,
    attend: Attend,
    positions: Positions = "diffusers",
    text_mask: torch.Tensor | None = None,
    zero_cond_t: bool | None = None,
    adapters: Adapters = NO_ADAPTERS,
    before_block: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Velocity of the output tokens.

    Args:
        latents: packed tokens ``[B, L, 64]``, output first, then references.
        timestep: ``[B]`` in [0, 1] (sigma).
        text: encoder hidden states ``[B, Lt, joint_attention_dim]``.
        grids: token grids of output and references; their areas sum to L.
        attend: the attention implementation, see ``attention.py``.
        text_mask: ``[B, Lt]``, True where a text token counts; None when all do (faster).
        zero_cond_t: modulate references as at t = 0; None: as the model was trained.
        adapters: active LoRAs.
        before_block: called with each block's index before it runs (weight streaming, cancel).

    Returns:
        ``[B, output tokens, 64]``.
    """
    config = model.config
    output_tokens = grids[0][0] * grids[0][1]
    zero_cond_t = config.zero_cond_t if zero_cond_t is None else zero_cond_t

    image = linear(model.img_in, latents, adapters)
    timestep = timestep.to(image.dtype)
    if zero_cond_t:
        timestep = torch.cat([timestep, timestep * 0])
    temb = model.time_text_embed(timestep, image)
    text = linear(model.txt_in, model.txt_norm(text), adapters)
    rope = rope_table(grids, text.shape[1], tuple(config.axes_dims_rope), positions, image.device)
    mask = None
    if text_mask is not None:
        every_image_token = text_mask.new_ones((text_mask.shape[0], image.shape[1]), dtype=torch.bool)
        mask = torch.cat([text_mask.bool(), every_image_token], dim=1)[:, None, None, :]

    for index, block in enumerate(model.transformer_blocks):
        if before_block is not None:
            before_block(index)
        image, text = block_forward(block, image, text, temb, output_tokens, rope, mask, attend, adapters)

    # References are context only: the head runs on the output tokens alone.
    image = model.norm_out(image[:, :output_tokens], temb[: image.shape[0]])
    return linear(model.proj_out, image, adapters)


class QwenEditTransformer(QwenImageTransformer2DModel):
    """diffusers' transformer with this module's forward, so that ``QwenImageEditPlusPipeline`` can hold it.

    Weights, names and configuration are diffusers'. ``attention`` may be set to a ``KernelChoice``; by default
    it is resolved from the device on the first call.
    """

    attention: KernelChoice | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_shapes: list | None = None,
        guidance: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ):
        """diffusers' signature. hidden_states ``[B, L, 64]`` (output then references), img_shapes
        ``[[(1, rows, columns), …]] * B``. Returns all output tokens; reference tokens are not returned, and the
        pipeline drops them anyway.

        Raises:
            ValueError: guidance or attention_kwargs are given; this model has no use for them.
        """
        if guidance is not None or attention_kwargs:
            raise ValueError(
                "This forward takes neither guidance nor attention_kwargs: Qwen-Image-Edit has no use for them."
            )
        if encoder_hidden_states is None or timestep is None or img_shapes is None:
            raise ValueError("encoder_hidden_states, timestep and img_shapes are all needed.")
        if self.attention is None:
            self.attention = resolve("auto", hidden_states.device, hidden_states.dtype, self.config.attention_head_dim)
        sample = denoise(
            self,
            hidden_states,
            timestep,
            encoder_hidden_states,
            tuple((rows, columns) for _, rows, columns in img_shapes[0]),
            attend=self.attention.attend,
            text_mask=encoder_hidden_states_mask,
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
