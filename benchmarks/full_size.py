"""One edit at full size through ComfyUI's API: this pack beside ComfyUI's own nodes, same weights, same server.

    python benchmarks/random_weights.py MODELS --comfyui PATH
    python benchmarks/full_size.py --comfyui PATH --models MODELS [--engines "pack fp8,native fp8"] [--name NAME]
        [--text-encoder FILE] [--twice] [--budget SECONDS]

Engines: "pack", this pack, in bf16, and in fp8, int8, w4a8 and w4a4 quantized from the same bf16 file, or with a file in
int8_convrot, Q8_0 or Q4_K; "native", ComfyUI's own nodes with the bf16 file, one in the form of the official fp8mixed, or in
int8_convrot; "accelerate", these with QwenEditAccelerate. Every edit has a new picture and a new prompt, so nothing is
cached but the weights. "Lightning 4" runs 4 steps without guidance, as a checkpoint with Lightning fused does; "with LoRA" adds
one of rank 64 on every linear of the blocks by the pack's switch ("fused": in the weights, by its mode) or ComfyUI's loader; "with LoRA
switch" by the switch after QwenEditAccelerate; "references kept" is QwenEditReferenceCache with a tolerance of 0.1. The first edit of each engine includes reading the weights ("cold"), the second
shows what is left to warm up. All graphs hold a QwenEditPerfLogger, whose record gives stages and steps.

``--twice`` runs the pack's first edit again at the end, with models and caches forgotten, and compares the pictures bit by
bit. What ``--budget`` leaves no time for is skipped; the result is written after each engine.
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
from comfy_client import ExecutionFailed, PromptRejected, Result
from comfy_host import Host
from comfy_server import ComfyServer
from environment import environment, keep
from graphs import node

from qwen_edit.perf import read_records, stage_table

ENGINES = ("pack bf16", "pack fp8", "native bf16", "native fp8", "accelerate bf16", "accelerate fp8")
PRESETS = {"standard": (40, 4.0), "Lightning 4": (4, 1.0)}
WITH_LORA = ", with LoRA"
FUSED = ", fused"  # the LoRA in the weights
CACHED = ", references kept"  # QwenEditReferenceCache
TOLERANCE = 0.1
SWITCH = " switch"  # by QwenEditLoraSwitch where there is also ComfyUI's loader
FUSIBLE = ("bf16", "fp8", "int8")
BF16_FILE = "random_diffusion_models.safetensors"
# Files that are quantized already; the pack runs them as they are stored.
PACK_FILES = {"int8_convrot": "random_int8_convrot.safetensors", "Q8_0": "random_Q8_0.gguf", "Q4_K": "random_Q4_K.gguf"}
NATIVE_FILES = {"bf16": BF16_FILE, "fp8": "random_fp8.safetensors", "int8_convrot": "random_int8_convrot.safetensors"}
LORA = "random_rank64.safetensors"
SLOTS = 4  # of QwenEditLoraSwitch


def picture(number: int, side: int) -> np.ndarray:
    """A new picture for each edit: smooth colour waves, ``[side, side, 3]`` in [0, 1]."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin((3 + number) * x + c) * np.cos((5 + number) * y - c) for c in range(3)]
    return np.stack(waves, axis=-1) / 2 + 0.5


def graph(engine: str, image: str, prompt: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    kind, precision = engine.split()
    preset, _, how = case.removesuffix(CACHED).partition(WITH_LORA)
    make = pack_graph if kind == "pack" else native_graph
    workflow = make(image, prompt, preset, precision, options)
    model = {"pack": "load", "native": "unet", "accelerate": "unet"}[kind]
    with_lora, by_switch = WITH_LORA in case, kind == "pack" or how == SWITCH
    if with_lora and not by_switch:
        workflow["lora"] = node("LoraLoaderModelOnly", model=[model, 0], lora_name=LORA, strength_model=1.0)
        model = "lora"
    if kind == "accelerate":
        workflow["accelerate"] = node("QwenEditAccelerate", model=[model, 0], attention="auto")
        model = "accelerate"
    if with_lora and by_switch:
        switch: dict[str, Any] = {"mode": "fused" if how == FUSED else "auto"}
        switch |= {f"strength_{slot}": 1.0 for slot in range(1, SLOTS + 1)}
        switch |= {f"lora_{slot}": LORA if slot == 1 else "none" for slot in range(1, SLOTS + 1)}
        workflow["lora"] = node("QwenEditLoraSwitch", model=[model, 0], **switch)
        model = "lora"
    if case.endswith(CACHED):
        workflow["cache"] = node("QwenEditReferenceCache", model=[model, 0], tolerance=TOLERANCE)
        model = "cache"
    workflow["sample" if kind == "pack" else "shift"]["inputs"]["model"] = [model, 0]
    return workflow


def pack_graph(image: str, prompt: str, preset: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    encode = {"clip": ["load", 1], "vae": ["load", 2], "prompt": prompt, "negative": " ", "width": 0, "height": 0}
    inputs = {"positive": ["encode", 0], "negative": ["encode", 1], "latent": ["encode", 2]}
    overrides = {"steps": options.steps, "true_cfg_scale": 0.0, "shift": 0.0}
    return {
        "image": node("LoadImage", image=image),
        "load": node(
            "QwenEditLoader",
            model=PACK_FILES.get(precision, BF16_FILE),
            text_encoder=options.text_encoder,
            vae="random_vae.safetensors",
            profile="auto",
            precision="auto" if precision in PACK_FILES else precision,
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


def native_graph(image: str, prompt: str, preset: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """ComfyUI's own template for 2511, at the same number of steps and guidance."""
    encode = {"clip": ["clip", 0], "vae": ["vae", 0], "image1": ["image", 0]}
    sampler = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "seed": 1}
    conditioning = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    return {
        "image": node("LoadImage", image=image),
        "unet": node("UNETLoader", unet_name=NATIVE_FILES[precision], weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name=options.text_encoder, type="qwen_image", device="default"),
        "vae": node("VAELoader", vae_name="random_vae.safetensors"),
        "positive": node("TextEncodeQwenImageEditPlus", prompt=prompt, **encode),
        "negative": node("TextEncodeQwenImageEditPlus", prompt=" ", **encode),
        "shift": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1),
        "norm": node("CFGNorm", model=["shift", 0], strength=1.0),
        "latent": node("EmptySD3LatentImage", width=options.side, height=options.side, batch_size=1),
        "sample": node(
            "KSampler",
            model=["norm", 0],
            steps=options.steps or PRESETS[preset][0],
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


def cases(engine: str, options: argparse.Namespace) -> list[str]:
    """What an engine runs, in this order."""
    kind, precision = engine.split()
    quick = "Lightning 4"
    plan = [quick] * (1 + options.repeat)
    if kind != "accelerate" or options.accelerate_standard:
        plan += ["standard"] * options.standard_repeat
        plan += ["standard" + CACHED] * (options.standard_repeat if kind != "native" else 0)
    ways = [WITH_LORA]
    if kind == "pack" and precision in FUSIBLE:  # ComfyUI's loader puts a LoRA into the weights at all times
        ways.append(WITH_LORA + FUSED)
    if kind == "accelerate":
        ways.append(WITH_LORA + SWITCH)
    for way in ways if options.lora_repeat else ():
        plan += [quick + way] * (options.lora_repeat + 1)
    return plan


def measure(client: ArrayClient, server: ComfyServer, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Add all edits to ``result``, one engine after the other. Times in seconds, from queueing to the finished prompt."""
    begin, number, first = time.perf_counter(), 0, None
    for engine in options.engines.split(","):
        seen: set[str] = set()
        for case in cases(engine, options):
            if options.budget and time.perf_counter() - begin > options.budget:
                result["skipped"].append(f"{engine}, {case}")
                continue
            number += 1
            image = client.upload_array(picture(number, options.side))
            workflow = graph(engine, image, f"change the colours, variant {number}", case, options)
            start = time.perf_counter()
            try:
                prompt_id = client.queue(workflow)
                finished = client.wait(prompt_id, timeout_s=options.timeout)
            except (ExecutionFailed, PromptRejected) as e:  # the other engines may run
                result["failed"][f"{engine}, {case}"] = str(e)
                print(f"{engine}, {case}: {e}", flush=True)
                break
            seconds = time.perf_counter() - start
            record = perf_record(server, prompt_id)
            if first is None and engine.startswith("pack"):
                first = workflow, finished
            # the first edit reads weights, the first with a LoRA reads that
            cold = not seen or (WITH_LORA in case and case not in seen)
            seen.add(case)
            runs = result["runs"]
            runs.append(
                {"engine": engine, "preset": case, "cold": cold, "seconds": round(seconds, 3), "record": record}
            )
            print(f"{engine}, {case}{', cold' if cold else ''}: {seconds:.2f} s", flush=True)
            if len(seen) > 1 or cold or len(runs) % 2 == 0:
                print(stage_table(record), flush=True)
        client.free()
        save(options, result)
    if result["skipped"]:
        print(f"No time was left for {', '.join(dict.fromkeys(result['skipped']))}.", flush=True)
    if options.twice and first is not None:
        result["twice: the same bits"] = again(client, *first, options)


def again(client: ArrayClient, workflow: dict[str, Any], before: Result, options: argparse.Namespace) -> bool:
    """Whether an edit that ran before gives the same picture with everything loaded anew."""
    while True:  # ComfyUI's worker can sleep through /free, and then answers from its cache
        client.free()
        time.sleep(2)
        after = client.run(workflow, timeout_s=options.timeout)
        if after.images() != before.images():
            return all(map(np.array_equal, client.arrays(before), client.arrays(after)))


def save(options: argparse.Namespace, result: dict[str, Any]) -> Path:
    result["summary"] = summary(result["runs"])
    return keep(options.name, result, options.results)


def perf_record(server: ComfyServer, prompt_id: str) -> dict[str, Any]:
    """The performance log's line of one prompt; it is written just after the prompt ends."""
    for _ in range(100):
        for record in read_records(server.output / "qwen_edit_perf" / "perf.jsonl"):
            if record["prompt_id"] == prompt_id:
                return record
        time.sleep(0.1)
    raise RuntimeError(f"The performance log has no line for {prompt_id}.")


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of the warm edits, the first edit, and each as a share of ComfyUI's own nodes in bf16. "decoded" is the time
    until the picture is there: saving it as a PNG is ComfyUI's, takes a quarter of a second, and is the same for all. "each" has all
    edits."""
    rows = []
    for preset in dict.fromkeys(r["preset"] for r in runs):
        for cold in (False, True):
            medians, decoded, each = {}, {}, {}
            for engine in dict.fromkeys(r["engine"] for r in runs):
                found = [r for r in runs if (r["engine"], r["preset"], r["cold"]) == (engine, preset, cold)]
                if found:
                    each[engine] = [r["seconds"] for r in found]
                    medians[engine] = round(statistics.median(r["seconds"] for r in found), 3)
                    decoded[engine] = round(statistics.median(map(until_decoded, found)), 3)
            base = medians.get("native bf16")
            shares = {engine: round(seconds / base, 3) for engine, seconds in medians.items()} if base else {}
            if medians:
                row = {"preset": preset, "cold": cold, "seconds": medians, "decoded": decoded}
                rows.append(row | {"over native bf16": shares, "each": each})
    return rows


def until_decoded(run: dict[str, Any]) -> float:
    return run["seconds"] - run["record"]["stages"]["save"]["ms"] / 1000


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
    parser.add_argument("--lora-repeat", type=int, default=2, help="warm edits with Lightning 4 and a LoRA")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--accelerate-standard", action="store_true", help="standard also with QwenEditAccelerate")
    parser.add_argument("--text-encoder", default="random_text_encoders.safetensors", help="file for all engines")
    parser.add_argument("--twice", action="store_true", help="the pack's first edit again at the end: the same bits?")
    parser.add_argument("--budget", type=float, default=0, help="seconds after which no edit begins; 0: no end")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--front-end-root", type=Path, help="for a ComfyUI without its front end package")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "full_size", "environment": environment(), "side": options.side}
    result |= {"text encoder": options.text_encoder, "skipped": [], "failed": {}, "summary": [], "runs": []}
    with tempfile.TemporaryDirectory() as work:
        paths = Path(work, "models.yaml")
        kinds = {kind: kind for kind in ("diffusion_models", "text_encoders", "vae", "loras")}
        paths.write_text(json.dumps({"random": {"base_path": str(options.models.resolve())} | kinds}))
        extra = ["--extra-model-paths-config", str(paths)]
        if options.front_end_root:
            extra += ["--front-end-root", str(options.front_end_root)]
        host = Host(Path(sys.executable), options.comfyui.resolve())
        server = ComfyServer(host, Path(work, "server"), extra, cpu=options.cpu)
        try:
            with server, ArrayClient(server.url) as client:
                measure(client, server, options, result)
                print("\n".join(line for line in server.log_tail(400).splitlines() if "Qwen Edit Fast" in line))
        except Exception as e:  # what was measured until then is kept
            print(server.log_tail(60), file=sys.stderr)
            print(f"Stopped after {len(result['runs'])} edits: {e!r}", file=sys.stderr)
    path = save(options, result)
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
