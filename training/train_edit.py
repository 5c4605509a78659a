"""Stage 2: transformer and text encoder together, on pictures, instructions and exact answers made on the
fly.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel

from training.data import Pool, recolour
from training.flat_vae import FlatVAE
from training.instructions import (
    EXACT,
    HOLE_GREY,
    OPEN,
    SHAPE_COLOURS,
    grey,
    hole_mask,
    shape_mask,
    spellings,
)
from training.text_side import TextSide
from training.tokenizer import TEMPLATE_TOKENS
from training.train_text import InstructionHead
from training.train_vae import Average, Replay, learning_rate, make_optimizer, set_rate

PEAK_LEARNING_RATE = 1.2e-3
PROMPT_DROPOUT = 0.1
INSTRUCTION_LOSS = 0.05  # weight of the head of `train_text` beside the flow loss
PIXELS_PER_BATCH = 48 * 256 * 256
MAX_BATCH = 96
SMALL_UNTIL = 0.65  # share of the time on small pictures only, whose steps are cheap
SMALL_SIZES = {(128, 128): 4, (128, 192): 1, (192, 128): 1}
USES = 3  # of every batch of pictures, each with other phrasings, noise and timesteps
# (height, width): how often
SIZES = {
    (128, 128): 2,
    (128, 192): 1,
    (192, 128): 1,
    (192, 192): 2,
    (256, 256): 6,
    (192, 256): 2,
    (256, 192): 2,
    (256, 384): 1,
    (384, 256): 1,
    (320, 320): 1,
    (384, 384): 1,
}
# A few shapes only for what is rarer: every shape of a batch is one recording.
TWO_PICTURE_SIZES = {(128, 128): 1, (192, 192): 1, (256, 256): 3, (192, 256): 1, (256, 192): 1}
OTHER_REFERENCES = {
    (256, 256): (192, 192),
    (192, 192): (288, 288),
    (192, 256): (288, 384),
    (384, 256): (256, 160),
}
# Edits that move content need more practice than edits that recolour.
OFTEN = {"mirror": 2.0, "flip": 2.0, "half_turn": 2.0, "posterize": 1.5, "random_shape": 1.5, "identity": 1.5}
TWO_PICTURES = 0.14  # share of the batches
OTHER_REFERENCE_SIZE = 0.2  # share of the batches of those sizes


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """Without autocast, which would return float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def per_part(count: int, operation, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """`operation` on the noise tokens (the first `count`) with the parameters at t and on the rest with those
    at 0.

    parameters: `[2B, width]`, the upper half for t = 0; a tensor `[B, L, width]` is split like `x`.
    """
    first, rest = [], []
    for p in parameters:
        if p.ndim == 3:
            first.append(p[:, :count])
            rest.append(p[:, count:])
        else:
            at_t, at_zero = p[:, None].chunk(2)
            first.append(at_t)
            rest.append(at_zero)
    return torch.cat([operation(x[:, :count], *first), operation(x[:, count:], *rest)], 1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x, gate, out)


def queries_keys_values(
    layers: tuple, norms: tuple, heads: int, x: torch.Tensor, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed and rotated queries and keys `[B, S, 2, H, D]` and values `[B, S, H, D]`."""
    if all(type(layer) is torch.nn.Linear for layer in layers):
        weight = torch.cat([layer.weight for layer in layers])
        fused = F.linear(x, weight, torch.cat([layer.bias for layer in layers]))
    else:  # with a LoRA
        fused = torch.cat([layer(x) for layer in layers], -1)
    fused = fused.unflatten(-1, (3, heads, -1))
    with torch.autocast(x.device.type, enabled=False):
        both = F.rms_norm(fused[:, :, :2].float(), fused.shape[-1:], eps=norms[0].eps)
        both = both * torch.stack([norm.weight for norm in norms])[:, None]
        both = torch.view_as_complex(both.unflatten(-1, (-1, 2)).contiguous())
        both = torch.view_as_real(both * rotation[:, None, None]).flatten(-2)
    return both.to(fused.dtype), fused[:, :, 2]


@dataclass
class Engine:
    """The transformer's forward for batches of one shape, equal to the class's own (tested), with less
    overhead.

    Noise tokens come first and reference tokens after, so that modulation at t and at 0 are two slices;
    queries, keys and values are one product.
    """

    transformer: QwenImageTransformer2DModel
    device: torch.device
    cache: dict = field(default_factory=dict)

    def _rotations(self, grids: tuple, text_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = grids, text_length
        if key not in self.cache:
            shapes = [[(1, h, w) for h, w in grids]]
            self.cache[key] = self.transformer.pos_embed(shapes, max_txt_seq_len=text_length, device=self.device)
        return self.cache[key]

    def _block(self, block, x, text, mask, temb, rotations, count):
        image_mod = block.img_mod[1](temb).chunk(6, -1)
        text_mod = [m[:, None] for m in block.txt_mod[1](temb[: len(temb) // 2]).chunk(6, -1)]
        attn, length = block.attn, text.shape[1]

        normed = per_part(count, modulate, layer_norm(x), *image_mod[:2])
        qk, v = queries_keys_values(
            (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), attn.heads, normed, rotations[0]
        )
        text_qk, text_v = queries_keys_values(
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
            attn.heads,
            modulate(layer_norm(text), *text_mod[:2]),
            rotations[1],
        )
        q, k = torch.cat([text_qk, qk], 1).permute(2, 0, 3, 1, 4)
        v = torch.cat([text_v, v], 1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = per_part(count, add_gated, x, attn.to_out[0](out[:, length:]), image_mod[2])
        text = add_gated(text, attn.to_add_out(out[:, :length]), text_mod[2])

        out = block.img_mlp(per_part(count, modulate, layer_norm(x), *image_mod[3:5]))
        x = per_part(count, add_gated, x, out, image_mod[5])
        out = block.txt_mlp(modulate(layer_norm(text), *text_mod[3:5]))
        return x, add_gated(text, out, text_mod[5])

    def __call__(self, noisy, references, grids, embeddings, mask, t):
        """Velocity `[B, N, 64]` for packed latents `[B, N, 64]`, references `[B, R, 64]`, t `[B]` in [0, 1].

        grids: (rows, columns) of tokens of the output and of every reference; mask: `[B, L]` of the text or
        None.
        """
        model, count = self.transformer, noisy.shape[1]
        rotations = self._rotations(tuple(grids), embeddings.shape[1])
        x = model.img_in(torch.cat([noisy, references], 1))
        text = model.txt_in(model.txt_norm(embeddings))
        # the timestep stays float32 under autocast
        temb = F.silu(model.time_text_embed(torch.cat([t, t * 0]).float(), noisy))
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), x.shape[1])], 1)[:, None, None]
        for block in model.transformer_blocks:
            x, text = self._block(block, x, text, mask, temb, rotations, count)
        scale, shift = model.norm_out.linear(temb[: len(t)])[:, None].chunk(2, -1)
        return model.proj_out(modulate(layer_norm(x[:, :count]), shift, scale))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]` to `[B, H/2 · W/2, 4C]` as the pipeline packs: channel, then row, then column of the
    patch.
    """
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    b, _, c = tokens.shape
    x = tokens.reshape(b, rows, columns, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, rows * 2, columns * 2)


class Latents:
    """Pictures to normalized packed latents and back, through the frozen VAE."""

    def __init__(self, vae: FlatVAE, statistics: dict, device: torch.device):
        self.vae, self.device = vae, device
        self.mean = torch.tensor(statistics["mean"], device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(statistics["std"], device=device).view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, 3]` in [0, 1] to `[B, N, 64]` float32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            x = (pictures.permute(0, 3, 1, 2) * 2 - 1).contiguous(memory_format=torch.channels_last)
            latents = torch.cat([self.vae.encode(part).float() for part in x.split(64)])
        return pack((latents - self.mean) / self.std)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """`[B, N, 64]` to `[B, H, W, 3]` in [0, 1]."""
        latents = unpack(tokens, rows, columns) * self.std + self.mean
        return ((self.vae.decode(latents).clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)


def open_samples(name: str, pictures: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """OPEN[name].sample for a batch `[B, H, W, 3]` on the device: (sources, right answers)."""
    b, height, width, _ = pictures.shape
    device = pictures.device

    def rand() -> torch.Tensor:
        return torch.rand(b, 1, 1, device=device, generator=generator)

    y = torch.arange(height, device=device)[None, :, None] + 0.5
    x = torch.arange(width, device=device)[None, None, :] + 0.5
    if name == "colourise":
        return grey(pictures), pictures
    if name == "fill_hole":
        h, w = height * (0.2 + 0.2 * rand()), width * (0.2 + 0.2 * rand())
        mask = hole_mask(y, x, rand() * (height - h), rand() * (width - w), h, w)[..., None].float()
        return pictures * (1 - mask) + mask * HOLE_GREY, pictures
    radius = min(height, width) * (1 / 8 + (1 / 5 - 1 / 8) * rand())
    centre = radius + rand() * (height - 2 * radius), radius + rand() * (width - 2 * radius)
    kind = (rand() * 3).long()
    mask = shape_mask(y, x, *centre, radius, kind)[..., None]
    colours = torch.tensor(SHAPE_COLOURS, device=device)
    colour = colours[torch.randint(len(colours), (b,), device=device, generator=generator)][:, None, None]
    return pictures, pictures * (1 - mask) + mask * colour


@dataclass
class Batch:
    names: list[str]
    target: torch.Tensor
    references: torch.Tensor
    grids: list[tuple[int, int]]
    vision: list[torch.Tensor]


class Maker:
    """Draws batches."""

    def __init__(
        self,
        pool: Pool | None,
        latents: Latents | None,
        text: TextSide,
        seed: int,
        styles: dict | None = None,
    ):
        self.pool, self.latents, self.text = pool, latents, text
        if pool:
            self.generator = torch.Generator(pool.pixels.device).manual_seed(seed)
        self.random = random.Random(seed)
        self.small = False
        rng = np.random.default_rng(seed)
        self.tokens = {}
        for instruction in (*EXACT.values(), *OPEN.values()):
            typed = {p for p in instruction.prompts} | {
                spellings(p, rng) for p in instruction.prompts for _ in range(4)
            }
            self.tokens[instruction.name] = [text.tokenize(p) for p in sorted(typed)]
        self.nothing = text.tokenize(" ")
        self.classes = {name: index for index, name in enumerate((*EXACT, *OPEN))}
        self.style_tokens: list[list[int]] = []
        self.single = [n for n, i in EXACT.items() if i.pictures == 1] + list(OPEN)
        self.double = [n for n, i in EXACT.items() if i.pictures == 2]

    def size(self, scale: float = 1.0, two: bool = False) -> tuple[int, int, int]:
        sizes = TWO_PICTURE_SIZES if two else SIZES
        if self.small:
            sizes = {(128, 128): 1} if two else SMALL_SIZES
        height, width = self.random.choices(list(sizes), list(sizes.values()))[0]
        return height, width, max(2, min(MAX_BATCH, int(scale * PIXELS_PER_BATCH / height / width)))

    def batch(self, scale: float = 1.0) -> Batch:
        two = self.random.random() < TWO_PICTURES
        height, width, count = self.size(scale, two)
        pictures = recolour(self.pool.crops(count, height, width, self.generator), self.generator)
        pool = self.double if two else self.single
        names = self.random.choices(pool, [OFTEN.get(n, 1.0) for n in pool], k=count)
        names.sort()
        sources, targets = [pictures], []
        if two:
            sources.append(recolour(self.pool.crops(count, height, width, self.generator), self.generator))
        begin = 0
        changed = []
        while begin < count:
            end = begin + names.count(names[begin])
            name, part = names[begin], slice(begin, end)
            if name in OPEN:
                source, target = open_samples(name, pictures[part], self.generator)
            else:
                source, target = pictures[part], EXACT[name].apply(*[s[part] for s in sources])
            changed.append(source)
            targets.append(target)
            begin = end
        sources[0] = torch.cat(changed)
        return self._finish(names, torch.cat(targets), sources)

    def _finish(self, names: list[str], targets: torch.Tensor, sources: list[torch.Tensor]) -> Batch:
        height, width = targets.shape[1:3]
        vision = [self.text.vision_pictures(s).bfloat16() for s in sources]
        size = OTHER_REFERENCES.get((height, width))
        if size and len(sources) == 1 and self.random.random() < OTHER_REFERENCE_SIZE:
            sources = [
                F.interpolate(s.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
                .clamp(0, 1)
                .permute(0, 2, 3, 1)
                for s in sources
            ]
        encoded = [self.latents.encode(s) for s in sources]
        grids = [(height // 16, width // 16)] + [(s.shape[1] // 16, s.shape[2] // 16) for s in sources]
        return Batch(names, self.latents.encode(targets), torch.cat(encoded, 1), grids, vision)

    def prompts_of(self, names: list[str]) -> tuple[list[list[int]], torch.Tensor]:
        """A phrasing for every sample, or the negative prompt, and the classes `[B]` that these say."""
        prompts, classes = [], []
        for name in names:
            dropped = self.random.random() < PROMPT_DROPOUT
            prompts.append(self.nothing if dropped else self.random.choice(self.tokens[name]))
            classes.append(len(self.classes) if dropped else self.classes[name])
        return prompts, torch.tensor(classes).to(self.pool.pixels.device if self.pool else "cpu")


def timesteps(count: int, device: torch.device) -> torch.Tensor:
    """Logit-normal, a little towards noise because the schedule is; one in eight uniform. `[B]` in (0, 1)."""
    t = torch.sigmoid(0.4 + 1.2 * torch.randn(count, device=device))
    uniform = torch.rand(count, device=device)
    pick = torch.rand(count, device=device) < 0.125
    return torch.where(pick, uniform, t)


def flow_loss(engine: Engine, target, references, grids, embeddings, mask, weights: torch.Tensor) -> torch.Tensor:
    """Squared error of the velocity (noise − latents), channels weighted by what they mean in pixels."""
    t = timesteps(len(target), target.device)
    noise = torch.randn_like(target)
    noisy = target + t[:, None, None] * (noise - target)
    velocity = engine(noisy, references, grids, embeddings, mask, t)
    return ((velocity.float() - (noise - target)).square() * weights).mean()


def channel_weights(statistics: dict, device: torch.device) -> torch.Tensor:
    weights = torch.tensor(statistics["sensitivity"], device=device).clamp(0.25, 4)
    return (weights / weights.mean()).repeat_interleave(4)


def initialise(transformer: QwenImageTransformer2DModel) -> None:
    """Blocks begin as identities (adaLN-Zero, Peebles & Xie 2023)."""
    for block in transformer.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            torch.nn.init.zeros_(modulation.weight)
            torch.nn.init.zeros_(modulation.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)


def train_edit(
    engine: Engine,
    text: TextSide,
    maker: Maker,
    head: InstructionHead,
    statistics: dict,
    seconds: float,
    seed: int,
    scale: float = 1.0,
) -> dict:
    """Train transformer and text encoder for `seconds`, on small pictures first."""
    device = engine.device
    torch.manual_seed(seed)
    text.encoder.lm_head.requires_grad_(False)  # tied to the embedding, which the encoder trains
    text.language.embed_tokens.weight.requires_grad_(True)
    parameters = [p for m in (engine.transformer, text.encoder.model, head) for p in m.parameters()]
    optimizer = make_optimizer(parameters, device, 1e-2)
    average = Average(engine.transformer, text.encoder.model)
    weights = channel_weights(statistics, device)
    longest = max(len(ids) for group in maker.tokens.values() for ids in group)
    grids: list = []

    def step_on(target, references, ids, mask, classes, *vision) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            embeddings = text.embed(ids, list(vision))
            mask = mask[:, TEMPLATE_TOKENS:]
            flow = flow_loss(engine, target, references, grids, embeddings, mask, weights)
            loss = flow + INSTRUCTION_LOSS * head.loss(embeddings, mask, classes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return flow.detach()

    replay = Replay(step_on, device)
    log, step, running, batch = [], 0, None, None
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        set_rate(optimizer, learning_rate(elapsed / seconds, PEAK_LEARNING_RATE))
        if step % USES == 0:
            maker.small = elapsed < SMALL_UNTIL * seconds
            batch = maker.batch(scale)
            grids[:] = batch.grids
        prompts, classes = maker.prompts_of(batch.names)
        ids, mask = text.ids(prompts, batch.vision, longest)
        loss = replay(tuple(grids), batch.target, batch.references, ids, mask, classes, *batch.vision)
        average.update()
        running = loss.clone() if running is None else running.lerp(loss, 0.02)
        step += 1
        if step % 25 == 0:
            float(running)  # keeps the device's queue short, so that the clock is true
        if step in (1, 2, 10, 30) or step % 100 == 0:
            log.append({"step": step, "seconds": round(elapsed, 1), "loss": round(float(running), 5)})
            if step < 100 or step % 500 == 0:
                print("edit", log[-1], len(replay.recorded), "recordings", flush=True)
    average.swap()
    return {"steps": step, "seconds": round(time.perf_counter() - begin, 1), "log": log}


@torch.no_grad()
def sample(
    engine: Engine,
    text: TextSide,
    latents: Latents,
    prompts: list[str],
    pictures: list[torch.Tensor],
    steps: int,
    true_cfg_scale: float,
    seed: int = 0,
) -> torch.Tensor:
    """The pipeline's Euler loop for a batch: `[B, H, W, 3]` in [0, 1] from pictures of that shape."""
    from training.models import build_scheduler

    height, width = pictures[0].shape[1:3]
    rows, columns = height // 16, width // 16
    scheduler = build_scheduler()
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = rows * columns * slope + config.base_shift - slope * config.base_image_seq_len
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas = scheduler.sigmas.tolist()

    references = torch.cat([latents.encode(p) for p in pictures], 1)
    vision = [text.vision_pictures(p) for p in pictures]
    grids = [(rows, columns)] * (1 + len(pictures))
    with torch.autocast(engine.device.type, torch.bfloat16):
        conditioned = text.encode([text.tokenize(p) for p in prompts], vision)
        unconditioned = text.encode([text.tokenize(" ")] * len(prompts), vision)
    generator = torch.Generator(engine.device).manual_seed(seed)
    shape = len(prompts), rows * columns, references.shape[2]
    x = torch.randn(shape, device=engine.device, generator=generator)
    for sigma, following in itertools.pairwise(sigmas):
        t = torch.full((len(prompts),), sigma, device=engine.device)
        with torch.autocast(engine.device.type, torch.bfloat16):
            velocity = engine(x, references, grids, *conditioned, t).float()
            if true_cfg_scale > 1:
                without = engine(x, references, grids, *unconditioned, t).float()
                combined = without + true_cfg_scale * (velocity - without)
                ratio = velocity.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
                velocity = combined * ratio
        x = x + (following - sigma) * velocity
    return latents.decode(x, rows, columns)
