"""What the pack's charts have in common: colours for dark and light canvases, sizes, and the way to pixels.

matplotlib is imported when a chart is drawn and not before, through its object interface only: no pyplot, so no window,
no global state, and any thread may draw.
"""

import importlib
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DPI = 100
NO_MATPLOTLIB = "No chart was drawn, because the Python package matplotlib is missing: pip install matplotlib"


@dataclass(frozen=True)
class Theme:
    background: str
    panel: str
    text: str
    dim: str
    grid: str
    accent: str
    second: str


THEMES = {
    "dark": Theme("#17181c", "#202228", "#f2f3f5", "#a4a9b3", "#363a43", "#8f7cf7", "#4cc3a5"),
    "light": Theme("#ffffff", "#f4f5f7", "#17181c", "#5c6370", "#d9dce2", "#6a55e0", "#0f8f6f"),
}


def new_figure(theme: Theme, width: float, height: float) -> Any:
    """An empty figure, in inches of `DPI` pixels. Raises ImportError without matplotlib."""
    figure_module = importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib.backends.backend_agg")
    return figure_module.Figure(figsize=(width, height), dpi=DPI, facecolor=theme.background)


MARGIN = 0.35  # inches, left and right


def style(axes: Any, theme: Theme, title: str, size: float = 13) -> None:
    """A flat panel with a title at the left margin of the figure and as few lines as can be read."""
    axes.set_facecolor(theme.background)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.dim, labelsize=size, length=0, pad=6)
    axes.set_axisbelow(True)
    box = axes.get_position()
    x = (MARGIN / axes.figure.get_figwidth() - box.x0) / box.width
    axes.set_title(title, loc="left", x=x, color=theme.text, fontsize=size + 2, fontweight="bold", pad=14)


def pixels(figure: Any) -> np.ndarray:
    """The drawn figure as uint8 [H, W, 3]."""
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def note_picture(text: str) -> np.ndarray:
    """A sentence where a chart would be, uint8 [H, W, 3], drawn with Pillow alone."""
    picture = Image.new("RGB", (900, 160), THEMES["dark"].background)
    lines = "\n".join(textwrap.wrap(text, 72))
    font = ImageFont.load_default(22)
    ImageDraw.Draw(picture).multiline_text((35, 45), lines, THEMES["dark"].text, font, spacing=12)
    return np.array(picture)
