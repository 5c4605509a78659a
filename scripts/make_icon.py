"""Draws web/icon.png, the pack's icon in ComfyUI's registry: a picture whose right half is edited, and a spark.

    python scripts/make_icon.py

Needs Pillow. It is drawn four times as large and reduced, which smooths the edges.
"""

from __future__ import annotations

import io

from comfy_host import REPO, run_as_script, say, write_atomically
from PIL import Image, ImageDraw

ICON = REPO / "web" / "icon.png"
SIDE = 400  # pixels; the registry shows at most this
FINE = 4
DAY = ("#7dd3fc", "#38bdf8", "#166534", "#22c55e", "#fde047")
NIGHT = ("#4c1d95", "#7c3aed", "#1e1b4b", "#4338ca", "#fef3c7")


def scene(colours: tuple[str, str, str, str, str], side: int) -> Image.Image:
    """A sky with a sun or moon over two hills."""
    top, bottom, far, near, light = colours
    sky = Image.linear_gradient("L").resize((side, side))
    picture = Image.composite(Image.new("RGB", (side, side), bottom), Image.new("RGB", (side, side), top), sky)
    draw = ImageDraw.Draw(picture)
    draw.ellipse([side * x for x in (0.36, 0.17, 0.64, 0.45)], fill=light)
    draw.ellipse([side * x for x in (-0.35, 0.58, 0.75, 1.7)], fill=far)
    draw.ellipse([side * x for x in (0.2, 0.66, 1.4, 1.8)], fill=near)
    return picture


def icon() -> Image.Image:
    """The icon [SIDE, SIDE], RGBA, with round corners."""
    side = SIDE * FINE
    picture = scene(DAY, side)
    picture.paste(scene(NIGHT, side).crop((side // 2, 0, side, side)), (side // 2, 0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle([side * 0.492, 0, side * 0.508, side], fill="white")
    bolt = ((0.55, 0.2), (0.36, 0.55), (0.48, 0.55), (0.44, 0.82), (0.65, 0.44), (0.52, 0.44))
    draw.polygon([(x * side, y * side) for x, y in bolt], fill="white", outline="#0f172a", width=side // 50)
    corners = Image.new("L", (side, side), 0)
    ImageDraw.Draw(corners).rounded_rectangle([0, 0, side - 1, side - 1], radius=side * 0.2, fill=255)
    picture.putalpha(corners)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> int:
    """Write the icon."""
    file = io.BytesIO()
    icon().quantize(128, method=Image.Quantize.FASTOCTREE).save(file, "PNG", optimize=True)
    write_atomically(ICON, file.getvalue())
    say(f"Wrote {ICON} ({len(file.getvalue())} bytes)")
    return 0


if __name__ == "__main__":
    run_as_script(main)
