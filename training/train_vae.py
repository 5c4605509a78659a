"""Stage 1: the VAE, on crops of the pool, as 2D convolutions (see `flat_vae`)."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F

from training.data import HELD_OUT, Pool, held_out_photograph, recolour
from training.flat_vae import FlatVAE
from training.instructions import EXACT, psnr

# The latents have unit deviation. Makes decoding forgiving of the transformer's errors, as a KL term would.
LATENT_NOISE = 0.03
WHITENESS = 0.05
PEAK_LEARNING_RATE = 1.5e-3
# Edits whose results look unlike photographs, so that the VAE knows them too.
EDITED = ("posterize", "red_frame", "blue_disc", "left_half_grey", "grey", "invert", "sepia", "contrast")


def learning_rate(progress: float, peak: float, warm_up: float = 0.02) -> float:
    """Linear warm-up, then cosine to a fiftieth; `progress` is the used share of the stage's time."""
    if progress < warm_up:
        return peak * (progress + 1e-3) / (warm_up + 1e-3)
    phase = min(1.0, (progress - warm_up) / (1 - warm_up))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * phase)))


class Average:
    """Exponential moving average of a module's parameters, with a short memory at first."""

    def __init__(self, *modules: torch.nn.Module, decay: float = 0.999):
        self.live = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the live parameters."""
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)


def picture_batch(pool: Pool, count: int, size: int, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Crops `[count, 3, size, size]` in [-1, 1]; an eighth of them went through an edit."""
    pictures = recolour(pool.crops(count, size, size, generator), generator, strength)
    name = EDITED[int(torch.randint(len(EDITED), (), device="cpu"))]
    edited = max(1, count // 8)
    pictures[:edited] = EXACT[name].apply(pictures[:edited])
    return (pictures.permute(0, 3, 1, 2) * 2 - 1).contiguous(memory_format=torch.channels_last)


def covariance(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[C]` and covariance `[C, C]` over batch and places of `[B, C, H, W]`."""
    rows = latents.transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    return mean, centred @ centred.T / rows.shape[1]


def loss_of(vae: FlatVAE, pictures: torch.Tensor) -> torch.Tensor:
    """Root of each picture's squared error (decibels weigh pictures so), a quarter of the absolute error,
    whiteness.

    Latents that are white share the noise, and the transformer's errors, evenly. Without the last term ten of
    the sixteen directions carried less than the noise.
    """
    latents = vae.encode(pictures).float()
    noisy = latents + LATENT_NOISE * torch.randn_like(latents)
    error = vae.decode(noisy).float() - pictures
    identity = torch.eye(vae.z_dim, device=latents.device)
    white = (covariance(latents)[1] - identity).square().mean()
    return error.square().mean((1, 2, 3)).add(1e-6).sqrt().mean() + 0.25 * error.abs().mean() + WHITENESS * white


@torch.no_grad()
def whiten(vae: FlatVAE, pool: Pool, seed: int) -> None:
    """Make the latents exactly white on pictures of the pool: a linear map and its inverse go into the two
    1×1
    convolutions around the latents, so that reconstructions stay as they are."""
    device = pool.pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    count = 384 if device.type == "cuda" else 16
    pictures = recolour(pool.crops(count, 128, 128, generator), generator, 0.5).permute(0, 3, 1, 2) * 2 - 1
    mean, cov = covariance(torch.cat([vae.encode(part).double() for part in pictures.split(64)]))
    values, vectors = torch.linalg.eigh(cov.cpu())
    values = values.clamp_min(1e-5)
    forward = (vectors * values.rsqrt()) @ vectors.T  # symmetric, so channels stay near what they were
    backward = (vectors * values.sqrt()) @ vectors.T
    forward, backward, mean = (t.float().to(device) for t in (forward, backward, mean.cpu()))
    z = vae.z_dim
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:z] = (forward @ weight[:z, :, 0, 0])[..., None, None]
    bias[:z] = forward @ (bias[:z] - mean)
    weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    bias += weight[:, :, 0, 0] @ mean
    weight.copy_((weight[:, :, 0, 0] @ backward)[..., None, None])


@torch.no_grad()
def evaluate_vae(vae: FlatVAE, height: int = 256, width: int = 256) -> tuple[dict[str, float], np.ndarray]:
    """dB per held-out photograph (8-bit output), and a sheet of originals above reconstructions."""
    device = next(vae.parameters()).device
    decibels, rows = {}, []
    for name in HELD_OUT:
        photograph = held_out_photograph(name, height, width)
        tensor = torch.from_numpy(photograph).to(device).permute(2, 0, 1)[None] / 127.5 - 1
        decoded = vae.decode(vae.encode(tensor.float())).clamp(-1, 1)
        picture = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        decibels[name] = psnr(picture / 255, photograph / 255)
        rows.append(np.concatenate([photograph, picture], 0))
    return decibels, np.concatenate(rows, 1)


class Replay:
    """Records a training step on static buffers as a CUDA graph and replays it: launching costs more than
    computing.

    `function(*buffers)` does forward, backward and the optimizer's step and returns the loss; one recording
    per shape of the inputs. On other devices it is called as it is.
    """

    def __init__(self, function, device: torch.device):
        self.function, self.enabled = function, device.type == "cuda"
        self.recorded: dict = {}
        self.memory = None

    def __call__(self, key, *inputs: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.function(*inputs)
        key = key, tuple(i.shape for i in inputs)
        if key not in self.recorded:
            buffers = [i.clone() for i in inputs]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.function(*buffers)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.memory):
                    loss = self.function(*buffers)
            except RuntimeError as error:
                print("not recorded, running eagerly:", error, flush=True)
                self.enabled = False
                torch.cuda.synchronize()
                return self.function(*inputs)
            self.memory = self.memory or graph.pool()
            self.recorded[key] = graph, buffers, loss
        graph, buffers, loss = self.recorded[key]
        torch._foreach_copy_(buffers, list(inputs))
        graph.replay()
        return loss


def make_optimizer(parameters: list, device: torch.device, weight_decay: float) -> torch.optim.AdamW:
    cuda = device.type == "cuda"
    rate = torch.tensor(1e-3, device=device) if cuda else 1e-3
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=cuda, capturable=cuda
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)  # a recorded step reads this tensor
    else:
        group["lr"] = rate


def train_vae(vae: FlatVAE, pool: Pool, seconds: float, seed: int, batch: int = 48, polish: bool = False) -> dict:
    """Train for `seconds`: crops of 128 pixels first, of 256 in the last 40 %. Returns the log.

    polish: start from a trained VAE: large crops only, a lower learning rate.
    """
    device = pool.pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    vae.to(device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True  # two shapes only
    parameters = list(vae.parameters())
    optimizer = make_optimizer(parameters, device, 1e-3)
    average = Average(vae)

    def step_on(pictures: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = loss_of(vae, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    replay = Replay(step_on, device)
    log, step, running, waiting = [], 0, None, []
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        progress = elapsed / seconds
        set_rate(optimizer, learning_rate(progress, PEAK_LEARNING_RATE * (0.4 if polish else 1.0)))
        if not waiting:
            large = polish or progress > 0.6
            count, size = (max(2, batch // 4), 256) if large else (batch, 128)
            drawn = picture_batch(pool, 4 * count, size, generator, 0.5 if large else 1.0)
            waiting = list(drawn[torch.randperm(4 * count).to(device)].split(count))
        loss = replay("vae", waiting.pop().contiguous(memory_format=torch.channels_last))
        average.update()
        running = loss.clone() if running is None else running.lerp(loss, 0.02)
        step += 1
        if step % 50 == 0:
            float(running)  # keeps the device's queue short, so that the clock is true
        if step % 500 == 0:
            log.append({"step": step, "seconds": round(elapsed, 1), "loss": round(float(running), 5)})
            if step % 2000 == 0:
                average.swap()
                decibels = evaluate_vae(vae)[0] if device.type == "cuda" else {}
                average.swap()
                log[-1]["held_out_db"] = {k: round(v, 2) for k, v in decibels.items()}
            if step % 1000 == 0:
                print("vae", log[-1], flush=True)
    average.swap()
    torch.backends.cudnn.benchmark = False
    return {"steps": step, "seconds": round(time.perf_counter() - begin, 1), "log": log}


@torch.no_grad()
def latent_statistics(vae: FlatVAE, pool: Pool, seed: int) -> dict:
    """What the rest of the house needs to know of this VAE's latents.

    mean, std: per channel, so that normalized latents have zero mean and unit deviation
    sensitivity: squared pixel error that a unit of squared error in each normalized channel causes, mean 1
    factors, bias: least squares from normalized latents to RGB in [-1, 1] at an eighth of the size
    """
    device = pool.pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    count = 192 if device.type == "cuda" else 8
    pictures = recolour(pool.crops(count, 128, 128, generator), generator).permute(0, 3, 1, 2) * 2 - 1
    latents = vae.encode(pictures)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    normalized = (latents - mean[:, None, None]) / std[:, None, None]

    clean = vae.decode(latents[: count // 2])
    sensitivity = []
    for channel in range(vae.z_dim):
        moved = latents[: count // 2].clone()
        moved[:, channel] += 0.1 * std[channel] * torch.randn_like(moved[:, channel])
        sensitivity.append((vae.decode(moved) - clean).square().mean() / 0.01)
    sensitivity = torch.stack(sensitivity)

    small = F.avg_pool2d(pictures, 8).permute(0, 2, 3, 1).reshape(-1, 3).double().cpu()
    inputs = normalized.permute(0, 2, 3, 1).reshape(-1, vae.z_dim).double().cpu()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(inputs, small).solution
    residual = (inputs @ solution - small).square().mean()
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "sensitivity": (sensitivity / sensitivity.mean()).tolist(),
        "factors": [[round(v, 5) for v in row] for row in solution[:-1].tolist()],
        "bias": [round(v, 5) for v in solution[-1].tolist()],
        "preview_db": -10 * math.log10(float(residual) / 4),
    }
