"""How long ComfyUI's garbage collection takes between edits, with what its imports made put aside (as the pack does) and without.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/collector.py [--repeat 9] [--name NAME]

One server with this pack alone, after one edit with the demo model. ComfyUI collects after a prompt, every ten seconds,
before it takes the next.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from array_client import ArrayClient
from comfy_host import PACK_NAME, Host
from comfy_server import ComfyServer
from edits import small_edit
from environment import environment, keep

PROBE = "collector_probe"
NODES = """
import gc
import time

from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


def collections(count):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        gc.collect()
        times.append((time.perf_counter() - start) * 1000)
    return times


@PromptServer.instance.routes.get("/collector_probe/{count}")
async def measure(request):
    count = int(request.match_info["count"])
    gc.collect()
    aside, looked_at = gc.get_freeze_count(), len(gc.get_objects())
    with_it = collections(count)
    gc.unfreeze()
    without = collections(count)
    return web.json_response({"objects aside": aside, "objects looked at": looked_at, "ms": with_it, "ms without": without})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--name", default="collector_cpu", help="of the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        nodes = root / "nodes" / PROBE
        nodes.mkdir(parents=True)
        (nodes / "__init__.py").write_text(NODES, encoding="utf-8")
        paths = root / "paths.yaml"
        paths.write_text(json.dumps({"probe": {"custom_nodes": str(nodes.parent)}}), encoding="utf-8")
        extra = ["--extra-model-paths-config", str(paths), "--whitelist-custom-nodes", PACK_NAME, PROBE]
        host = Host(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]))
        with ComfyServer(host, root / "work", extra, cpu=True) as server, ArrayClient(server.url) as client:
            client.run(small_edit(client), timeout_s=300)
            found = client.get(f"/{PROBE}/{options.repeat}")
    times = {name: round(statistics.median(found.pop(name)), 1) for name in ("ms", "ms without")}
    result = {"benchmark": "collector", **found, **times, "environment": environment()}
    print(json.dumps(result, indent=1))
    print(f"Wrote {keep(options.name, result)}")


if __name__ == "__main__":
    main()
