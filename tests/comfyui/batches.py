"""Batches for the server tests: pictures and manifests in the input folder, and graphs that run them."""

import json
from pathlib import Path
from typing import Any

from array_client import to_png
from comfy_client import Result
from comfy_server import ComfyServer
from edits import PROMPT, picture
from graphs import Graph, loader, node


def batch_graph(source: str, output: str, **inputs: Any) -> Graph:
    """A batch over ``source`` with few steps; 64x64 pictures keep their size."""
    settings = {
        "source": source,
        "prompt": PROMPT,
        "negative": " ",
        "preset": "custom",
        "seed": 3,
        "megapixels": 0.0,
        "width": 0,
        "height": 0,
        "reference_size": "output grid",
        "output": output,
        "steps": 2,
        "true_cfg_scale": 0.0,
        "shift": 0.0,
        "wave": 4,
        "together": 0,
    }
    links = {"model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2]}
    return {"loader": loader(), "batch": node("QwenEditBatch", **links, **settings | inputs)}


def put_pictures(server: ComfyServer, folder: str, *names: str, **size: int) -> None:
    """Pictures of ``edits.picture``, the first with seed 0, the second with seed 1 ..."""
    (server.input / folder).mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        (server.input / folder / name).write_bytes(to_png(picture(seed, **size)))


def put_manifest(server: ComfyServer, name: str, *rows: dict[str, Any] | str) -> str:
    """A JSONL manifest; a text stands in it as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path = server.input / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return name


def results(server: ComfyServer, output: str) -> list[Path]:
    """Every file of an output folder."""
    return sorted((server.output / output).iterdir())


def report(result: Result) -> str:
    return "\n".join(result.outputs["batch"]["text"])
