"""The transformer on cards that can't hold it: seconds per step with less and less memory left.

    python benchmarks/random_weights.py MODELS --comfyui PATH --without-bf16
    python benchmarks/ballast.py --comfyui PATH --models MODELS [--free 0,23,15,11,7] [--engines pack,native]
    python benchmarks/ballast.py [--form fp8] [--resident 60,50,40,30,20,10,0]

With ``--comfyui``: a second process holds memory on the card so that as many GiB remain for a ComfyUI (0: all of it), which
samples with the fp8 file through this pack's loader and through its own, one after the other under the same ballast. Text and
latents are random, so no text encoder is there; a step is one forward, 1024² with one reference and 280 text tokens. Each
engine warms up with all of the card first, in a row that is marked and is no baseline; "ratio" is against the row with all of it
that follows. Of each second sampling the stages are printed.
The card is still the large one in all other respects: its speed, its bus, its compute capability.

Without it: the engine alone, no server. All blocks on the card, then fewer and fewer; whether the results are the same bits.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from environment import environment, keep

from qwen_edit.quantize import FORMATS

GIB = 2**30
PROBE_NODES = REPO / "tests" / "comfyui" / "probe_nodes"  # random text and latents
NOTE = re.compile(
    r"Qwen Edit Fast: (\d+) of the transformer's (\d+) blocks are streamed from RAM, ([\d.]+) GiB in each"
)


# The engine alone


@torch.inference_mode()
def measure_engine(options: argparse.Namespace) -> list[dict[str, Any]]:
    from forward import Case, milliseconds, ours, random_model

    from qwen_edit.host_memory import HostMemory, page_lock
    from qwen_edit.streaming import BlockStream, spread

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = random_model(options.layers, device)
    model = ours(source, None if options.form == "bf16" else options.form, "auto")
    del source
    case, blocks = Case(options.side, options.text, device), model.transformer_blocks
    expected = case.ours(model).clone()
    whole = milliseconds(lambda: case.ours(model), device, options.repeat)
    model.stream = stream = BlockStream(blocks, HostMemory(page_lock if device.type == "cuda" else None))
    rows = []
    for resident in map(int, options.resident.split(",")):
        begin = time.perf_counter()
        stream.choose(spread(len(blocks), len(blocks) - min(resident, len(blocks))), device)
        for index in stream.streamed:
            stream.lay(index)
        for index, block in enumerate(blocks):
            if index not in stream.streamed:
                block.to(device)
        stream.open()
        moved = time.perf_counter() - begin
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        same = torch.equal(case.ours(model), expected)
        ms = milliseconds(lambda: case.ours(model), device, options.repeat)
        row = {
            "resident": resident,
            "streamed": len(stream.streamed),
            "ms": round(ms, 1),
            "ratio": round(ms / whole, 3),
        }
        row |= {"GB per forward": round(stream.bytes_per_forward / 1e9, 2), "bit-identical": same}
        row |= {
            "GB/s while computing": round(stream.bytes_per_forward / ms / 1e6, 1),
            "seconds to move": round(moved, 2),
        }
        if device.type == "cuda":
            row["peak GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
            rate = stream.bandwidth() if stream.streamed else None
            row["GB/s alone"] = None if rate is None else round(rate / 1e9, 1)
        rows.append({"form": options.form} | row)
        print(rows[-1], flush=True)
    return rows


# Under ballast


def hold() -> None:
    """The second process. Each line it reads says how many bytes are to remain free on the card (0: hold nothing); it
    answers with the bytes that are. "least": the fewest that were free since then."""
    held: list[torch.Tensor] = []
    least = [0]
    torch.cuda.init()

    def watch() -> None:
        while True:
            least[0] = min(least[0], torch.cuda.mem_get_info()[0])
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    for line in sys.stdin:
        if line.strip() != "least":
            held.clear()
            torch.cuda.empty_cache()
            surplus = torch.cuda.mem_get_info()[0] - int(line)
            if int(line) and surplus > 0:
                held.append(torch.empty(surplus, dtype=torch.uint8, device="cuda"))
            least[0] = torch.cuda.mem_get_info()[0]
        print(least[0], flush=True)


class Ballast:
    def __init__(self) -> None:
        command = [sys.executable, __file__, "--hold"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class NoBallast:
    """Without a card, for a try at small size."""

    def ask(self, line: str) -> int:
        del line
        return 0

    def close(self) -> None:
        pass


class HostPeak:
    """The most anonymous and page-locked memory that a process had while this was entered, in bytes (file pages are not
    counted)."""

    def __init__(self, pid: int):
        import psutil

        self._process, self._done, self.nbytes = psutil.Process(pid), threading.Event(), 0

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            memory: Any = self._process.memory_info()
            self.nbytes = max(self.nbytes, memory.rss - memory.shared)


def graph(engine: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Random text and latents, one reference, a few steps without guidance."""
    from graphs import node

    side, file = options.side // 8, options.file
    width = options.text_width
    result = {
        "text": node("ProbeConditioning", tokens=options.text, width=width, seed=1),
        "picture": node("ProbeLatent", height=side, width=side, seed=2),
        "edit": node("ReferenceLatent", conditioning=["text", 0], latent=["picture", 0]),
        "latent": node("ProbeLatent", height=side, width=side, seed=3),
        "log": node("QwenEditPerfLogger", value=["sample", 0], label=engine),
        "save": node("SaveLatent", samples=["log", 0], filename_prefix="ballast"),
    }
    if engine == "pack":
        result["model"] = node(
            "QwenEditLoader", model=file, text_encoder="none", vae=options.vae, profile="auto",
            precision=options.precision, attention="auto", offload=options.offload, model_version="2511",
        )  # fmt: skip
    else:
        result["model"] = node("UNETLoader", unet_name=file, weight_dtype="default")
    sampler = {"steps": options.steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs = {"positive": ["edit", 0], "negative": ["edit", 0], "latent_image": ["latent", 0]}
    result["sample"] = node("KSampler", model=["model", 0], seed=seed, **sampler, **inputs)
    return result


def measure_ballast(options: argparse.Namespace) -> list[dict[str, Any]]:
    from array_client import ArrayClient
    from comfy_host import PACK_NAME, Host
    from comfy_server import ComfyServer

    rows: list[dict[str, Any]] = []
    ballast = Ballast() if torch.cuda.is_available() else NoBallast()
    with tempfile.TemporaryDirectory() as work:
        paths = Path(work, "models.yaml")
        kinds = {kind: kind for kind in ("diffusion_models", "vae")}
        listed = {"random": {"base_path": str(options.models.resolve())} | kinds}
        paths.write_text(json.dumps(listed | {"probe": {"custom_nodes": str(PROBE_NODES)}}))
        extra = ["--extra-model-paths-config", str(paths), "--whitelist-custom-nodes", PACK_NAME, "qwen_edit_probe"]
        extra += options.server_arguments.split()
        at_start = ballast.ask("0")
        host = Host(Path(sys.executable), options.comfyui.resolve())
        server = ComfyServer(host, Path(work, "server"), extra, cpu=not torch.cuda.is_available())
        try:
            with server, ArrayClient(server.url) as client:
                lefts, engines = options.free.split(","), options.engines.split(",")
                plan = [(engine, 0.0, True) for engine in engines]
                plan += [(engine, float(left), False) for left in lefts for engine in engines]
                for engine, left, warm_up in plan:
                    row = one_case(engine, left, at_start, options, client, server, ballast)
                    rows.append(row | {"warm-up": True} if warm_up else row)
                    print(rows[-1], flush=True)
        except Exception as e:  # what was measured until then is kept
            print(server.log_tail(60), file=sys.stderr)
            print(f"Stopped after {len(rows)} cases: {e!r}", file=sys.stderr)
        finally:
            ballast.close()
    for row in rows:
        same = [r for r in rows if r["engine"] == row["engine"] and r["free GiB"] == 0 and "warm-up" not in r]
        whole = same[0]["ms"] if same else None
        row["ratio"] = None if whole is None or row["ms"] is None else round(row["ms"] / whole, 3)
    return rows


def one_case(
    engine, left: float, at_start: int, options: argparse.Namespace, client, server, ballast
) -> dict[str, Any]:
    """One sampling to load and one that counts, with ``left`` GiB for the server and what it holds while idle."""
    from full_size import perf_record

    from qwen_edit.perf import stage_table

    while client.get("/qwen_edit_probe")["loaded"]:  # ComfyUI's worker can sleep through /free
        client.free()
        time.sleep(1)
    idle = at_start - ballast.ask("0")  # ComfyUI's own context
    room = ballast.ask(str(round(left * GIB - idle))) if left else ballast.ask("0")
    said = len(server.log.read_text(errors="replace"))
    row: dict[str, Any] = {"engine": engine, "free GiB": left}
    with HostPeak(server.pid) as host:
        for seed in (1, 2):
            prompt = client.queue(graph(engine, options, seed))
            begin = time.perf_counter()
            client.wait(prompt, timeout_s=options.timeout)
            which = "first" if seed == 1 else "second"
            row[f"{which}, s"] = round(time.perf_counter() - begin, 2)
            record = perf_record(server, prompt)
            (steps,) = [entry["steps"] for entry in record["nodes"] if "steps" in entry and entry["steps"]["ms"]]
            row[f"{which}, steps"] = steps
    row["stages"] = record["stages"]
    print(stage_table(record), flush=True)
    row["ms"] = round(statistics.median(steps["ms"]), 1)
    row["used GiB"] = round((room - ballast.ask("least") + idle) / GIB, 2)
    row["host GiB"] = round(host.nbytes / GIB, 2)
    if engine == "pack":
        notes = NOTE.findall(server.log.read_text(errors="replace")[said:])
        streamed, blocks, copied = notes[-1] if notes else ("0", "all", "0")
        row["mode"] = f"{streamed} of {blocks} blocks streamed" if notes else "resident"
        row["GB/s"] = round(float(copied) * GIB / row["ms"] / 1e6, 1)
    else:
        row["mode"] = "ComfyUI's own"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="measure under ballast; without it the engine alone")
    parser.add_argument("--models", type=Path, help="the folder that random_weights.py filled")
    parser.add_argument("--free", default="0,23,15,11,7", help="GiB left on the card, comma between; 0: all of it")
    parser.add_argument("--engines", default="pack,native")
    parser.add_argument("--file", default="random_fp8.safetensors")
    parser.add_argument("--vae", default="random_vae.safetensors")
    parser.add_argument("--precision", default="auto", help="of the pack; auto: as the file has it")
    parser.add_argument("--offload", default="auto", help="of the pack")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--text-width", type=int, default=3584)
    parser.add_argument("--server-arguments", default="", help="more of them for ComfyUI")
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument("--form", default="fp8", choices=("bf16", *FORMATS), help="the engine alone")
    parser.add_argument("--resident", default="60,50,40,30,20,10,0", help="the engine alone: blocks on the card")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--text", type=int, default=280, help="text tokens")
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        return hold()
    kind = "ballast" if options.comfyui else "streaming"
    rows = measure_ballast(options) if options.comfyui else measure_engine(options)
    result = {"benchmark": kind, "environment": environment(), "side": options.side, "rows": rows}
    print(json.dumps(rows, indent=1))
    print(f"Wrote {keep(options.name or kind, result, options.results)}")


if __name__ == "__main__":
    main()
