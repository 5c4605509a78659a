"""Whether a server that changes models and LoRAs all day grows, and whether each edit stays what it was.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/alternating.py [--edits 200] [--side 128] [--steps 4] [--card]

One real server, the demo model. Each edit takes another model than the one before (two loaders of ours in different
precisions, one of them behind ComfyUI's KSampler) and another LoRA (none, one, the other, both; by our switch, or by
ComfyUI's loader); every 20th edit comes after ``/free``. Encoding and sampling run anew each time. Printed: resident
memory, open files and threads of the server, their slope after the first 50 edits (least squares), and how many pictures
differ from the first of their kind. With ``--card`` it runs there, and the card's memory is told too, after each edit and
after each ``/free``.
"""

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from array_client import ArrayClient
from comfy_host import Host
from comfy_server import ComfyServer
from environment import environment, keep
from full_size import picture
from graphs import Graph, edit_graph, loader, node

LORAS = ("qwen_edit_demo_pencil_sketch.safetensors", "qwen_edit_demo_warm_film.safetensors")
STACKS = {"none": (), "one": LORAS[:1], "other": LORAS[1:], "both": LORAS}
MODELS = ("fp32", "int8", "fp32, KSampler")
SETTLED = 50  # edits after which memory should be level
FREE_EVERY = 20
FREED_AFTER_S = 2
COLOURS = ("black and white", "sepia")  # neighbours are encoded anew


def kinds() -> Iterator[tuple[str, str, bool]]:
    """Model, LoRA stack, and whether ComfyUI's own loader applies it, without end; neighbours differ in both."""
    for turn, (stack, model) in enumerate(itertools.cycle(itertools.product(STACKS, MODELS))):
        yield model, stack, model.startswith("fp32") and turn % 2 == 1


def graph(kind: tuple[str, str, bool], images: list[str], prompt: str, steps: int) -> Graph:
    model, stack, native_lora = kind
    made = edit_graph(images, prompt, preset="custom", seed=5, steps=steps, true_cfg_scale=1.0)
    made["loader"] = loader(precision=model.split(",")[0])
    last = "loader"
    if native_lora:
        for name in STACKS[stack]:
            made[name] = node("LoraLoaderModelOnly", model=[last, 0], lora_name=name, strength_model=1.0)
            last = name
    elif STACKS[stack]:
        names = [*STACKS[stack], *["none"] * 4][:4]
        inputs: dict[str, Any] = {f"lora_{slot}": name for slot, name in enumerate(names, 1)}
        made["switch"] = node(
            "QwenEditLoraSwitch", model=[last, 0], **inputs, **{f"strength_{s}": 1.0 for s in range(1, 5)}
        )
        last = "switch"
    if "KSampler" in model:
        conditioning = {"positive": ["encode", 0], "negative": ["encode", 1], "latent_image": ["encode", 2]}
        euler = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        made["sampler"] = node("KSampler", model=[last, 0], seed=5, steps=steps, cfg=1.0, **conditioning, **euler)
    else:
        made["sampler"]["inputs"]["model"] = [last, 0]
    return made


def state(pid: int, client: ArrayClient, card: bool) -> dict[str, float]:
    """Resident memory in MiB, open files and threads; what is in use on the card in MiB, and what torch has reserved."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {
        "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }
    if card:
        (device, *_) = client.get("/system_stats")["devices"]
        found["card_mib"] = (device["vram_total"] - device["vram_free"]) / 2**20
        found["card_reserved_mib"] = device["torch_vram_total"] / 2**20
    return found


def run(client: ArrayClient, server: ComfyServer, options: argparse.Namespace) -> dict[str, Any]:
    first: dict[tuple, np.ndarray] = {}
    states, after_free, different = [], [], 0
    image = client.upload_array(picture(3, options.side))
    for number, kind in zip(range(options.edits), kinds(), strict=False):
        if number % FREE_EVERY == FREE_EVERY - 1:
            client.free()
            if options.card:
                time.sleep(FREED_AFTER_S)
                after_free.append(state(server.pid, client, True))
        # the one before had another graph, so nothing of this edit is still in ComfyUI's cache but the loader's outputs
        (made,) = client.pictures(graph(kind, [image], f"make it {COLOURS[number % len(COLOURS)]}", options.steps))
        different += not np.array_equal(first.setdefault((*kind, number % len(COLOURS)), made), made)
        states.append(state(server.pid, client, options.card))
        if number % 10 == 9:
            print(f"{number + 1} edits:", {k: round(v, 1) for k, v in states[-1].items()}, flush=True)
    settled = states[min(SETTLED, len(states) // 2) :]
    slopes = {
        f"{name} per edit": round(float(np.polyfit(range(len(settled)), [s[name] for s in settled], 1)[0]), 4)
        for name in settled[0]
    }
    return {"edits": options.edits, "kinds": len(first), "pictures that changed": different, "slopes": slopes} | {
        "after the first": states[0],
        "after settling": settled[0],
        "last": states[-1],
        "each": states,
        "each after /free": after_free,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--card", action="store_true", help="on the card instead of the CPU")
    parser.add_argument("--name", default="alternating")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    host = Host(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]).resolve())
    with tempfile.TemporaryDirectory() as work:
        loras = Path(work, "models", "loras")
        loras.mkdir(parents=True)
        for name in LORAS:
            shutil.copy(REPO / "demo_model" / "loras" / name, loras)
        paths = Path(work, "paths.json")
        paths.write_text(f'{{"alternating": {{"base_path": "{work}/models", "loras": "loras"}}}}')
        extra = ["--extra-model-paths-config", str(paths)]
        server = ComfyServer(host, Path(work, "server"), extra, cpu=not options.card)
        with server, ArrayClient(server.url) as client:
            result = run(client, server, options)
    print({name: value for name, value in result.items() if not name.startswith("each")})
    print(
        f"Wrote {keep(options.name, {'benchmark': 'alternating', 'environment': environment()} | result, options.results)}"
    )


if __name__ == "__main__":
    main()
