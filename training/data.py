"""The pictures of the training: a pool of photographs and procedural pictures on one device, and random crops
of it.

Photographs ship with scikit-image, scikit-learn and matplotlib; one lies in `training/pictures` (sources and
licences: training/README.md). HELD_OUT is never in the pool, not even as a crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HELD_OUT = ("astronaut", "chelsea", "coffee", "rocket")

# name: how often it is drawn (colour photographs of the world most, textures and documents little)
SKIMAGE_PHOTOGRAPHS = {
    "motorcycle_left.png": 3.0,
    "motorcycle_right.png": 1.0,
    "hubble_deep_field.jpg": 1.0,
    "ihc.png": 1.5,
    "retina.jpg": 1.0,
    "camera.png": 2.0,
    "coins.png": 1.0,
    "moon.png": 0.5,
    "brick.png": 0.5,
    "grass.png": 0.7,
    "gravel.png": 0.7,
    "clock_motion.png": 0.5,
    "page.png": 0.4,
    "text.png": 0.3,
    "cell.png": 0.2,
}


def held_out_photograph(name: str, height: int = 256, width: int = 256) -> np.ndarray:
    """The middle of a held-out photograph `[height, width, 3]` uint8: largest such crop, LANCZOS."""
    import skimage.data

    picture = Image.fromarray(getattr(skimage.data, name)()[..., :3])
    scale = min(picture.width / width, picture.height / height)
    crop_width, crop_height = width * scale, height * scale
    left, top = (picture.width - crop_width) / 2, (picture.height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    return np.array(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))


def training_photographs() -> list[tuple[np.ndarray, float]]:
    """`[H, W, 3]` uint8 photographs with how often each is drawn."""
    import matplotlib
    import skimage
    import sklearn

    folder = Path(skimage.__file__).parent / "data"
    files = [(folder / name, weight) for name, weight in SKIMAGE_PHOTOGRAPHS.items()]
    sklearn_folder = Path(sklearn.__file__).parent / "datasets" / "images"
    files += [(sklearn_folder / "china.jpg", 6.0), (sklearn_folder / "flower.jpg", 5.0)]
    files += [(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg", 5.0)]
    files += [(Path(__file__).parent / "pictures" / "raccoon.jpg", 6.0)]
    assert not any(held in file.name for file, _ in files for held in HELD_OUT)
    return [(np.array(Image.open(file).convert("RGB")), weight) for file, weight in files]


def _noise_bank(count: int, size: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """`count` pictures `[count, 3, size, size]` of coloured 1/f^α noise, zero mean and unit deviation, α in
    0.5–2.2.
    """
    frequency = torch.fft.fftfreq(size, device=device)
    radius = (frequency[:, None] ** 2 + frequency[None, : size // 2 + 1] ** 2).sqrt().clamp_min(1 / size)
    alpha = torch.rand(count, 1, 1, 1, device=device, generator=generator) * 1.7 + 0.5
    white = torch.randn(count, 3, size, size, device=device, generator=generator)
    # photographs vary in brightness far more than in hue
    colour = 0.4 * torch.rand(count, 1, 1, 1, device=device, generator=generator)
    white = white * colour + white[:, :1] * (1 - colour)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * radius**-alpha, s=(size, size))
    return (noise - noise.mean((2, 3), keepdim=True)) / noise.std((1, 2, 3), keepdim=True)


def procedural_pictures(
    count: int, size: int, photographs: list[np.ndarray], device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """Dead leaves `[count, 3, size, size]` in [0, 1]: overlapping shapes whose sizes follow a power law.

    The dead leaves model (Lee, Mumford & Huang 2001) has edges and scale statistics like photographs. Colours
    are drawn from pixels of the training photographs or at random; shapes carry gradients and noise.
    """

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    palette = torch.cat([torch.from_numpy(p[::7, ::7].reshape(-1, 3)) for p in photographs]).to(device) / 255.0
    noise = _noise_bank(min(count, 64), size, device, generator)
    axis = torch.arange(size, device=device) + 0.5
    y, x = axis[None, :, None], axis[None, None, :]
    pictures = torch.empty(count, 3, size, size, device=device)
    for first in range(0, count, 64):
        n = min(64, count - first)
        canvas = rand(n, 3, 1, 1).expand(-1, -1, size, size) + 0.2 * noise[torch.randperm(len(noise))[:n].to(device)]
        for index in range(140):
            # from large shapes to small ones, so that the small stay visible
            radius = size * (0.5 * (index + 1) ** -0.6) * (0.5 + rand(n, 1, 1))
            cy, cx = rand(n, 1, 1) * size, rand(n, 1, 1) * size
            angle, stretch = rand(n, 1, 1) * torch.pi, 0.3 + 0.7 * rand(n, 1, 1)
            u = (x - cx) * angle.cos() + (y - cy) * angle.sin()
            v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / stretch
            round_, square = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
            distance = torch.where(rand(n, 1, 1) < 0.6, round_, square)
            softness = 0.6 + 6 * rand(n, 1, 1) ** 4
            mask = ((radius - distance) / softness + 0.5).clamp(0, 1)[:, None]
            drawn = palette[torch.randint(len(palette), (n,), device=device, generator=generator)]
            colour = torch.where(rand(n, 1) < 0.75, drawn, rand(n, 3))[:, :, None, None]
            slope = (rand(n, 3, 1, 1) - 0.5) * 0.8 * (u / (radius + 1))[:, None]
            texture = noise[torch.randint(len(noise), (n,), device=device, generator=generator)]
            leaf = colour + slope + 0.25 * rand(n, 1, 1, 1) ** 2 * texture
            canvas = canvas + mask * (leaf - canvas)
        pictures[first : first + n] = canvas.clamp(0, 1)
    return pictures


@dataclass
class Pool:
    """Every picture at several scales in one flat buffer, so that one gather cuts a whole batch of crops."""

    pixels: torch.Tensor  # [N, 3] uint8
    offsets: torch.Tensor  # [P] where picture p begins
    heights: torch.Tensor  # [P]
    widths: torch.Tensor  # [P]
    weights: torch.Tensor  # [P] float

    def crops(self, count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """Random crops `[count, height, width, 3]` float32 in [0, 1], flipped or transposed at random."""
        device = self.pixels.device
        fits = (self.heights >= max(height, width)) & (self.widths >= max(height, width))
        weights = torch.where(fits, self.weights, torch.zeros_like(self.weights))
        picture = torch.multinomial(weights, count, replacement=True, generator=generator)
        turned, flip_y, flip_x = (torch.rand(3, count, 1, 1, device=device, generator=generator) < 0.5).unbind(0)
        turned &= torch.rand(count, 1, 1, device=device, generator=generator) < 0.3
        dy = torch.arange(height, device=device)[None, :, None]
        dx = torch.arange(width, device=device)[None, None, :]
        dy = torch.where(flip_y, height - 1 - dy, dy)
        dx = torch.where(flip_x, width - 1 - dx, dx)
        dy, dx = torch.where(turned, dx, dy), torch.where(turned, dy, dx)
        span_y = torch.where(turned, width, height).view(-1)
        span_x = torch.where(turned, height, width).view(-1)
        start = torch.rand(2, count, device=device, generator=generator)
        y0 = (start[0] * (self.heights[picture] - span_y + 1)).long()
        x0 = (start[1] * (self.widths[picture] - span_x + 1)).long()
        rows = (self.offsets[picture] + y0 * self.widths[picture] + x0)[:, None, None]
        index = rows + dy * self.widths[picture][:, None, None] + dx
        return self.pixels[index].float() / 255


def build_pool(device: torch.device, seed: int, procedural: int = 512, size: int = 512) -> Pool:
    """The pool with photographs at scales down to 400 pixels (three quarters of the draws) and `procedural`
    pictures.
    """
    generator = torch.Generator(device).manual_seed(seed)
    photographs = training_photographs()
    items: list[tuple[torch.Tensor, float]] = []
    for picture, weight in photographs:
        tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].to(device) / 255.0
        short = min(tensor.shape[2:])
        # 1.0 is the photograph itself; smaller copies have the sharp detail of a downscaled picture
        targets = [t for t in (1.0, 0.8, 0.64, 0.5, 0.4, 0.3, 0.22) if t * short >= 136]
        targets += [400 / short] if short < 400 else []
        for scale in targets:
            h, w = round(tensor.shape[2] * scale), round(tensor.shape[3] * scale)
            scaled = F.interpolate(tensor, (h, w), mode="bicubic", antialias=True, align_corners=False)
            items.append((scaled[0].clamp(0, 1), weight / len(targets)))
    total = sum(weight for _, weight in items)
    made = procedural_pictures(procedural, size, [p for p, _ in photographs], device, generator)
    items += [(picture, 0.3 * total / procedural) for picture in made]

    flat = [(p * 255).round().to(torch.uint8).permute(1, 2, 0).reshape(-1, 3) for p, _ in items]
    sizes = torch.tensor([len(f) for f in flat])
    return Pool(
        pixels=torch.cat(flat),
        offsets=(sizes.cumsum(0) - sizes).to(device),
        heights=torch.tensor([p.shape[1] for p, _ in items], device=device),
        widths=torch.tensor([p.shape[2] for p, _ in items], device=device),
        weights=torch.tensor([w for _, w in items], device=device),
    )


def recolour(pictures: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Random gamma, gain, saturation and channel order per picture; `[B, H, W, 3]` in [0, 1]."""
    count, device = len(pictures), pictures.device

    def rand(low: float, high: float, channels: int = 1) -> torch.Tensor:
        value = torch.rand(count, 1, 1, channels, device=device, generator=generator)
        return low + (high - low) * value

    def sometimes(probability: float, changed: torch.Tensor, unchanged: torch.Tensor) -> torch.Tensor:
        return torch.where(rand(0, 1) < probability * strength, changed, unchanged)

    pictures = sometimes(0.4, pictures.clamp_min(1e-4) ** rand(0.6, 1.6), pictures)
    pictures = sometimes(0.3, pictures * rand(0.7, 1.2, 3), pictures)
    grey = pictures.mean(-1, keepdim=True)
    pictures = sometimes(0.4, grey + (pictures - grey) * rand(0.2, 1.8), pictures)
    pictures = sometimes(0.2, 0.5 + (pictures - 0.5) * rand(0.5, 1.5), pictures)
    order = torch.rand(count, 3, device=device, generator=generator).argsort(1)[:, None, None].expand_as(pictures)
    pictures = sometimes(0.3, pictures.gather(3, order), pictures)
    return pictures.clamp(0, 1)
