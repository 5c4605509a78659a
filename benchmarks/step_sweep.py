"""Quality against time over numbers of steps, measured by QwenEditStepSweep in a real ComfyUI.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/step_sweep.py [--sweep 4,8,12,20,40] [--cpu]
    python benchmarks/step_sweep.py --server http://127.0.0.1:8188 --model NAME --side 1024 --name step_sweep_h100
    python benchmarks/step_sweep.py --server http://127.0.0.1:8188 --model NAME --image mine.png --prompt "paint the wall green"

Without --server: a ComfyUI of its own. Every photograph (none of which the demo model was trained on) with every instruction;
the medians over all are drawn as results/NAME.png. `one_answer` instructions have one exact result, which few steps reach;
`many_answers` leave something to the model. With --image and --prompt: that edit alone, at the picture's own size. Seconds are sampling
alone, warm.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from array_client import ArrayClient
from comfy_host import Host
from comfy_server import ComfyServer
from environment import RESULTS, environment, keep
from graphs import DEMO, loader, node

from qwen_edit.sweep import Outcome, find_knee, sweep_table
from qwen_edit.sweep_chart import draw_sweep
from training.data import HELD_OUT, held_out_photograph

INSTRUCTIONS = {
    "one_answer": ("make it black and white", "invert the colours"),
    "many_answers": ("paint a random shape somewhere", "colourise the black and white photo"),
}


def sweep_graph(image: str, prompt: str, options: argparse.Namespace) -> dict[str, Any]:
    """One sweep; its numbers are in what the node "sweep" reports."""
    encode = {"clip": ["loader", 1], "vae": ["loader", 2], "prompt": prompt, "negative": " ", "width": 0, "height": 0}
    return {
        "loader": loader(model=options.model, precision=options.precision),
        "picture": node("LoadImage", image=image),
        "encode": node(
            "QwenEditEncode", **encode, reference_size="output grid", **{"pictures.picture_1": ["picture", 0]}
        ),
        "sweep": node(
            "QwenEditStepSweep",
            model=["loader", 0],
            positive=["encode", 0],
            negative=["encode", 1],
            latent=["encode", 2],
            vae=["loader", 2],
            sweep=options.sweep,
            preset=options.preset,
            seed=1,
            true_cfg_scale=0.0,
            shift=0.0,
        ),
    }


def photograph(name: str, prompt: str, side: int) -> np.ndarray:
    """[side, side, 3], uint8; grey where colour is asked for."""
    picture = held_out_photograph(name, side, side)
    if "black and white photo" in prompt:
        picture = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))
    return picture


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Kind, the picture's name, prompt and picture of each sweep."""
    if options.image is not None:
        yield "own", options.image.name, options.prompt, np.asarray(Image.open(options.image).convert("RGB"))
        return
    for kind, prompts in INSTRUCTIONS.items():
        for prompt in prompts:
            for name in HELD_OUT[: options.photographs]:
                yield kind, name, prompt, photograph(name, prompt, options.side)


def medians(sweeps: list[dict[str, Any]]) -> list[Outcome]:
    """Of each point over all sweeps; a point that failed anywhere counts as failed."""
    combined = []
    for points in zip(*(sweep["points"] for sweep in sweeps), strict=True):
        first = points[0]
        error = next((point["error"] for point in points if point["error"]), None)
        middle = {}
        for key in ("seconds", "psnr_db", "ssim"):
            values = [point[key] for point in points if point[key] is not None]
            if key == "psnr_db" and not values and first["ssim"] == 1:
                values = [math.inf]
            middle[key] = round(statistics.median(values), 4) if values and error is None else None
        combined.append(Outcome(first["label"], first["steps"], first["true_cfg_scale"], **middle, error=error))
    return combined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="a running ComfyUI with this pack, instead of one of its own")
    parser.add_argument("--model", default=DEMO, help="as the loader names it (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="of the loader (default: %(default)s)")
    parser.add_argument("--sweep", default="4,8,12,20,40")
    parser.add_argument("--preset", default="standard", help="what the numbers are steps of")
    parser.add_argument("--image", type=Path, help="a picture of one's own, with --prompt, instead of the photographs")
    parser.add_argument("--prompt", help="what to change in --image")
    parser.add_argument("--side", type=int, default=256, help="pixels of the photographs")
    parser.add_argument("--photographs", type=int, default=len(HELD_OUT))
    parser.add_argument("--name", default="step_sweep")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--cpu", action="store_true", help="for the server of its own")
    options = parser.parse_args()
    if (options.image is None) != (options.prompt is None):
        parser.error("--image and --prompt go together")
    runs = []
    with ExitStack() as stack:
        if options.server is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            host = Host(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]))
            url = stack.enter_context(ComfyServer(host, work, cpu=options.cpu)).url
        else:
            url = options.server
        client = stack.enter_context(ArrayClient(url))
        for kind, name, prompt, picture in cases(options):
            image = client.upload_array(picture)
            result = client.run(sweep_graph(image, prompt, options), timeout_s=3600)
            told = json.loads(result.outputs["sweep"]["sweep"][0])
            runs.append({"kind": kind, "photograph": name, "prompt": prompt, **told})
            print(f"{name}, {prompt}: knee {told['knee']}", flush=True)
    reference = runs[0]["reference"]
    result = {"benchmark": "step_sweep", "environment": environment(), "model": options.model}
    result |= {"side": options.side} if options.image is None else {}
    for kind in ("own",) if options.image is not None else (*INSTRUCTIONS, "all"):
        outcomes = medians([run for run in runs if kind in (run["kind"], "all")])
        knee = find_knee(outcomes, reference)
        print(f"\n{kind}, median of {len([run for run in runs if kind in (run['kind'], 'all')])}")
        print(sweep_table(outcomes, reference, knee))
        rows = [vars(one) | ({"psnr_db": None} if one.psnr_db == math.inf else {}) for one in outcomes]
        result[kind] = {"points": rows, "reference": reference, "knee": knee}
        if kind in ("many_answers", "own"):
            folder = options.results or RESULTS
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_sweep(outcomes, reference, knee)).save(folder / f"{options.name}.png")
    print(f"Wrote {keep(options.name, result | {'runs': runs}, options.results)}")


if __name__ == "__main__":
    main()
