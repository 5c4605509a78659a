"""What ComfyUI around the model costs: one warm edit through the server beside the bare diffusers pipeline.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/overhead.py [--side 256] [--repeat 5]

Both do the same work with the same weights (the demo model), fp32: picture file in, instruction encoded twice (positive,
negative), reference encoded, 40 steps with true CFG 4, decode, PNG out. Every edit has a new picture and prompt,
so that nothing is cached but the weights. The two take turns, and the ratio is taken pair by pair.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from array_client import ArrayClient, to_png
from comfy_host import Host
from comfy_server import ComfyServer
from environment import environment, keep
from full_size import picture
from graphs import edit_graph

from training.pipeline import load_reference_pipeline, reference_area

PROMPTS = ("make it black and white", "invert the colours", "mirror the picture", "make it brighter", "make it darker")


def pipeline_edit(pipeline, png: bytes, prompt: str, side: int) -> None:
    """One edit by diffusers, from the bytes of a PNG to the bytes of a PNG."""
    with reference_area(side * side), torch.inference_mode():
        result = pipeline(
            image=[Image.open(io.BytesIO(png)).convert("RGB")],
            prompt=prompt,
            negative_prompt=" ",
            true_cfg_scale=4.0,
            num_inference_steps=40,
            width=side,
            height=side,
            generator=torch.Generator().manual_seed(1),
        ).images[0]
    result.save(io.BytesIO(), "PNG")


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--name", default="overhead")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    comfyui = Path(os.environ["COMFYUI_PATH"])
    pipeline = load_reference_pipeline(REPO / "demo_model", torch.float32)
    pairs = []
    with tempfile.TemporaryDirectory() as work:
        server = ComfyServer(Host(Path(sys.executable), comfyui), Path(work), cpu=True)
        with server, ArrayClient(server.url) as client:
            for index in range(options.repeat + 1):
                prompt = f"{PROMPTS[index % len(PROMPTS)]} please"
                array = picture(index, options.side)
                graph = edit_graph([client.upload_array(array)], prompt, preset="standard", seed=index)
                png = to_png(np.asarray(array))
                bare = seconds(lambda png=png, prompt=prompt: pipeline_edit(pipeline, png, prompt, options.side))
                served = seconds(lambda graph=graph: client.run(graph))
                if index:  # the first of each reads weights
                    pairs.append(
                        {"pipeline": round(bare, 3), "server": round(served, 3), "ratio": round(served / bare, 4)}
                    )
                    print(pairs[-1], flush=True)
    middle = {key: round(statistics.median(p[key] for p in pairs), 3) for key in ("pipeline", "server", "ratio")}
    result = {
        "benchmark": "overhead",
        "environment": environment(),
        "side": options.side,
        "median": middle,
        "pairs": pairs,
    }
    print(f"median: {middle}")
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
