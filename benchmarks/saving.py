"""How long saving a picture takes: ComfyUI's Save Image (PNG) beside Qwen Edit Save (lossless WebP), through one server.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/saving.py [--side 1024] [--repeat 9] [--name NAME]

The picture is a photograph enlarged to ``--side``, another cut of it each time, so that nothing is cached. Milliseconds are medians of
what the performance log says of each node, MB (10^6 bytes) of the files; every WebP is compared with its PNG pixel by
pixel.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from array_client import ArrayClient, from_file
from comfy_host import Host
from comfy_server import ComfyServer
from environment import environment, keep
from full_size import perf_record
from graphs import node

PHOTOGRAPH = REPO / "training" / "pictures" / "raccoon.jpg"
NODES = {"SaveImage": {}, "QwenEditSave": {"format": "webp, lossless"}}


def cut(number: int, side: int) -> np.ndarray:
    """The photograph without its outermost ``number`` pixels, ``[side, side, 3]`` in uint8."""
    photograph = Image.open(PHOTOGRAPH).convert("RGB")
    edge = min(photograph.size) - 2 * number
    square = photograph.crop((number, number, number + edge, number + edge))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--name", default="saving_cpu", help="of the result file")
    options = parser.parse_args()
    ms, mb = ({name: [] for name in NODES} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]))
        with ComfyServer(host, Path(folder), cpu=True) as server, ArrayClient(server.url) as client:
            for number in range(options.repeat + 1):
                graph = {
                    "load": node("LoadImage", image=client.upload_array(cut(number, options.side))),
                    "log": node("QwenEditPerfLogger", value=["load", 0], label="loaded"),
                }
                for name, more in NODES.items():
                    graph[name] = node(name, images=["log", 0], filename_prefix=name, **more)
                prompt_id = client.queue(graph)
                result = client.wait(prompt_id, timeout_s=120)
                files = {image.node: client.download(image) for image in result.images()}
                png, webp = (from_file(files[name]) for name in NODES)
                assert np.array_equal(png, webp), "the WebP holds other pixels than the PNG"
                if number:  # the first imports what the others have
                    for one in perf_record(server, prompt_id)["nodes"]:
                        if one["id"] in NODES:
                            ms[one["id"]].append(one["ms"])
                            mb[one["id"]].append(len(files[one["id"]]) / 1e6)
    rows = {
        name: {
            "ms": round(statistics.median(ms[name]), 1),
            "MB": round(statistics.median(mb[name]), 2),
            "each ms": ms[name],
        }
        for name in NODES
    }
    result = {
        "benchmark": "saving",
        "side": options.side,
        "rows": rows,
        "pixels": "equal",
        "environment": environment(),
    }
    print(json.dumps(result, indent=1))
    print(f"Wrote {keep(options.name, result)}")


if __name__ == "__main__":
    main()
