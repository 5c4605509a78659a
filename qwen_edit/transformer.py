"""The forward of Qwen-Image-Edit's transformer over weights with diffusers' names.

``denoise`` is the whole model on one page. Tokens lie in this order: text in its own stream; output, then
references, in the image stream; in attention text first. What depends only on the timestep (modulation) and only on
the geometry (rotary tables) is computed outside the block loop. With ``zero_cond_t`` (2511) reference tokens are
modulated as at t = 0, output tokens at t.

Each residual update is left pending until the next normalization reads the stream anyway, and the normalization
writes its result in the form that the next linears multiply with (see ``kernels`` and ``linear``).

The reference for every line is diffusers ``models/transformers/transformer_qwenimage.py``; the tests compare
with it and with ComfyUI's own transformer. The same function runs over ComfyUI's own modules, which have the same
names.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

from .attention import Attend, KernelChoice, resolve
from .extra_channels import ExtraChannels
from .kernels import REFERENCE, FusedKernels, Modulation, Rows, Update, resolve_kernels
from .known_operands import Known, KnownOperands
from .linear import (
    NO_ADAPTERS,
    RESIDENT,
    Adapters,
    LowRank,
    Operand,
    WeightReader,
    low_rank,
    multiply,
    multiply_gelu,
    operand,
    packed,
    runs_itself,
    unpacked_operand,
)
from .modulation import ModulationCache, ModulationTable, compute_table, makes_tables
from .reference_cache import ReferenceCache
from .rope import Grid, Positions, rope_table
from .streaming import BlockStream

__all__ = ["Forward", "LowRank", "QwenEditTransformer", "denoise"]

IMAGE, TEXT = 0, 1


@dataclass(frozen=True)
class Forward:
    """How a forward runs: what it is told besides its inputs.

    Attributes:
        attend: the attention implementation, see ``attention.py``.
        kernels: the fused operations, see ``kernels``.
        weights: where weights are read from.
        adapters: active LoRAs.
        channels: owner of what lets adapters go through the products (spare columns of the weights, addends in int8);
            None: they are added to the results.
        spare_columns: whether the weights may have them: not in the buffers of streamed blocks.
        positions: whose token positions, see ``rope.py``.
        before_block: called with each block's index before it runs (weight streaming, cancel).
        mlp_rows: how many tokens go through an MLP at once, for less memory; None: all.
        known: finds the operands of earlier forwards again; None: they are made anew.
    """

    attend: Attend
    kernels: FusedKernels = REFERENCE
    weights: WeightReader = RESIDENT
    adapters: Adapters = field(default_factory=dict)
    channels: ExtraChannels | None = None
    spare_columns: bool = True
    positions: Positions = "diffusers"
    before_block: Callable[[int], None] | None = None
    mlp_rows: int | None = None
    known: Known | None = None

    def operands(self, *modules) -> list[Operand]:
        """The linears over one input: one operand where their weights lie side by side."""
        found = None if self.known is None else self.known.operands(modules)
        unpacked = None if found is not None else unpacked_operand(modules)
        if found is None and unpacked is not None:
            found = [unpacked]
        if found is None:
            each = [operand(self.weights, m) for m in modules]
            joined = packed(each) if len(each) > 1 else None
            found = each if joined is None else [joined]
            if self.known is not None:
                self.known.learn(modules, found)
        if self.channels is None or len(found) > 1:
            return found
        return [self.channels.extended(found[0], self.adapters, self.spare_columns and unpacked is None)]

    def prologue(self, operands: Sequence[Operand]) -> dict[str, Any]:
        """What the operation before these linears has to produce for them."""
        if len(operands) == 1 and not self.adapters:  # as in nearly every forward
            return {"quantize": operands[0].prologue, "keep": False, "room": 0}
        wanted = {o.prologue for o in operands}
        quantize = next((p for p in wanted if p is not None), None)
        added = any(m in self.adapters for o in operands if o.channels is None for m in o.modules)
        keep = quantize is not None and (len(wanted) > 1 or added)
        return {"quantize": quantize, "keep": keep, "room": max(o.room for o in operands)}

    def multiply(self, op: Operand, rows: Rows, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        return multiply(op, rows, dtype, self.adapters, self.kernels, out)

    def plain(self, module, x: torch.Tensor) -> torch.Tensor:
        """A linear outside the blocks, ``[..., in]`` -> ``[..., out]``."""
        y = module(x)
        return low_rank(y.flatten(0, -2), x.flatten(0, -2), self.adapters.get(module, ())).view(y.shape)


@dataclass
class Stream:
    """One stream's residual ``[B, L, C]`` and the update that is still to be added to it."""

    x: torch.Tensor
    update: Update | None = None

    def normalized(self, forward: Forward, norm, modulation: Modulation, **prologue):
        rows = forward.kernels.norm_modulate(self.x, modulation, self.update, eps=norm.eps, **prologue)
        self.update = None
        return rows

    def add(self, rows: torch.Tensor, modulation: Modulation) -> None:
        """Leave ``gate * rows`` pending; rows ``[B * L, C]``."""
        self.update = Update(rows.view(self.x.shape), modulation)


def _project(forward: Forward, stream: Stream, norm, modulation, linears, norms, rope, out) -> None:
    """A stream's queries, keys and values into its part ``[B, L, 3, H, D]`` of the joint buffer."""
    operands = forward.operands(*linears)
    rows = stream.normalized(forward, norm, modulation, **forward.prologue(operands))
    batch, tokens, _, heads, dim = out.shape
    dtype = out.dtype
    if len(operands) == 1:
        # one item's part of the buffer is contiguous, so the product writes there and the rest happens in place
        target = out.view(tokens, -1) if batch == 1 else None
        qkv = forward.multiply(operands[0], rows, dtype, target).view(batch, tokens, 3, heads, dim)
        q, k, v = qkv.unbind(2)
    else:
        each = (forward.multiply(o, rows, dtype) for o in operands)
        q, k, v = (y.view(batch, tokens, heads, dim) for y in each)
    weight_q, weight_k = ((forward.weights.read(m) or (m.weight, None))[0] for m in norms)
    forward.kernels.qk_norm_rope(q, k, v, weight_q, weight_k, rope, out, eps=norms[0].eps)


def _multiply_one(forward: Forward, module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A linear whose input no kernel of ours has written."""
    operands = forward.operands(module)
    prologue = forward.prologue(operands)
    rows = forward.kernels.quantize_rows(x, prologue["quantize"], keep=prologue["keep"], room=prologue["room"])
    return forward.multiply(operands[0], rows, dtype)


def _mlp(forward: Forward, stream: Stream, norm, mlp, modulation: Modulation) -> None:
    (up,), (down,) = forward.operands(mlp.net[0].proj), forward.operands(mlp.net[2])
    rows = stream.normalized(forward, norm, modulation, **forward.prologue([up]))
    dtype = stream.x.dtype
    out = torch.empty((rows.data.shape[0], down.widths[0]), dtype=dtype, device=rows.data.device)
    for part, target in zip(rows.split(forward.mlp_rows), out.split(forward.mlp_rows or len(out)), strict=True):
        hidden = multiply_gelu(up, part, dtype, forward.adapters, forward.kernels, **forward.prologue([down]))
        forward.multiply(down, hidden, dtype, target)
    stream.add(out, modulation)


def block_forward(
    forward: Forward,
    block,
    image: Stream,
    text: Stream,
    modulations: Callable[[int], tuple[Modulation, Modulation]],
    rope: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    output_tokens: int | None = None,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """One double-stream block; both streams are changed.

    Args:
        modulations: of a stream (``IMAGE`` or ``TEXT``), around attention and around the MLP.
        rope: the rotary tables ``[2, L, D / 2]`` of both streams.
        output_tokens: in the last block: only these leave it, so nothing else is computed after the keys and values.
        kept: keys and values ``[B, Lr, 2, heads, D]`` of tokens that are attended to but are not in the streams.

    Returns:
        The keys and values of all tokens ``[B, L, 2, heads, D]``: text, image, kept.
    """
    attn = block.attn
    (image_first, image_second), (text_first, text_second) = modulations(IMAGE), modulations(TEXT)
    batch, text_tokens, channels = text.x.shape
    tokens = text_tokens + image.x.shape[1]
    heads = attn.heads
    joint = image.x.new_empty((batch, tokens + (0 if kept is None else kept.shape[1]), 3, heads, channels // heads))

    text_linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_norms = (attn.norm_added_q, attn.norm_added_k)
    image_linears, image_norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    into_text, into_image = joint[:, :text_tokens], joint[:, text_tokens:tokens]
    _project(forward, text, block.txt_norm1, text_first, text_linears, text_norms, rope[TEXT], into_text)
    _project(forward, image, block.img_norm1, image_first, image_linears, image_norms, rope[IMAGE], into_image)
    if kept is not None:
        joint[:, tokens:, 1:] = kept
    q, k, v = joint.unbind(2)
    if output_tokens is not None:
        image.x = image.x[:, :output_tokens]
        image_out = forward.attend(q[:, text_tokens : text_tokens + output_tokens], k, v, mask).flatten(2)
    else:
        out = forward.attend(q[:, :tokens], k, v, mask).flatten(2)
        text_out, image_out = out[:, :text_tokens], out[:, text_tokens:]
        text.add(_multiply_one(forward, attn.to_add_out, text_out.flatten(0, 1), text.x.dtype), text_first)
        _mlp(forward, text, block.txt_norm2, block.txt_mlp, text_second)
    image.add(_multiply_one(forward, attn.to_out[0], image_out.flatten(0, 1), image.x.dtype), image_first)
    _mlp(forward, image, block.img_norm2, block.img_mlp, image_second)
    return joint[:, :, 1:]


def denoise(
    model,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    grids: tuple[Grid, ...],
    forward: Forward,
    *,
    axes_dims: tuple[int, int, int],
    zero_cond_t: bool,
    text_mask: torch.Tensor | None = None,
    modulation: ModulationCache | None = None,
    modulation_key: Hashable = None,
    schedule: Sequence[float] = (),
    references: ReferenceCache | None = None,
) -> torch.Tensor:
    """Velocity of the output tokens.

    Args:
        model: diffusers' transformer, or ComfyUI's.
        latents: packed tokens ``[B, L, 64]``, output first, then references.
        timestep: ``[B]`` in [0, 1] (sigma); on the CPU nothing has to wait for the device.
        text: encoder hidden states ``[B, Lt, joint_attention_dim]``.
        grids: token grids of output and references; their areas sum to L.
        axes_dims: head channels that frame, row and column rotate.
        zero_cond_t: modulate references as at t = 0.
        text_mask: ``[B, Lt]``, True where a text token counts; None when all do (faster).
        modulation: tables of earlier calls, and where this call's is kept; ``modulation_key`` names the weights and
            adapters they were made with, ``schedule`` the timesteps worth computing together.
        references: where the reference tokens' keys and values come from if it is complete, and are left otherwise; None:
            they are computed and forgotten.

    Returns:
        ``[B, output tokens, 64]``.
    """
    output_tokens = grids[0][0] * grids[0][1]
    reference_tokens = latents.shape[1] - output_tokens
    references = references if reference_tokens else None
    reused = references is not None and references.complete
    if reused:
        latents = latents[:, :output_tokens]
    elif references is not None:
        references.begin()
    image = Stream(forward.plain(model.img_in, latents))
    encoded = Stream(forward.plain(model.txt_in, model.txt_norm(text)))
    times = timestep.tolist()  # waits for the device if it is there
    table = _modulation_table(model, times, image.x, forward, modulation, modulation_key, schedule)
    rows = table.rows(times, [0.0] * len(times) if zero_cond_t else times)
    text_rope, image_rope = rope_table(grids, text.shape[1], axes_dims, forward.positions, image.x.device)
    image_rope = image_rope[:, :output_tokens].contiguous() if reused else image_rope
    mask = None
    if text_mask is not None:
        image_tokens = output_tokens + reference_tokens
        every_image_token = text_mask.new_ones((text_mask.shape[0], image_tokens), dtype=torch.bool)
        mask = torch.cat([text_mask.bool(), every_image_token], dim=1)[:, None, None, :]

    last = len(model.transformer_blocks) - 1
    for index, block in enumerate(model.transformer_blocks):
        if forward.before_block is not None:
            forward.before_block(index)
        modulations = partial(_halves, table, index, rows, output_tokens, text.shape[1])
        keys_and_values = block_forward(
            forward, block, image, encoded, modulations, (image_rope, text_rope), mask,
            output_tokens if index == last else None,
            references.blocks[index] if references is not None and reused else None,
        )  # fmt: skip
        if references is not None and not reused:
            references.keep(keys_and_values[:, -reference_tokens:], last + 1)
        del keys_and_values
        forward.weights.release()

    final = Modulation(table.final, rows, output_tokens)
    normalized = image.normalized(forward, model.norm_out.norm, final)
    return forward.plain(model.proj_out, normalized.data.view(image.x.shape))


def _halves(table: ModulationTable, block: int, rows, output_tokens: int, text_tokens: int, stream: int):
    return table.halves(block, stream, rows, output_tokens if stream == IMAGE else text_tokens)


def _modulation_table(model, times, like, forward: Forward, cache, key, schedule) -> ModulationTable:
    if cache is None or any(runs_itself(module) for module in makes_tables(model)):  # no key knows what that does
        cache = ModulationCache()
    return cache.table(
        key,
        [*times, 0.0],
        schedule,
        lambda timesteps: compute_table(model, timesteps, like, forward.weights, forward.adapters),
    )


class QwenEditTransformer(QwenImageTransformer2DModel):
    """diffusers' transformer with this module's forward, so that ``QwenImageEditPlusPipeline`` can hold it.

    Weights, names and configuration are diffusers'. ``attention`` and ``kernels`` may be set; by default they are
    resolved from the device on the first call. Setting ``modulation`` to a ``ModulationCache`` keeps the modulation of
    timesteps seen before; the weights must then stay as they are. ``adapters`` are the active LoRAs; with ``channels``
    they cost less, and the weights' memory becomes larger by their size. ``stream`` brings the blocks that are to stay in
    RAM; adapters are then added to the results, except to those of int8 weights. ``references`` is where the next forward
    takes the reference tokens from, or leaves them.
    """

    attention: KernelChoice | None = None
    kernels: FusedKernels | None = None
    modulation: ModulationCache | None = None
    adapters: Adapters = NO_ADAPTERS
    channels: ExtraChannels | None = None
    stream: BlockStream | None = None
    references: ReferenceCache | None = None
    known: KnownOperands | None = None

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
        device, dtype = hidden_states.device, hidden_states.dtype
        if self.attention is None:
            self.attention = resolve("auto", device, dtype, self.config.attention_head_dim)
        if self.kernels is None:
            self.kernels = resolve_kernels(device, dtype)
        if self.known is None:
            self.known = KnownOperands()
        stream = self.stream or BlockStream(self.transformer_blocks)
        forward = Forward(
            self.attention.attend,
            self.kernels,
            adapters=self.adapters,
            channels=self.channels,
            spare_columns=not stream.streamed,
            before_block=stream.before_block,
            known=self.known,
        )
        with stream:
            sample = denoise(
                self,
                hidden_states,
                timestep.to(dtype),  # as diffusers rounds it
                encoder_hidden_states,
                tuple((rows, columns) for _, rows, columns in img_shapes[0]),
                forward,
                axes_dims=tuple(self.config.axes_dims_rope),
                zero_cond_t=self.config.zero_cond_t,
                text_mask=encoder_hidden_states_mask,
                modulation=self.modulation,
                references=self.references,
            )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
