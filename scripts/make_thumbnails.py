"""Runs every shipped workflow as it is and makes the thumbnails of the template browser from the results.

    python scripts/make_thumbnails.py --server http://127.0.0.1:8188

Needs Pillow. The server must run this pack, with the demo model; on two CPU cores it takes a few minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_client import ComfyClient, ComfyError
from comfy_host import REPO, run_as_script, say, write_atomically
from edit_job import nodes_of
from PIL import Image, ImageOps

WORKFLOWS = REPO / "workflows"
EXAMPLES = REPO / "web" / "examples"
BATCH = ["qwen_edit_astronaut.png", "qwen_edit_cat.png", "qwen_edit_rocket.png"]
SIDE = 480  # pixels
GAP = 4
MAX_BYTES = 60_000
BACKGROUND = "#202024"
CHARTS = ("QwenEditPerfReport", "QwenEditStepSweep")  # the chart says more than the edit


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture as a square."""
    return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def split(before: Image.Image, after: Image.Image) -> Image.Image:
    """The left half of the source beside the right half of the result."""
    card, edited = square(before, SIDE), square(after, SIDE)
    card.paste(edited.crop((SIDE // 2, 0, SIDE, SIDE)), (SIDE // 2, 0))
    card.paste("white", (SIDE // 2 - GAP // 2, 0, SIDE // 2 + GAP // 2, SIDE))
    return card


def rows(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """The sources in a row above the results."""
    side = (SIDE - GAP) // max(2, len(before), len(after))
    card = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    top = (SIDE - 2 * side - GAP) // 2
    for number, pictures in enumerate((before, after)):
        left = (SIDE - len(pictures) * side - (len(pictures) - 1) * GAP) // 2
        for index, picture in enumerate(pictures):
            card.paste(square(picture, side), (left + index * (side + GAP), top + number * (side + GAP)))
    return card


def top(chart: Image.Image) -> Image.Image:
    """The upper part of a chart."""
    return chart.crop((0, 0, chart.width, chart.width)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def jpeg(card: Image.Image, most: int = MAX_BYTES) -> bytes:
    """The card as JPEG of at most `most` bytes."""
    for quality in range(88, 30, -6):
        file = io.BytesIO()
        card.save(file, "JPEG", quality=quality, optimize=True, progressive=True)
        if file.tell() <= most:
            break
    return file.getvalue()


def with_demo_model(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with the demo model in place of the files that ComfyUI's own loaders name, which no machine has by
    itself, and without the scaling to 1 megapixel, which that model was not trained for."""
    outputs = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
    loaders = {name: outputs[node["class_type"]] for name, node in workflow.items() if node["class_type"] in outputs}
    if not loaders:
        return workflow
    moved: dict[str, list[Any]] = {name: ["demo", output] for name, output in loaders.items()}
    for name in nodes_of(workflow, "FluxKontextImageScale"):
        moved[name] = workflow[name]["inputs"]["image"]
    demo = json.loads((WORKFLOWS / "api" / "single_edit.json").read_text(encoding="utf-8"))["1"]
    kept = {name: node for name, node in workflow.items() if name not in moved}
    for name, node in kept.items():
        inputs = {
            key: moved.get(value[0], value) if isinstance(value, list) else value
            for key, value in node["inputs"].items()
        }
        kept[name] = node | {"inputs": inputs}
    for name in nodes_of(kept, "TextEncodeQwenImageEditPlus"):
        # with a VAE it would scale its reference to 1 megapixel
        kept[f"{name}_text"] = kept[name]
        del kept[name]["inputs"]["vae"]
        latent = [nodes_of(kept, "VAEEncode")[0], 0]
        kept[name] = {
            "class_type": "ReferenceLatent",
            "inputs": {"conditioning": [f"{name}_text", 0], "latent": latent},
        }
    return kept | {"demo": demo}


def make(client: ComfyClient, workflow: dict[str, Any]) -> Image.Image:
    """Run one workflow and put its sources and results on a card."""
    names = [workflow[node]["inputs"]["image"] for node in nodes_of(workflow, "LoadImage")]
    folder = ""
    for node in nodes_of(workflow, "QwenEditBatch"):
        names, folder = BATCH, "thumbnails"
        workflow[node]["inputs"] |= {"source": folder, "output": f"{folder}/{uuid.uuid4().hex}"}
    for name in names:
        client.upload(EXAMPLES / name, subfolder=folder)
    before = [Image.open(EXAMPLES / name).convert("RGB") for name in names]
    result = client.run(workflow)
    charts = [node for kind in CHARTS for node in nodes_of(workflow, kind)]
    if charts:
        drawn = next(image for image in result.images(type=None) if image.node == charts[0])
        return top(Image.open(io.BytesIO(client.download(drawn))).convert("RGB"))
    after = [Image.open(io.BytesIO(client.download(image))) for image in result.images(type=None)]
    return split(before[0], after[0]) if len(before) == len(after) == 1 else rows(before, after)


def main() -> int:
    """Make all thumbnails, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=WORKFLOWS, metavar="PATH", help="a folder (default: %(default)s)"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    options = parser.parse_args()
    names = options.names or sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    with ComfyClient(options.server) as client:
        for name in names:
            workflow = with_demo_model(json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")))
            path = options.output / f"{name}.jpg"
            write_atomically(path, jpeg(make(client, workflow)))
            say(f"Wrote {path} ({path.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    run_as_script(main, ComfyError)
