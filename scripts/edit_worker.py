"""One worker of many: a headless ComfyUI with the pack on one GPU, and the edits that are handed to it.

Used by ray_edit.py as an actor and by benchmarks/batch.py as a plain process. Everything lies in one folder, where
a worker that takes the place of a dead one finds what that has finished. The ComfyUI ends with its worker, also when the
worker is killed, so that no GPU stays taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_client import ComfyError
from comfy_host import Host
from comfy_server import ComfyServer
from manifest_run import ManifestRun, Task, fields_of


@dataclass(frozen=True)
class Parcel:
    """Some items with all that they need, to travel to another machine."""

    tasks: tuple[Task, ...]
    contents: dict[str, bytes]  # of the pictures, by their hash


@dataclass(frozen=True)
class Delivered:
    """What came of a parcel: PNG files by name, and why the others failed, by the same names."""

    results: dict[str, bytes]
    failed: dict[str, str]


def pack(tasks: Sequence[Task]) -> Parcel:
    """Read the pictures of some items."""
    files = {key: path for task in tasks for key, path in zip(task.hashes, task.paths, strict=True)}
    return Parcel(tuple(tasks), {key: path.read_bytes() for key, path in files.items()})


class EditWorker:
    """See the module's docstring. The GPU is the one that CUDA_VISIBLE_DEVICES shows this process."""

    def __init__(self, host: Host, work: Path, workflow: dict[str, Any], extra: Sequence[str] = (), cpu: bool = False):
        self._workflow = workflow
        self._parcels = work / "parcels"
        self.server = ComfyServer(host, work / "server", extra, cpu=cpu, with_parent=True)
        self.server.start()

    def ready(self) -> int:
        """This process's id, once ComfyUI answers."""
        return os.getpid()

    def edit(self, parcel: Parcel) -> Delivered:
        """Edit a parcel; what this folder holds already is not made again.

        When its ComfyUI has died, this process ends too: whoever started it starts another.
        """
        self._parcels.mkdir(parents=True, exist_ok=True)
        for task in parcel.tasks:
            for key, path in zip(task.hashes, task.paths, strict=True):
                (self._parcels / f"{key}{path.suffix}").write_bytes(parcel.contents[key])
        rows = [
            {"pictures": [f"{key}{path.suffix}" for key, path in zip(task.hashes, task.paths, strict=True)]}
            | fields_of(task.item)
            for task in parcel.tasks
        ]
        manifest = self._parcels / f"{parcel.tasks[0].result}.jsonl"
        manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        run = ManifestRun(self._workflow, manifest, self._parcels / "results", patience_s=0)
        try:
            summary = run.run(self.server.url)
        except ComfyError:
            if not self.server.running:
                os._exit(1)
            raise
        failed = {parcel.tasks[bad.line - 1].result: bad.reason.partition("): ")[2] for bad in summary.failed}
        names = [task.result for task in parcel.tasks if task.result not in failed]
        return Delivered({name: (self._parcels / "results" / name).read_bytes() for name in names}, failed)
