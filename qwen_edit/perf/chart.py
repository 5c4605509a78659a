"""The picture of a run: this one beside earlier ones, its nodes, its steps, its memory."""

import textwrap
from typing import Any

import numpy as np

from ..chart_style import MARGIN, THEMES, Theme, new_figure, pixels, style
from .advice import Advice
from .report import REPORT_STAGE, between_nodes_ms, ran, work_ms
from .table import STAGES

WIDTH = 9.0  # inches of 100 pixels: on a node of 450 pixels the letters are half as large as here
POINTS = 72  # of an inch
MAX_NODES = 8
MAX_BARS = 80  # steps that can still be told apart as bars
COLOURS = {
    "load": "#e8a33d",
    "lora": "#d8cf5a",
    "preprocess": "#56a8e4",
    "denoise": "#8f7cf7",
    "decode": "#3fb68b",
    "postprocess": "#8fd3a4",
    "save": "#e07fae",
    "other": "#9aa0ab",
    "host": "#646a75",
}
NAMES = {"preprocess": "prepare", "postprocess": "finish", "host": "between nodes"}


def draw_report(record: dict, earlier: list[dict], advice: Advice, theme: str = "dark") -> np.ndarray:
    """uint8 [H, 900, 3]; the height grows with the nodes and the earlier runs.

    Raises:
        ImportError: matplotlib is missing.
    """
    colours = THEMES[theme]
    wrapped = textwrap.wrap(advice.sentence, 74)
    nodes = _node_rows(record)
    steps = _longest_steps(record)
    heights = [
        1.05 + 0.3 * len(wrapped),
        1.3 + 0.46 * (1 + len(earlier)),
        0.95 + 0.38 * len(nodes),
        *([2.55] if steps else []),
        2.75,
    ]
    figure = new_figure(colours, WIDTH, sum(heights))
    boxes = _Boxes(figure, heights)
    _header(boxes.next(colours, left=MARGIN, top=0, bottom=0), colours, record, wrapped)
    _runs(boxes.next(colours, left=1.75, top=0.55, bottom=0.75), colours, record, earlier)
    _nodes(boxes.next(colours, left=MARGIN, top=0.6, bottom=0.1), colours, nodes, record)
    if steps:
        _steps(boxes.next(colours, left=0.95, top=0.62, bottom=0.55), colours, *steps)
    _memory(boxes.next(colours, left=0.95, top=0.62, bottom=0.65), colours, record)
    return pixels(figure)


class _Boxes:
    """Panels from top to bottom, placed by inches."""

    def __init__(self, figure: Any, heights: list[float]):
        self._figure, self._heights, self._total = figure, iter(heights), sum(heights)
        self._top = self._total

    def next(self, theme: Theme, left: float, top: float, bottom: float) -> Any:
        height = next(self._heights)
        self._top -= height
        box = (
            left / WIDTH,
            (self._top + bottom) / self._total,
            (WIDTH - left - MARGIN) / WIDTH,
            (height - top - bottom) / self._total,
        )
        return self._figure.add_axes(box)


def _header(axes: Any, theme: Theme, record: dict, wrapped: list[str]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    height = axes.get_position().height * axes.figure.get_figheight()
    axes.set_ylim(height, 0)
    total = seconds(work_ms(record))
    parts = ["cold" if record["cold"] else "warm", record["device"]["name"]]
    parts += ["so far"] if record["status"] == "so far" else [record["status"]]
    axes.text(0, 0.55, total, color=theme.text, fontsize=27, fontweight="bold", va="center")
    axes.text(1, 0.55, "  ·  ".join(parts), color=theme.dim, fontsize=14, va="center", ha="right")
    for number, line in enumerate(wrapped):
        axes.text(0, 1.1 + 0.3 * number, line, color=theme.text, fontsize=14.5, va="center")


def _runs(axes: Any, theme: Theme, record: dict, earlier: list[dict]) -> None:
    style(axes, theme, "Where the time went" + (", beside earlier runs" if earlier else ""))
    runs = [record, *earlier]
    used: list[str] = []
    longest = max(work_ms(run) for run in runs) / 1000
    for row, run in enumerate(runs):
        start = 0.0
        for stage in (name for name in STAGES if name in run["stages"] and name != REPORT_STAGE):
            length = run["stages"][stage]["ms"] / 1000
            if length > 0:
                colour = COLOURS[stage]
                axes.barh(row, length, left=start, color=colour, height=0.62, alpha=1 if row == 0 else 0.62)
                if length / longest >= 0.004 and stage not in used:
                    used.append(stage)
            start += length
        text = f" {seconds(start * 1000)} {'cold' if run['cold'] else 'warm'}"
        axes.text(
            start + longest * 0.01, row, text, va="center", fontsize=13, color=theme.text if row == 0 else theme.dim
        )
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.24)
    axes.set_yticks(range(len(runs)), ["this run", *(run["time"][11:19] for run in earlier)])
    axes.get_yticklabels()[0].set_color(theme.text)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    # Names of the stages in one line, as wide as they are written.
    x, y = -(1.75 - MARGIN) * POINTS, -26
    for stage in sorted(used, key=STAGES.index):
        name = NAMES.get(stage, stage)
        axes.annotate(
            "■", (0, 0), (x, y), "axes fraction", "offset points", color=COLOURS[stage], fontsize=15, va="center"
        )
        axes.annotate(
            name, (0, 0), (x + 17, y), "axes fraction", "offset points", color=theme.dim, fontsize=13, va="center"
        )
        x += 32 + 7.3 * len(name)


def _node_rows(record: dict) -> list[tuple[str, float, float | None, str]]:
    """(name, ms, device ms, stage), the longest first; what is left in one row."""
    nodes = sorted((node for node in ran(record) if node["stage"] != REPORT_STAGE), key=lambda node: -node["ms"])
    rows = [(node["class_type"], node["ms"], node["device_ms"], node["stage"]) for node in nodes[:MAX_NODES]]
    rest = nodes[MAX_NODES:]
    if rest:
        rows.append((f"{len(rest)} more", sum(node["ms"] for node in rest), None, "other"))
    rows.append(("between the nodes", between_nodes_ms(record), None, "host"))
    return rows


def _nodes(axes: Any, theme: Theme, rows: list[tuple[str, float, float | None, str]], record: dict) -> None:
    device = any(on_device is not None for _, _, on_device, _ in rows)
    cached = sum(node["cached"] for node in record["nodes"])
    title = "Nodes" + (", the inner line is time on the card" if device else "")
    style(axes, theme, title + (f" ({cached} more from the cache)" if cached else ""))
    longest = max(max(ms for _, ms, _, _ in rows), 1e-3)
    for row, (name, ms, on_device, stage) in enumerate(rows):
        axes.barh(row, ms / longest, left=0, color=COLOURS[stage], height=0.5)
        if on_device:
            axes.barh(row, min(on_device / longest, 1), left=0, color=theme.background, height=0.09)
        share = ms / work_ms(record)
        axes.text(-0.02, row, name, ha="right", va="center", fontsize=13, color=theme.text)
        axes.text(
            ms / longest + 0.015, row, f"{seconds(ms)}   {share_text(share)}", va="center", fontsize=13, color=theme.dim
        )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.78, 1.32)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _longest_steps(record: dict) -> tuple[dict, dict] | None:
    """(entry, its steps) of the denoising that took longest."""
    found = [one for one in record["nodes"] + record["spans"] if one["stage"] == "denoise" and one.get("steps")]
    if not found:
        return None
    longest = max(found, key=lambda one: one["ms"])
    return (longest, longest["steps"]) if longest["steps"]["count"] > 1 else None


def _steps(axes: Any, theme: Theme, entry: dict, steps: dict) -> None:
    title = f"{steps['count']} steps of {entry['class_type'] or 'denoise'}, ms"
    style(axes, theme, title + (", the line is time on the card" if steps["device_ms"] else ""))
    first, others = steps["first_ms"] or 0.0, steps["ms"]
    device = steps["device_ms"][-len(others) :] if others else []
    limit = max([*others, *device, min(first, 2 * max(others, default=first))]) * 1.15
    numbers = range(2, 2 + len(others))
    if len(others) <= MAX_BARS:
        axes.bar(numbers, others, color=COLOURS["denoise"], width=0.72)
    else:
        axes.plot(numbers, others, color=COLOURS["denoise"], linewidth=2)
    axes.bar(1, first, color=COLOURS["host"], width=0.72)
    if first > limit:
        axes.annotate(
            f"first: {seconds(first)}", (1, limit), (14, 4), "data", "offset points", color=theme.dim, fontsize=13,
            va="bottom",
        )  # fmt: skip
    if device:
        axes.plot(numbers, device, color=theme.second, linewidth=2.2)
    axes.set_ylim(0, limit)
    axes.set_xlim(0.3, len(others) + 1.7)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.locator_params(axis="y", nbins=4)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _memory(axes: Any, theme: Theme, record: dict) -> None:
    memory = record["memory"]
    style(axes, theme, "Memory over time, GiB")
    at = np.array(memory["at_ms"]) / 1000
    lines = [("process", theme.second, memory["rss_mib"])]
    if memory["device_mib"]:
        lines.insert(0, ("card", theme.accent, memory["device_mib"]))
    top = max(max(values) for _, _, values in lines) / 1024 * 1.3
    for name, colour, values in lines:
        gib = np.array(values) / 1024
        axes.step(at, gib, where="post", color=colour, linewidth=2.4)
        axes.fill_between(at, gib, step="post", color=colour, alpha=0.14)
        axes.annotate(
            f"{name}, at most {gib.max():.1f}", (at[gib.argmax()], gib.max()), (4, 7), "data", "offset points",
            color=colour, fontsize=13, ha="right" if gib.argmax() > len(at) / 2 else "left",
        )  # fmt: skip
    for node in ran(record):
        left, width = node["at_ms"] / 1000, node["ms"] / 1000
        axes.axvspan(left, left + width, 0, 0.035, color=COLOURS.get(node["stage"], COLOURS["other"]), linewidth=0)
    axes.set_xlim(0, max(at[-1], record["wall_ms"] / 1000, 1e-3))
    axes.set_ylim(0, top)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.locator_params(axis="y", nbins=4)
    axes.set_xlabel("seconds; the strip shows which stage ran", color=theme.dim, fontsize=12.5, labelpad=6)


def share_text(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def seconds(ms: float) -> str:
    """Short: 12.3 s, 840 ms, 0.4 ms."""
    if ms >= 9950:
        return f"{ms / 1000:.1f} s"
    if ms >= 999.5:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.0f} ms" if ms >= 9.5 else f"{ms:.1f} ms"
