"""The same manifest on several GPUs or machines, with Ray: one ComfyUI with the pack for each GPU.

    python ray_edit.py --manifest night.csv --gpus 4 --output edited/            on this machine
    python ray_edit.py --manifest night.csv --address auto --output edited/      on all GPUs of a cluster that runs already

Needs Ray (pip install "ray>=2.40"). Ray places the workers, starts dead ones again and gives them their work
again. In a cluster every machine has this pack, ComfyUI and Python at the same paths. A run that was stopped goes on by
being started again. The exit status is 0 when every item is done, 1 when one failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from comfy_client import ComfyError
from comfy_host import SCRIPTS, Host, add_host_arguments, prepare_host, run_as_script, say
from edit_job import WORKFLOWS, JobError
from edit_worker import Delivered, EditWorker, pack
from manifest_run import BatchBar, ManifestRun, Summary, Task, load_batch_workflow, save

PARCEL = 8  # items in one call of a worker
CALLS = 2  # that a worker has at once, so that it never waits
RETRIES = 2  # of a call whose worker died


class RayRun:
    """A manifest on Ray's workers. Ray must be initialised."""

    def __init__(self, run: ManifestRun, output: Path, workers: list[Any], show: Callable[[Summary, bool], None]):
        self._run, self._output, self._alive, self._show = run, output, list(workers), show
        self._under_way: dict[Any, tuple[Any, list[Task]]] = {}
        self._again: deque[list[Task]] = deque()

    def finish(self) -> Summary:
        """Do it all; the summary is the manifest run's.

        Raises:
            JobError: no worker is left that can start its server.
        """
        summary, begin = self._run.summary, time.monotonic()
        tasks = self._run.plan()
        for worker in self._alive * CALLS:
            self._hand_out(worker, tasks)
        while self._under_way:
            (done,), _ = ray.wait(list(self._under_way), num_returns=1)
            worker, parcel = self._under_way.pop(done)
            try:
                self._take(parcel, ray.get(done))
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                if (why := self._gone(worker)) is not None:  # then its items are not the cause
                    self._again.append(parcel)
                    if not self._alive:
                        raise JobError(f"No worker is left; start the run again to go on where it was. {why}") from None
                    worker = self._alive[len(self._under_way) % len(self._alive)]
                elif len(parcel) > 1:  # one of them may be the cause
                    self._again += [[task] for task in parcel]
                else:
                    self._run.fail(parcel[0], f"its worker failed {RETRIES + 1} times: {str(error).splitlines()[-1]}")
            self._hand_out(worker, tasks)
            summary.seconds = time.monotonic() - begin
            self._show(summary, False)
        self._show(summary, True)
        return summary

    def _gone(self, worker: Any) -> str | None:
        """Why this worker can't start its server again, after which it gets nothing more; None: it can."""
        try:
            ray.get(worker.ready.remote())
            return None
        except ray.exceptions.RayError as error:
            if worker in self._alive:
                self._alive.remove(worker)
            return str(error).splitlines()[-1]

    def _hand_out(self, worker: Any, tasks: Iterator[Task]) -> None:
        while parcel := self._again.popleft() if self._again else list(islice(tasks, PARCEL)):
            try:
                packed = pack(parcel)
            except OSError as error:  # a picture was deleted meanwhile
                if len(parcel) == 1:
                    self._run.fail(parcel[0], f"a picture can't be read: {error}")
                else:
                    self._again += [[task] for task in parcel]
                continue
            self._under_way[worker.edit.remote(packed)] = worker, parcel
            return

    def _take(self, parcel: list[Task], delivered: Delivered) -> None:
        for task in parcel:
            if task.result in delivered.failed:
                self._run.fail(task, delivered.failed[task.result])
            else:
                save(self._output / task.result, delivered.results[task.result])
                self._run.summary.written += 1


def start_workers(
    count: int, cpu: bool, host: Host, work: Path, workflow: dict[str, Any], extra: list[str]
) -> list[Any]:
    """Actors, each with a GPU of its own, or a share of the CPU. Each has a folder of its own below ``work``."""
    # what died is started again as often as it takes, and its calls a few times
    options = {
        "max_restarts": -1,
        "max_task_retries": RETRIES,
        "runtime_env": {"env_vars": {"PYTHONPATH": str(SCRIPTS)}},
    }
    options |= {"num_cpus": 1, "num_gpus": 0 if cpu else 1}
    actor = ray.remote(EditWorker).options(**options)
    workers = [actor.remote(host, work / f"worker{number}", workflow, extra, cpu) for number in range(count)]
    say(f"Starting {count} workers")
    ray.get([worker.ready.remote() for worker in workers])
    return workers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--manifest", type=Path, required=True, metavar="PATH", help="a manifest or a folder of pictures"
    )
    parser.add_argument("--output", type=Path, default=Path("edited"), metavar="PATH", help="default: %(default)s")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int, metavar="N", help="workers (default: one for each GPU that Ray finds)")
    where.add_argument("--cpus", type=int, metavar="N", help="this many workers on the CPU, to try it out")
    parser.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster, or auto (default: this machine alone)")
    parser.add_argument("--prompt", metavar="TEXT", help="the instruction, where the manifest has none")
    parser.add_argument("--preset", metavar="NAME", help="step preset (default: the workflow's)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: the workflow's")
    parser.add_argument("--model", metavar="NAME", help="the loader's model (default: the workflow's)")
    parser.add_argument("--workflow", type=Path, metavar="FILE", help="another workflow in API format")
    parser.add_argument("--model-paths", type=Path, metavar="FILE", help="ComfyUI's --extra-model-paths-config")
    parser.add_argument(
        "--work", type=Path, metavar="PATH",
        help="folder for the workers' files, which stay (default: a new one, removed on this machine when all is done)",
    )  # fmt: skip
    add_host_arguments(parser)
    return parser.parse_args()


def main() -> int:
    """Run a manifest; a failed item does not stop the rest."""
    options = parse()
    values = {name: getattr(options, name) for name in ("prompt", "preset", "seed")}
    workflow = load_batch_workflow(options.workflow or WORKFLOWS / "batch_of_edits.json", values, options.model)
    run = ManifestRun(workflow, options.manifest, options.output)
    host = prepare_host(options.comfyui, options.python or sys.executable)
    extra = ["--extra-model-paths-config", str(options.model_paths.resolve())] if options.model_paths else []
    ray.init(options.address, include_dashboard=False, num_cpus=options.cpus, log_to_driver=False)
    work = options.work.resolve() if options.work else Path(tempfile.mkdtemp(prefix="qwen_edit_ray_"))
    try:
        there = int(ray.cluster_resources().get("GPU", 0))
        count = options.cpus or options.gpus or there
        if not options.cpus and not 0 < count <= there:  # Ray would wait for them without end
            raise JobError(
                f"Ray finds {there} GPUs. Name at most as many with --gpus, or try it on the CPU with --cpus."
            )
        workers = start_workers(count, bool(options.cpus), host, work, workflow, extra)
        RayRun(run, options.output, workers, BatchBar().show).finish()
    finally:
        ray.shutdown()
        if run.summary.failed or run.summary.left:
            say(f"The workers' logs and results are in {work}")
        elif not options.work:
            shutil.rmtree(work, ignore_errors=True)
        for bad in run.summary.failed:
            print(bad.reason, file=sys.stderr)
        say(run.summary.text())
    return 1 if run.summary.failed else 0


if __name__ == "__main__":
    run_as_script(main, ComfyError, JobError)
