"""One edit at full size through ComfyUI's API: this pack beside ComfyUI's own nodes, same weights files, same server.

    python benchmarks/random_weights.py MODELS --comfyui PATH
    python benchmarks/full_size.py --comfyui PATH --models MODELS [--name NAME]

Every edit has a new picture and a new prompt, so nothing is cached but the weights. "Lightning 4" runs without a
LoRA: 4 steps without guidance, as a checkpoint with Lightning fused does. The first edit of each engine includes
reading the weights ("cold"). Both graphs hold a QwenEditPerfLogger, whose record gives stages and steps.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from array_client import ArrayClient
from comfy_host import Host
from comfy_server import ComfyServer
from environment import environment, keep
from graphs import node

from qwen_edit.perf import read_records, stage_table

PACK, NATIVE = "qwen edit fast", "comfyui native"
PRESETS = {"standard": (40, 4.0), "Lightning 4": (4, 1.0)}


def picture(number: int, side: int) -> np.ndarray:
    """A new picture for each edit: smooth colour waves, ``[side, side, 3]`` in [0, 1]."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin((3 + number) * x + c) * np.cos((5 + number) * y - c) for c in range(3)]
    return np.stack(waves, axis=-1) / 2 + 0.5


def pack_graph(image: str, prompt: str, preset: str, steps: int, side: int, files: dict[str, str]) -> dict[str, Any]:
    del side  # the picture's own
    encode = {"clip": ["load", 1], "vae": ["load", 2], "prompt": prompt, "negative": " ", "width": 0, "height": 0}
    inputs = {"positive": ["encode", 0], "negative": ["encode", 1], "latent": ["encode", 2]}
    overrides = {"steps": steps, "true_cfg_scale": 0.0, "shift": 0.0}
    return {
        "image": node("LoadImage", image=image),
        "load": node(
            "QwenEditLoader",
            model=files["diffusion_models"],
            text_encoder=files["text_encoders"],
            vae=files["vae"],
            profile="auto",
            precision="auto",
            attention="auto",
            offload="auto",
            model_version="auto",
        ),
        "encode": node(
            "QwenEditEncode", **encode, reference_size="output grid", **{"pictures.picture_1": ["image", 0]}
        ),
        "sample": node("QwenEditSampler", model=["load", 0], **inputs, preset=preset, seed=1, **overrides),
        **after_sampling(["sample", 0], ["load", 2]),
    }


def native_graph(image: str, prompt: str, preset: str, steps: int, side: int, files: dict[str, str]) -> dict[str, Any]:
    """ComfyUI's own template for 2511, at the same number of steps and guidance."""
    encode = {"clip": ["clip", 0], "vae": ["vae", 0], "image1": ["image", 0]}
    sampler = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "seed": 1}
    conditioning = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    return {
        "image": node("LoadImage", image=image),
        "unet": node("UNETLoader", unet_name=files["diffusion_models"], weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name=files["text_encoders"], type="qwen_image", device="default"),
        "vae": node("VAELoader", vae_name=files["vae"]),
        "positive": node("TextEncodeQwenImageEditPlus", prompt=prompt, **encode),
        "negative": node("TextEncodeQwenImageEditPlus", prompt=" ", **encode),
        "shift": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1),
        "norm": node("CFGNorm", model=["shift", 0], strength=1.0),
        "latent": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        "sample": node(
            "KSampler",
            model=["norm", 0],
            steps=steps or PRESETS[preset][0],
            cfg=PRESETS[preset][1],
            **conditioning,
            **sampler,
        ),
        **after_sampling(["sample", 0], ["vae", 0]),
    }


def after_sampling(latent: list, vae: list) -> dict[str, Any]:
    return {
        "decode": node("VAEDecode", samples=latent, vae=vae),
        "log": node("QwenEditPerfLogger", value=["decode", 0], label="edit"),
        "save": node("SaveImage", images=["log", 0], filename_prefix="full_size"),
    }


def measure(client: ArrayClient, server: ComfyServer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All edits, one engine after the other. Times in seconds, from queueing to the finished prompt."""
    files = {kind: f"random_{kind}.safetensors" for kind in ("diffusion_models", "text_encoders", "vae")}
    plan = ["Lightning 4", *["Lightning 4"] * options.repeat, *["standard"] * options.standard_repeat]
    runs, number = [], 0
    for engine, graph in ((PACK, pack_graph), (NATIVE, native_graph)):
        for index, preset in enumerate(plan):
            number += 1
            image = client.upload_array(picture(number, options.side))
            workflow = graph(image, f"change the colours, variant {number}", preset, options.steps, options.side, files)
            start = time.perf_counter()
            prompt_id = client.queue(workflow)
            client.wait(prompt_id, timeout_s=options.timeout)
            seconds = time.perf_counter() - start
            record = perf_record(server, prompt_id)
            runs.append(
                {"engine": engine, "preset": preset, "cold": index == 0, "seconds": round(seconds, 3), "record": record}
            )
            print(f"{engine}, {preset}{', cold' if index == 0 else ''}: {seconds:.2f} s", flush=True)
            if index in (0, 1) or preset == "standard":
                print(stage_table(record), flush=True)
        client.free()
    return runs


def perf_record(server: ComfyServer, prompt_id: str) -> dict[str, Any]:
    """The performance log's line of one prompt; it is written just after the prompt ends."""
    for _ in range(100):
        for record in read_records(server.output / "qwen_edit_perf" / "perf.jsonl"):
            if record["prompt_id"] == prompt_id:
                return record
        time.sleep(0.1)
    raise RuntimeError(f"The performance log has no line for {prompt_id}.")


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of the warm edits, and the pack's times as a share of ComfyUI's."""
    rows = []
    for preset in PRESETS:
        medians = {}
        for engine in (PACK, NATIVE):
            warm = [r for r in runs if (r["engine"], r["preset"], r["cold"]) == (engine, preset, False)]
            if warm:
                medians[engine] = statistics.median(r["seconds"] for r in warm)
        if medians:
            ratio = medians[PACK] / medians[NATIVE] if len(medians) == 2 else None
            rows.append({"preset": preset, "seconds": medians, "pack_over_native": ratio and round(ratio, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="the folder that random_weights.py filled")
    parser.add_argument("--name", default="full_size", help="of the result file")
    parser.add_argument("--results", type=Path, help="folder for it (default: benchmarks/results)")
    parser.add_argument("--side", type=int, default=1024, help="pixels of picture and result")
    parser.add_argument("--steps", type=int, default=0, help="instead of the preset's, for a quick try")
    parser.add_argument("--repeat", type=int, default=3, help="warm edits with Lightning 4")
    parser.add_argument("--standard-repeat", type=int, default=1, help="warm edits with standard")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--front-end-root", type=Path, help="for a ComfyUI without its front end package")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        paths = Path(work, "models.yaml")
        kinds = {kind: kind for kind in ("diffusion_models", "text_encoders", "vae")}
        paths.write_text(json.dumps({"random": {"base_path": str(options.models.resolve())} | kinds}))
        extra = ["--extra-model-paths-config", str(paths)]
        if options.front_end_root:
            extra += ["--front-end-root", str(options.front_end_root)]
        host = Host(Path(sys.executable), options.comfyui.resolve())
        server = ComfyServer(host, Path(work, "server"), extra, cpu=options.cpu)
        try:
            with server, ArrayClient(server.url) as client:
                runs = measure(client, server, options)
        except BaseException:
            print(server.log_tail(60), file=sys.stderr)
            raise
    result = {
        "benchmark": "full_size",
        "environment": environment(),
        "side": options.side,
        "summary": summary(runs),
        "runs": runs,
    }
    print(json.dumps(result["summary"], indent=1))
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
