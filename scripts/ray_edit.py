"""The same manifest on several GPUs or machines, with Ray: one ComfyUI with the pack for each GPU.

    python ray_edit.py --manifest night.csv --gpus 4 --output edited/            on this machine
    python ray_edit.py --manifest night.csv --address auto --output edited/      on all GPUs of a cluster that runs already

Needs Ray (pip install "ray>=2.40"). Ray places the workers, starts dead ones again and gives them their work
again. In a cluster every machine has this pack, ComfyUI and Python at the same paths; where `ray start` says that it
authenticates by token, set RAY_AUTH_MODE=token for this script too. A run that was stopped goes on by
being started again. The exit status is 0 when every item is done, 1 when one failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from comfy_client import ComfyError
from comfy_host import SCRIPTS, Host, add_host_arguments, prepare_host, run_as_script, say
from comfy_server import START_TIMEOUT_S
from edit_job import JobError, add_model_arguments, megapixels_for
from edit_worker import Delivered, EditWorker, pack
from manifest_run import ManifestRun, Task, asked_batch_workflow, save
from run_summary import BatchBar, Summary

PARCEL = 8  # items in one call of a worker
CALLS = 2  # that a worker has at once, so that it never waits
RETRIES = 2  # of a call whose worker died
READY_S = (
    START_TIMEOUT_S + 120.0
)  # a worker without work that has not answered by then waits for a place that it does not get


@dataclass(frozen=True)
class Call:
    """Items that a worker has; ``alone``: one item whose parcel has failed, with nothing else on this worker."""

    worker: Any
    tasks: list[Task]
    alone: bool


@dataclass
class Check:
    """Whether a worker's server runs: when it starts, and when a call of it has failed."""

    worker: Any
    until: float = 0.0  # by time.monotonic()
    failed: list[tuple[Call, str]] = field(default_factory=list)  # and why


class RayRun:
    """A manifest on Ray's workers. Ray must be initialised; the workers may still be starting."""

    def __init__(self, run: ManifestRun, output: Path, workers: list[Any], show: Callable[[Summary, bool], None]):
        self._run, self._output, self._alive, self._show = run, output, list(workers), show
        self._under_way: dict[Any, Call] = {}
        self._checks: dict[Any, Check] = {}
        self._again: deque[list[Task]] = deque()
        self._suspects: deque[Task] = deque()  # of parcels that failed; one of each may be the cause

    def finish(self) -> Summary:
        """Do it all; the summary is the manifest run's.

        Raises:
            JobError: no worker is left that can start its server.
        """
        summary, begin = self._run.summary, time.monotonic()
        self._tasks = self._run.plan()
        for worker in self._alive:
            self._check(worker)
        while self._under_way or self._checks:
            waiting = [check.until for check in self._checks.values()]
            patience = max(0.0, min(waiting) - time.monotonic()) if waiting else None
            done, _ = ray.wait([*self._under_way, *self._checks], num_returns=1, timeout=patience)
            for one in done:
                if one in self._checks:
                    self._checked(one)
                else:
                    self._ended(one)
            self._drop_late()
            self._hand_out()
            summary.seconds = time.monotonic() - begin
            self._show(summary, False)
        self._run.count_twins()
        self._show(summary, True)
        return summary

    # Whether workers work

    def _check(self, worker: Any) -> Check:
        """Ask a worker whether it is ready, after the calls that it has; nothing waits for the answer."""
        check = next((check for check in self._checks.values() if check.worker == worker), None)
        if check is None:
            check = Check(worker)
            self._checks[worker.ready.remote()] = check
        check.until = time.monotonic() + READY_S
        return check

    def _checked(self, answer: Any) -> None:
        check = self._checks.pop(answer)
        try:
            ray.get(answer)
        except ray.exceptions.RayError as error:
            self._drop(check, str(error).splitlines()[-1])
            return
        for call, why in check.failed:
            if call.alone:
                self._run.fail(call.tasks[0], f"its worker failed on it alone: {why}")
            else:
                self._suspects += call.tasks

    def _drop_late(self) -> None:
        for answer, check in list(self._checks.items()):
            if time.monotonic() < check.until:
                continue
            if any(call.worker == check.worker for call in self._under_way.values()):  # it answers after these
                check.until = time.monotonic() + READY_S
                continue
            del self._checks[answer]
            ray.kill(check.worker)
            self._drop(check, f"It has not answered for {READY_S:g} s. Is a GPU free for it, and its machine there?")

    def _drop(self, check: Check, why: str) -> None:
        """This worker gets nothing more. What it had goes to the others: the items are not the cause."""
        self._alive.remove(check.worker)
        self._again += [call.tasks for call, _ in check.failed]
        if not self._alive:
            raise JobError(f"No worker is left; start the run again to go on where it was. {why}")
        say(f"A worker is left out, {len(self._alive)} are left. {why}")

    # Work

    def _ended(self, answer: Any) -> None:
        call = self._under_way.pop(answer)
        try:
            self._take(call.tasks, ray.get(answer))
        except ray.exceptions.RayError as error:  # also of what was done, but lies on a machine that has gone
            if call.worker in self._alive:
                self._check(call.worker).failed.append((call, str(error).splitlines()[-1]))
            else:
                self._again.append(call.tasks)

    def _hand_out(self) -> None:
        """Give the workers that are ready as many calls as they may have."""
        unsure = [check.worker for check in self._checks.values()]
        for worker in self._alive:
            mine = [call for call in self._under_way.values() if call.worker == worker]
            # A worker that dies takes all that it has with it, so that only what runs alone can be blamed.
            while worker not in unsure and len(mine) < CALLS and not any(call.alone for call in mine):
                alone = bool(self._suspects) and not mine
                tasks = [self._suspects.popleft()] if alone else self._next_tasks()
                if not tasks:
                    break
                try:
                    packed = pack(tasks)
                except OSError as error:  # a picture was deleted meanwhile
                    if len(tasks) == 1:
                        self._run.fail(tasks[0], f"a picture can't be read: {error}")
                    else:
                        self._again += [[task] for task in tasks]
                    continue
                mine.append(Call(worker, tasks, alone))
                self._under_way[worker.edit.remote(packed)] = mine[-1]

    def _next_tasks(self) -> list[Task]:
        return self._again.popleft() if self._again else list(islice(self._tasks, PARCEL))

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
    """Actors that are starting, each with a GPU of its own, or a share of the CPU. Each has a folder below ``work``."""
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
    add_model_arguments(parser)
    parser.add_argument("--model-paths", type=Path, metavar="FILE", help="ComfyUI's --extra-model-paths-config")
    parser.add_argument(
        "--work", type=Path, metavar="PATH",
        help="folder for the workers' files, which stay (default: a new one, removed on this machine when all is done)",
    )  # fmt: skip
    add_host_arguments(parser)
    options = parser.parse_args()
    options.megapixels = megapixels_for(options)
    return options


def main() -> int:
    """Run a manifest; a failed item does not stop the rest."""
    options = parse()
    workflow = asked_batch_workflow(options)
    run = ManifestRun(workflow, options.manifest, options.output)
    host = prepare_host(options.comfyui, options.python or sys.executable)
    extra = ["--extra-model-paths-config", str(options.model_paths.resolve())] if options.model_paths else []
    here = {} if options.address else {"num_cpus": options.cpus, "include_dashboard": False}  # a cluster has its own
    try:
        ray.init(options.address, log_to_driver=False, **here)
    except ConnectionError as error:
        raise JobError(f"No Ray cluster answers at {options.address}: {error}") from None
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
