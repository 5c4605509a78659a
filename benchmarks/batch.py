"""QwenEditBatch over a long run: how busy it keeps a card, and what several cards give.

    python benchmarks/random_weights.py MODELS --comfyui PATH --without-fp8
    python benchmarks/batch.py busy --comfyui PATH --models MODELS [--preset standard --items 10]
    python benchmarks/batch.py gpus --comfyui PATH --models MODELS --counts 4,2,1 [--ray]
    python benchmarks/batch.py gpus --comfyui PATH --demo --counts 2,1 --items 8        on the CPU, to try it

``busy``: one card, one run from the command line's own code; nvidia-smi says in which share of the time kernels ran, from
the first result to the last, and over the whole run with its start. ``gpus``: one worker for each GPU (``scripts/edit_worker.py``),
as plain processes or as Ray's actors; the same number of items for each of N workers at once, and for one alone. Then one
worker is killed and another takes its place: the seconds until ComfyUI answers again, and until its next result.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "scripts"), str(REPO / "tests" / "comfyui")]

from array_client import to_png
from comfy_host import Host
from comfy_server import ComfyServer
from edit_job import WORKFLOWS
from edit_worker import EditWorker, Parcel, pack
from environment import environment, keep
from full_size import picture
from manifest_run import ManifestRun, Task, load_batch_workflow
from run_summary import Summary

EVERY_MS = 100
WARM_ITEMS = 2


def make_workflow(options: argparse.Namespace) -> dict[str, Any]:
    """The shipped workflow with full-size random weights, or as it is with the demo model."""
    values = {"preset": options.preset, "prompt": "change the colours", "megapixels": options.side**2 / 2**20}
    workflow = load_batch_workflow(WORKFLOWS / "batch_of_edits.json", values, None)
    if not options.demo:
        files = {"model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
        workflow["1"]["inputs"] |= {name: f"random_{kind}.safetensors" for name, kind in files.items()}
        workflow["1"]["inputs"]["precision"] = options.precision
    return workflow


def make_items(folder: Path, count: int, side: int, first_seed: int = 0) -> Path:
    """A manifest over a few pictures, with a seed and a prompt for each item."""
    folder.mkdir(parents=True)
    for number in range(min(count, 8)):
        (folder / f"{number}.png").write_bytes(to_png(picture(number, side)))
    rows = [
        {"picture": f"{number % 8}.png", "prompt": f"change the colours, variant {number}", "seed": first_seed + number}
        for number in range(count)
    ]
    path = folder / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def visible_cards() -> list[str]:
    """The cards that CUDA_VISIBLE_DEVICES leaves, as numbers or UUIDs; empty when it does not say."""
    return [card.strip() for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip()]


class Utilisation:
    """nvidia-smi's utilization.gpu of the first card that CUDA sees, as (time, percent), while it is open; empty without
    nvidia-smi."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []

    def __enter__(self) -> "Utilisation":
        query = [
            "nvidia-smi",
            "-i",
            next(iter(visible_cards()), "0"),
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            f"-lms={EVERY_MS}",
        ]
        try:
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            self._process = None
            return self
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _listen(self, lines: Any) -> None:
        for line in lines:
            if line.strip().isdigit():  # it also says why it can't tell
                self.samples.append((time.monotonic(), float(line)))

    def mean(self, begin: float, end: float) -> float | None:
        found = [percent for at, percent in self.samples if begin <= at <= end]
        return round(statistics.mean(found), 2) if found else None


def busy(options: argparse.Namespace, host: Host, work: Path, extra: list[str]) -> dict[str, Any]:
    workflow = make_workflow(options)
    stamps: list[tuple[float, int]] = []

    def show(summary: Summary, final: bool) -> None:
        if summary.written > (stamps[-1][1] if stamps else 0):
            stamps.append((time.monotonic(), summary.written))

    with ComfyServer(host, work / "server", extra, cpu=options.demo) as server, Utilisation() as card:
        warm = make_items(work / "warm", WARM_ITEMS, options.side, first_seed=10**6)
        ManifestRun(workflow, warm, work / "warm results").run(server.url)
        items = make_items(work / "items", options.items, options.side)
        begin = time.monotonic()
        summary = ManifestRun(workflow, items, work / "results").run(server.url, show)
        end = time.monotonic()
        print(
            "\n".join(
                line for line in server.log_tail(400).splitlines() if "Qwen Edit Fast" in line and "wrote" not in line
            )
        )
    first, last = stamps[0][0], stamps[-1][0]
    each = [round(b[0] - a[0], 3) for a, b in itertools.pairwise(stamps)]
    return {
        "summary": summary.text(),
        "busy_percent_first_to_last_result": card.mean(first, last),
        "busy_percent_whole_run": card.mean(begin, end),
        "seconds": round(end - begin, 2),
        "seconds_until_first_result": round(first - begin, 2),
        "seconds_an_item_median": statistics.median(each) if each else None,
        "seconds_an_item": each,
    }


class PlainWorker:
    """An EditWorker in a process of its own, on the GPU of its number."""

    def __init__(self, number: int, arguments: tuple[Any, ...]):
        context = multiprocessing.get_context("spawn")
        self._parcels, self._results = context.Queue(), context.Queue()
        self._process = context.Process(target=_serve, args=(number, arguments, self._parcels, self._results))
        self._process.start()

    def submit(self, parcel: Parcel) -> None:
        self._parcels.put(parcel)

    def result(self) -> Any:
        """What came of the first parcel that was submitted and not asked for; before that, that the worker is ready."""
        return self._results.get(timeout=600)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(number: int, arguments: tuple[Any, ...], parcels: Any, results: Any) -> None:
    cards = visible_cards()
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[number] if cards else str(number)
    worker = EditWorker(*arguments)
    results.put("ready")
    while True:
        results.put(worker.edit(parcels.get()))


class RayWorker:
    """The same as a Ray actor; Ray chooses the GPU, and starts it again when it was killed."""

    def __init__(self, actor: Any):
        self._actor = actor
        self._waiting: list[Any] = [actor.ready.remote()]

    def submit(self, parcel: Parcel) -> None:
        self._waiting.append(self._actor.edit.remote(parcel))

    def result(self) -> Any:
        import ray

        return ray.get(self._waiting.pop(0))

    def kill(self) -> None:
        import ray

        ray.kill(self._actor, no_restart=False)
        self._waiting = [self._actor.ready.remote()]


def start(
    options: argparse.Namespace, count: int, host: Host, work: Path, workflow: dict[str, Any], extra: list[str]
) -> list:
    if options.ray:
        import ray
        from ray_edit import start_workers

        ray.init(include_dashboard=False, num_cpus=count if options.demo else None, log_to_driver=False)
        return [RayWorker(actor) for actor in start_workers(count, options.demo, host, work, workflow, extra)]
    folders = (work / f"worker{number}" for number in range(count))
    return [PlainWorker(number, (host, folder, workflow, extra, options.demo)) for number, folder in enumerate(folders)]


def gpus(options: argparse.Namespace, host: Host, work: Path, extra: list[str]) -> dict[str, Any]:
    counts = sorted(map(int, options.counts.split(",")), reverse=True)
    workflow = make_workflow(options)
    seeds = iter(range(0, 10**9, 10**4))

    def tasks(count: int) -> list[Task]:
        seed = next(seeds)
        items = make_items(work / f"items{seed}", count, options.side, seed)
        return list(ManifestRun(workflow, items, work / f"none{seed}").plan())

    def time_of(workers: list, items: int) -> float:
        parcels = [pack(tasks(items)) for _ in workers]
        begin = time.monotonic()
        for worker, parcel in zip(workers, parcels, strict=True):
            worker.submit(parcel)
        for worker in workers:
            delivered = worker.result()
            assert not delivered.failed, delivered.failed
        return time.monotonic() - begin

    begin = time.monotonic()
    workers = start(options, counts[0], host, work, workflow, extra)
    result: dict[str, Any] = {
        "workers": "Ray's actors" if options.ray else "plain processes",
        "items_each": options.items,
    }
    try:
        for worker in workers:
            worker.result()
        result["seconds_until_all_answer"] = round(time.monotonic() - begin, 1)
        result["seconds_until_all_are_warm"] = round(time_of(workers, WARM_ITEMS), 1)
        seconds = {count: time_of(workers[:count], options.items) for count in counts}
        pace = {count: count * options.items / taken for count, taken in seconds.items()}
        result["seconds"] = {count: round(taken, 2) for count, taken in seconds.items()}
        result["items_a_minute"] = {count: round(60 * each, 1) for count, each in pace.items()}
        if 1 in pace:
            result["times_of_one"] = {count: round(each / pace[1], 3) for count, each in pace.items()}
        parcel = pack(tasks(1))
        down = time.monotonic()
        workers[0].kill()
        if not options.ray:
            workers[0] = PlainWorker(0, (host, work / "worker0", workflow, extra, options.demo))
        workers[0].result()
        result["restart_seconds_until_it_answers"] = round(time.monotonic() - down, 1)
        workers[0].submit(parcel)
        workers[0].result()
        result["restart_seconds_until_a_result"] = round(time.monotonic() - down, 1)
    finally:
        if options.ray:
            import ray

            ray.shutdown()
        else:
            for worker in workers:
                worker.kill()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("busy", "gpus"))
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="the folder that random_weights.py filled")
    parser.add_argument("--demo", action="store_true", help="the demo model on the CPU instead")
    parser.add_argument("--preset", default="Lightning 4")
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--items", type=int, default=32, help="for each worker")
    parser.add_argument("--side", type=int, default=None, help="pixels (default: 1024, with --demo 128)")
    parser.add_argument("--counts", default="4,2,1", help="of workers, for gpus")
    parser.add_argument("--ray", action="store_true", help="Ray's actors instead of plain processes")
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--results", type=Path, help="folder for it (default: benchmarks/results)")
    parser.add_argument("--front-end-root", type=Path, help="for a ComfyUI without its front end package")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # numbers are nvidia-smi's
    options.side = options.side or (128 if options.demo else 1024)
    host = Host(Path(sys.executable), options.comfyui.resolve())
    with tempfile.TemporaryDirectory() as folder:
        work, extra = Path(folder), []
        if options.models:
            paths = Path(work, "models.yaml")
            kinds = {kind: kind for kind in ("diffusion_models", "text_encoders", "vae")}
            paths.write_text(json.dumps({"random": {"base_path": str(options.models.resolve())} | kinds}))
            extra += ["--extra-model-paths-config", str(paths)]
        if options.front_end_root:
            extra += ["--front-end-root", str(options.front_end_root)]
        outcome = {"busy": busy, "gpus": gpus}[options.what](options, host, work, extra)
    outcome = {"benchmark": f"batch {options.what}", "preset": options.preset, "side": options.side} | outcome
    print(json.dumps(outcome, indent=1))
    name = options.name or f"batch_{options.what}"
    print(f"Wrote {keep(name, outcome | {'environment': environment()}, options.results)}")


if __name__ == "__main__":
    main()
