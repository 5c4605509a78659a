"""What importing the pack adds to ComfyUI's start: seconds, and whether a CUDA context was made.

    python benchmarks/import_time.py --comfyui PATH [--repeat 5] [--cpu]

In a fresh process each: everything that ComfyUI has imported before it loads custom nodes, then the pack with all its nodes,
as ComfyUI does it. Prints JSON; the status is 1 when the median is above LIMIT_S or a context was made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from comfy_host import REPO, HostError, cache_folder, find_comfyui, run_as_script

LIMIT_S = 0.3
INSIDE = """
import asyncio, importlib.util, json, sys, time
pack, arguments = sys.argv[1], sys.argv[2:]
sys.argv[1:] = arguments
import comfy.options
comfy.options.enable_args_parsing()
import torch, nodes, server, comfy.model_management, comfy.sd, comfy_api.latest
async def start():
    server.PromptServer(asyncio.get_running_loop())
    before, cpu, known = time.perf_counter(), time.process_time(), set(sys.modules)
    spec = importlib.util.spec_from_file_location("qwen_edit_fast", pack + "/__init__.py", submodule_search_locations=[pack])
    module = sys.modules["qwen_edit_fast"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = await module.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()
    seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    heavy = sorted({"diffusers", "transformers", "peft", "scipy"} & (set(sys.modules) - known))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "cuda_context": had_context != torch.cuda.is_initialized(), "heavy": heavy}))
had_context = torch.cuda.is_initialized()
asyncio.run(start())
"""


def measure(comfyui: Path, arguments: list[str]) -> dict:
    """One import in a fresh process."""
    command = [sys.executable, "-c", INSIDE, str(REPO), *arguments]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="PATH", help="default: COMFYUI_PATH, else the fetched one")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument("--cpu", action="store_true", help="start ComfyUI with --cpu")
    options = parser.parse_args()
    comfyui = find_comfyui(options.comfyui, cache_folder())
    if comfyui is None:
        raise HostError("Which ComfyUI? Give its folder with --comfyui, or set COMFYUI_PATH.")
    runs = [measure(comfyui, ["--cpu"] * options.cpu) for _ in range(options.repeat)]
    seconds = [run["seconds"] for run in runs]
    result = {
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_least": round(min(seconds), 3),
        "seconds_most": round(max(seconds), 3),
        "cpu_seconds_median": round(statistics.median(run["cpu_seconds"] for run in runs), 3),
        "limit_s": LIMIT_S,
        "cuda_context": any(run["cuda_context"] for run in runs),
        "heavy_imports": sorted({name for run in runs for name in run["heavy"]}),
    }
    print(json.dumps(result, indent=1))
    return 1 if result["seconds_median"] > LIMIT_S or result["cuda_context"] else 0


if __name__ == "__main__":
    run_as_script(main)
