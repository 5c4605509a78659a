"""The pictures of a step sweep: quality against time, and a contact sheet."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .chart_style import MARGIN, THEMES, Theme, new_figure, pixels, style
from .sweep import Outcome, sentence

WIDTH = 9.0  # inches of 100 pixels
MAX_SHEET = 2400  # pixels of the contact sheet's longer side: above it the pictures are reduced
GAP, LABEL, MIN_COLUMN = 12, 44, 150  # pixels


def draw_sweep(outcomes: list[Outcome], reference: int, found: int | None, theme: str = "dark") -> np.ndarray:
    """uint8 [H, 900, 3]: PSNR and SSIM against the reference over the seconds that sampling took.

    Raises:
        ImportError: matplotlib is missing.
    """
    colours = THEMES[theme]
    figure = new_figure(colours, WIDTH, 9.2)
    figure.text(
        MARGIN / WIDTH, 0.955, "Quality against time", color=colours.text, fontsize=22, fontweight="bold", va="center"
    )
    figure.text(
        MARGIN / WIDTH, 0.912, sentence(outcomes, reference, found), color=colours.text, fontsize=13.5, va="center"
    )
    longest = outcomes[reference]
    shown = [index for index, one in enumerate(outcomes) if one.error is None and index != reference]
    measures = (
        ("SSIM", [outcomes[index].ssim for index in shown], 1.0),
        ("PSNR (dB)", [outcomes[index].psnr_db for index in shown], None),
    )
    for (title, values, best), bottom in zip(measures, (0.52, 0.085), strict=True):
        axes = figure.add_axes((0.11, bottom, 0.85, 0.315))
        style(axes, colours, f"{title} against {longest.name}")
        _curve(axes, colours, outcomes, shown, values, best, reference, found)
    axes.set_xlabel("seconds of sampling", color=colours.dim, fontsize=13, labelpad=6)
    failed = [one.name for one in outcomes if one.error is not None]
    if failed:
        figure.text(
            0.96, 0.955, f"failed: {', '.join(failed)}", color=colours.dim, fontsize=13, ha="right", va="center"
        )
    return pixels(figure)


def _curve(
    axes: Any, theme: Theme, outcomes, shown, values, best: float | None, reference: int, found: int | None
) -> None:
    longest = outcomes[reference].seconds or 0.0
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    top = best if best is not None else high
    spread = (top - low) or 1.0
    times = [outcomes[index].seconds for index in shown]
    heights = [top if value is None or not math.isfinite(value) else value for value in values]
    line = sorted([*zip(times, heights, strict=True), *([(longest, best)] if best is not None else [])])
    axes.plot(*zip(*line, strict=True), color=theme.accent, linewidth=2.4, zorder=2)
    axes.axvline(longest, color=theme.grid, linewidth=1.6, linestyle=(0, (4, 3)), zorder=1)
    for index, time, height in zip(shown, times, heights, strict=True):
        knee = index == found
        if knee:
            axes.scatter([time], [height], s=330, facecolors="none", edgecolors=theme.second, linewidths=2.6, zorder=3)
        axes.scatter([time], [height], s=75, color=theme.second if knee else theme.accent, zorder=4)
        text = f"{outcomes[index].name}, the knee" if knee else outcomes[index].label
        axes.annotate(
            text, (time, height), (9, -11), "data", "offset points", color=theme.text, fontsize=13.5,
            fontweight="bold" if knee else "normal", va="top",
        )  # fmt: skip
    label = f"{outcomes[reference].name}, the reference"
    if best is not None:
        axes.scatter([longest], [best], s=75, color=theme.text, zorder=4)
    axes.annotate(
        label, (longest, low - 0.1 * spread), (-8, 0), "data", "offset points", color=theme.dim, fontsize=13, ha="right"
    )
    axes.set_ylim(low - 0.2 * spread, top + 0.12 * spread)
    axes.set_xlim(0, max([*times, longest]) * 1.06)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.locator_params(axis="y", nbins=5)


def contact_sheet(pictures: list[torch.Tensor], labels: list[str]) -> torch.Tensor:
    """All pictures ``[1, H, W, 3]`` of one size side by side, each under its label, as ``[1, H', W', 3]``.

    The pictures keep their pixels unless the sheet would pass `MAX_SHEET`.
    """
    height, width = pictures[0].shape[1:3]
    columns = min(
        range(1, len(pictures) + 1),
        key=lambda columns: abs(
            math.log((columns * (width + GAP)) / (math.ceil(len(pictures) / columns) * (height + GAP + LABEL)) / 1.4)
        ),
    )
    lines = math.ceil(len(pictures) / columns)
    scale = min(1.0, MAX_SHEET / max(columns * (width + GAP), lines * (height + GAP + LABEL)))
    tile_width, tile_height = max(1, round(width * scale)), max(1, round(height * scale))
    across, down = max(tile_width, MIN_COLUMN) + GAP, tile_height + LABEL + GAP
    sheet = Image.new("RGB", (columns * across + GAP, lines * down + GAP), THEMES["dark"].background)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(20)
    places = [(GAP + n % columns * across, GAP + n // columns * down) for n in range(len(pictures))]
    for (x, y), label in zip(places, labels, strict=True):
        draw.text((x, y + LABEL // 2), label, THEMES["dark"].text, font, anchor="lm")
    result = torch.from_numpy(np.array(sheet)).float().div(255)[None]
    for (x, y), picture in zip(places, pictures, strict=True):
        tile = picture if scale == 1 else _reduced(picture, tile_width, tile_height)
        result[:, y + LABEL : y + LABEL + tile.shape[1], x : x + tile.shape[2]] = tile.cpu()
    return result


def _reduced(picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
    array = (picture[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    small = Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).float().div(255)[None]
