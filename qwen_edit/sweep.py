"""A step sweep: which recipes to compare, how far each is from the longest, and where more steps stop paying.

PSNR and SSIM are kornia's, which ComfyUI itself requires. A learned perceptual measure (LPIPS, DISTS) is not among them: every
kept library fetches its weights from the network.
"""

import importlib
import json
import math
from dataclasses import asdict, dataclass

import torch

from .errors import INPUT
from .recipes import PRESETS, Recipe, recipe_for
from .values import check_kind

MAX_POINTS = 16
MAX_DIGITS = 20  # of a number of steps; Python itself refuses thousands
SSIM_WINDOW = 11  # pixels, Gaussian of 1.5: Wang et al. 2004, "Image quality assessment"


@dataclass(frozen=True)
class Point:
    """One run of a sweep: as it was asked for, and what that means."""

    label: str
    recipe: Recipe

    @property
    def evaluations(self) -> int:
        """How often the model runs."""
        return self.recipe.steps * (2 if self.recipe.true_cfg_scale > 1 else 1)


@dataclass(frozen=True)
class Outcome:
    """What one point came to. `seconds` is sampling alone. `psnr_db` and `ssim` are against the reference and None for the
    reference itself and for a point that failed; `psnr_db` is infinity for equal pictures."""

    label: str
    steps: int
    true_cfg_scale: float
    seconds: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{self.label} steps" if self.label.isdecimal() else self.label


def parse_sweep(text: str, preset: str, true_cfg_scale: float = 0.0, shift: float = 0.0) -> tuple[Point, ...]:
    """Points of a list such as "4, 8, 12, 40" (steps of `preset`) or "draft, standard, Lightning 8", or both mixed.

    Args:
        true_cfg_scale, shift: overrides as in `recipe_for`; they hold for numbers of steps, not for named presets.

    Raises:
        ValueError: no text, an unknown word, a value out of range, a point twice, fewer than two or more than `MAX_POINTS`.
    """
    check_kind("sweep", text, str, "a text")
    recipe_for(preset, 0, true_cfg_scale, shift)  # which no point may need
    names = {name.lower(): name for name in PRESETS}
    points = []
    for item in (item.strip() for item in text.replace("\n", ",").split(",")):
        if not item:
            continue
        if item.isdecimal() and len(item) < MAX_DIGITS:
            if int(item) == 0:
                raise ValueError(f"{INPUT} The sweep holds 0; a number of steps is at least 1.")
            points.append(Point(str(int(item)), recipe_for(preset, int(item), true_cfg_scale, shift)))
        elif item.lower() in names:
            points.append(Point(names[item.lower()], recipe_for(names[item.lower()])))
        else:
            raise ValueError(
                f"{INPUT} The sweep holds {item[:40]!r}; it takes numbers of steps and names of presets"
                f" ({', '.join(PRESETS)}), separated by commas."
            )
    labels = [point.label for point in points]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{INPUT} The sweep holds {', '.join(twice)} more than once.")
    if not 2 <= len(points) <= MAX_POINTS:
        raise ValueError(f"{INPUT} The sweep has {len(points)} points; it takes 2 to {MAX_POINTS}.")
    return tuple(points)


def likeness(picture: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of IMAGEs ``[B, H, W, 3]`` from 0 to 1; (inf, 1.0) for equal ones."""
    metrics = importlib.import_module("kornia.metrics")
    first, second = (one.movedim(-1, 1).float().cpu() for one in (picture, reference))
    if torch.equal(first, second):
        return math.inf, 1.0
    psnr = metrics.psnr(first, second, 1.0)
    ssim = metrics.ssim(first, second, SSIM_WINDOW, 1.0, padding="valid").mean()
    return float(psnr), float(ssim)


def knee(curve: list[tuple[float, float]]) -> int | None:
    """Index of the point of (cost, quality) after which more cost buys less: the one farthest above the straight line from
    the cheapest to the best (Satopää et al. 2011, "Finding a Kneedle in a Haystack"). None when none lies above it, and for
    fewer than three points."""
    costs, qualities = [cost for cost, _ in curve], [quality for _, quality in curve]
    if len(curve) < 3 or max(costs) == min(costs) or max(qualities) == min(qualities):
        return None
    above = [
        (quality - min(qualities)) / (max(qualities) - min(qualities)) - (cost - min(costs)) / (max(costs) - min(costs))
        for cost, quality in curve
    ]
    best = max(range(len(curve)), key=above.__getitem__)
    return best if above[best] > 1e-9 else None


def find_knee(outcomes: list[Outcome], reference: int) -> int | None:
    """The knee of SSIM against time; the reference counts with 1."""
    measured = [index for index, one in enumerate(outcomes) if one.error is None]
    curve = []
    for index in measured:
        ssim = 1.0 if index == reference else outcomes[index].ssim
        curve.append((outcomes[index].seconds or 0.0, ssim or 0.0))
    found = knee(curve)
    return None if found is None else measured[found]


def sentence(outcomes: list[Outcome], reference: int, found: int | None) -> str:
    """What the sweep says in one line."""
    longest = outcomes[reference]
    if found is None:
        return f"No knee: up to {longest.name}, more time goes on buying likeness to it."
    if found == reference:
        return f"No knee before {longest.name} itself."
    point = outcomes[found]
    share = (point.seconds or 0.0) / (longest.seconds or 1.0)
    return (
        f"The knee is at {point.name}: SSIM {point.ssim:.3f}, {_db(point.psnr_db)} against {longest.name}, in"
        f" {share:.0%} of its time."
    )


def sweep_table(outcomes: list[Outcome], reference: int, found: int | None) -> str:
    """A row for each point: seconds, PSNR and SSIM against the reference."""
    rows = [("point", "steps", "CFG", "seconds", "PSNR dB", "SSIM", "")]
    for index, one in enumerate(outcomes):
        start = (one.label, str(one.steps), f"{one.true_cfg_scale:g}")
        if one.error is not None:
            rows.append((*start, "-", "-", "-", f"failed: {one.error}"))
        elif index == reference:
            rows.append((*start, f"{one.seconds:.2f}", "-", "-", "the reference"))
        else:
            values = (f"{one.seconds:.2f}", _db(one.psnr_db).removesuffix(" dB"), f"{one.ssim:.4f}")
            rows.append((*start, *values, "the knee" if index == found else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [sentence(outcomes, reference, found), ""]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:6], widths[1:], strict=True)),
        ]
        lines.append("  ".join([*cells, row[6]]).rstrip())
    return "\n".join(lines)


def as_json(outcomes: list[Outcome], reference: int, found: int | None) -> str:
    """The same as one JSON object; an infinite PSNR is written as null with an SSIM of 1."""
    rows = [asdict(one) | ({"psnr_db": None} if one.psnr_db == math.inf else {}) for one in outcomes]
    return json.dumps({"points": rows, "reference": reference, "knee": found})


def _db(psnr: float | None) -> str:
    return "equal" if psnr is None or psnr == math.inf else f"{psnr:.1f} dB"
