"""A manifest of edits on a running ComfyUI, from start to end whatever happens to the server or to this program.

The items go to QwenEditBatch in chunks: pictures and a manifest of their own are uploaded, two prompts wait in ComfyUI's
queue, and each result is downloaded when it is there. What is in the output folder is the only state: its names tell what
was made from what (``qwen_edit/manifest.py``), on the server and here. When the server goes away, the run waits for it and
queues what is missing; a result that the server still has is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from comfy_client import (
    ComfyClient,
    ComfyError,
    Event,
    ImageRef,
    PromptLost,
    RequestRefused,
    Result,
    ServerUnreachable,
)
from comfy_host import REPO
from edit_job import WORKFLOWS, JobError, nodes_of
from run_summary import Summary, duration

sys.path.insert(0, str(REPO))
from qwen_edit.manifest import (
    NOT_IDENTITY,
    Defaults,
    Item,
    Refused,
    digest,
    hash_bytes,
    is_picture,
    items_of_pictures,
    read_manifest,
    remove_leftovers,
    result_name,
    settings_of,
    temporary_path,
)

CHUNK = 16  # items in a prompt
QUEUED = 2  # prompts on the server, so that it never waits for us
UPLOADS = "qwen_edit_batch"  # subfolder of ComfyUI's input folder
LOSSES = 3  # times that an item alone may take the server away, or a connection break off over the same picture
PAUSE_S = 1.0  # before the same is tried again
UNFIT = (400, 413, 415)  # HTTP: the picture itself can't be taken, for its form, its size, its kind
BATCH = "QwenEditBatch"


@dataclass(frozen=True)
class Task:
    """An item with the contents of its pictures hashed: what is to be made, and the name it will have."""

    item: Item
    paths: tuple[Path, ...]
    hashes: tuple[str, ...]
    result: str


@dataclass(frozen=True)
class Queued:
    prompt_id: str
    tasks: list[Task]


def asked_batch_workflow(options: argparse.Namespace) -> dict[str, Any]:
    """The workflow of a manifest that a command line asks for. Raises JobError."""
    values = {name: getattr(options, name) for name in ("prompt", "preset", "seed", "megapixels")}
    return load_batch_workflow(options.workflow, values, options.model)


def load_batch_workflow(named: Path | None, values: dict[str, Any], model: str | None) -> dict[str, Any]:
    """A workflow in API format around one QwenEditBatch, with values for its inputs; None leaves what it says.

    Without a name it is the shipped one, whose prompt is an example and is not taken.
    """
    path = named or WORKFLOWS / "batch_of_edits.json"
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        (node,) = nodes_of(workflow, BATCH)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise JobError(f"{path} is no workflow in API format with one {BATCH} node: {error}") from error
    if named is None:
        workflow[node]["inputs"]["prompt"] = ""
    workflow[node]["inputs"] |= {name: value for name, value in values.items() if value is not None}
    if model is not None:
        loaders = nodes_of(workflow, "QwenEditLoader")
        if not loaders:
            raise JobError(f"{path} has no QwenEditLoader that could take --model {model}; leave that out.")
        for loader in loaders:
            workflow[loader]["inputs"]["model"] = model
    return workflow


class ManifestRun:
    """One run of a manifest, or of a folder of pictures, into a local folder."""

    def __init__(self, workflow: dict[str, Any], source: Path, output: Path, patience_s: float = 600):
        """
        Args:
            workflow: see ``load_batch_workflow``; it is not changed.
            patience_s: how long the server may be away.

        Raises:
            JobError: the manifest as a whole can't be read.
        """
        self._workflow = workflow
        (self._node,) = nodes_of(workflow, BATCH)
        inputs = workflow[self._node]["inputs"]
        self._identity = settings_of(workflow.__getitem__, self._node, NOT_IDENTITY)
        self._output, self._patience_s = output, patience_s
        self._base, self._items = _read(source, Defaults(*(inputs[name] for name in Defaults.__dataclass_fields__)))
        self.summary = Summary(len(self._items))
        self._twins: list[Task] = []  # of items that stand further up
        self._again: deque[Task] = deque()  # of prompts that were lost
        self._queued: deque[Queued] = deque()
        self._losses: Counter[str] = Counter()
        self._alone = False  # one item in a prompt, to find the one that takes the server away
        self._since_loss = 0

    def run(self, url: str, show: Callable[[Summary, bool], None] = lambda summary, final: None) -> Summary:
        """Do it all. ``show`` is called whenever something has changed, and at the end with True.

        Raises:
            ComfyError: no server answers at first, or it stays away too long, or refuses the workflow, or someone cancels.
        """
        self._show = show
        self._tasks = self.plan()
        begin = time.monotonic()
        with ComfyClient(url) as client:
            try:
                self._run(client, begin)
                self.count_twins()
            except BaseException:
                for queued in self._queued:
                    _cancel(client, queued.prompt_id)
                raise
            finally:
                self.summary.seconds = time.monotonic() - begin
                show(self.summary, True)
        return self.summary

    def _run(self, client: ComfyClient, begin: float) -> None:
        lost, since = False, None
        while True:
            try:
                if lost:
                    self._recover(client)
                lost = False
                self._fill(client)
                if not self._queued:
                    return
                since = None
                self._follow(client)
            except (ServerUnreachable, PromptLost) as error:
                self.summary.outages += not lost  # it may go again while it is being asked what it has
                lost, now = True, time.monotonic()
                since = since or now
                if now - since > self._patience_s:
                    waited = duration(now - since)
                    raise ComfyError(
                        f"The server answers, but took nothing into its queue for {waited}. {error}"
                    ) from None
                time.sleep(PAUSE_S)
            self.summary.seconds = time.monotonic() - begin
            self._show(self.summary, False)

    # What there is to do

    def plan(self) -> Iterator[Task]:
        """The items whose results are not there yet, in the manifest's order; the others are counted."""
        self._output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._output)
        begun = set()
        for item in self._items:
            task = item if isinstance(item, Refused) else self._task(item)
            if isinstance(task, Refused):
                self.summary.failed.append(task)
            elif task.result in begun:
                self._twins.append(task)
            elif (self._output / task.result).exists():
                self.summary.already_there += 1
            else:
                begun.add(task.result)
                yield task

    def count_twins(self) -> None:
        """At the end: items that stand in the manifest twice share what came of the first."""
        for task in self._twins:
            if (self._output / task.result).exists():
                self.summary.already_there += 1
            else:
                self.fail(task, "it failed further up, where it stands too")

    def _task(self, item: Item) -> Task | Refused:
        paths = tuple(self._base / name for name in item.pictures)
        try:
            if not all(is_picture(path.name) for path in paths):
                raise OSError("a name does not end as a picture's does")
            hashes = tuple(hash_bytes(path.read_bytes()) for path in paths)
        except (OSError, ValueError) as error:
            return Refused(item.line, item.name, f"{item.where}: a picture can't be read: {error}")
        return Task(item, paths, hashes, result_name(item, digest(item, hashes, self._identity)))

    def _chunk(self) -> list[Task]:
        tasks = []
        while len(tasks) < (1 if self._alone else CHUNK):
            task = self._again.popleft() if self._again else next(self._tasks, None)
            if task is None:
                break
            tasks.append(task)
        return tasks

    # On the server

    def _fill(self, client: ComfyClient) -> None:
        while len(self._queued) < (1 if self._alone else QUEUED) and (tasks := self._chunk()):
            try:
                if rows := self._upload(client, tasks):
                    self._queued.append(Queued(self._queue(client, rows), tasks))
            except BaseException:
                self._again.extendleft(reversed(tasks))
                raise

    def _upload(self, client: ComfyClient, tasks: list[Task]) -> list[str]:
        """The manifest's lines for these items, whose pictures are on the server then; what can't be sent leaves the list."""
        rows = []
        for task in list(tasks):
            try:
                names = [self._send(client, path, key) for path, key in zip(task.paths, task.hashes, strict=True)]
            except OSError as error:  # it was deleted meanwhile
                why = f"a picture can't be read: {error}"
            except ServerUnreachable:
                why = (
                    f"the connection broke off {LOSSES} times while a picture was uploaded; it may be too large for it"
                )
            except RequestRefused as error:  # anything else that the server says is about no item, and ends the run
                if error.status not in UNFIT:
                    raise
                why = f"the server does not take a picture: {error}"
            else:
                rows.append(json.dumps({"pictures": names} | fields_of(task.item)))
                continue
            tasks.remove(task)
            self.fail(task, why)
        return rows

    def _send(self, client: ComfyClient, path: Path, key: str) -> str:
        """Upload a picture, and its name there."""
        name = f"{key[:24]}{path.suffix.lower()}"
        return PurePosixPath(self._again_if_cut(client, lambda: client.upload(path, name, UPLOADS))).name

    def _again_if_cut(self, client: ComfyClient, ask: Callable[[], Any]) -> Any:
        """Ask LOSSES times before ServerUnreachable is raised, each time when the server answers."""
        for _ in range(LOSSES - 1):
            try:
                return ask()
            except ServerUnreachable:
                time.sleep(PAUSE_S)
                self._wait(client)
        return ask()

    def _queue(self, client: ComfyClient, rows: Sequence[str]) -> str:
        manifest = "\n".join(rows).encode()
        workflow = copy.deepcopy(self._workflow)
        workflow[self._node]["inputs"]["source"] = client.upload(
            manifest, f"{hash_bytes(manifest)[:24]}.jsonl", UPLOADS
        )
        return client.queue(workflow)

    def _follow(self, client: ComfyClient) -> None:
        queued = self._queued[0]
        pending = {task.result: task for task in queued.tasks}

        def on_event(event: Event) -> None:
            if event.type == "progress_text" and (wrote := re.search(r": wrote (.+\.png)$", event.data["text"])):
                task = pending.get(wrote[1])  # other clients' results are announced too
                if task is not None and self._collect(client, task):
                    del pending[task.result]
                    self._show(self.summary, False)

        result = client.wait(queued.prompt_id, on_event)
        self._queued.popleft()
        reasons = {entry["line"]: entry["reason"] for entry in self._failed(result)}
        for number, task in enumerate(queued.tasks, 1):
            if task.result not in pending or self._collect(client, task):
                continue
            why = reasons.get(number, "the server left no result")
            self.fail(task, why.partition("): ")[2] or why)  # its line is one of the chunk

    def _failed(self, result: Result) -> list[dict[str, Any]]:
        return result.outputs.get(self._node, {}).get("failed", [])

    def _collect(self, client: ComfyClient, task: Task) -> bool:
        """Download a result if the server has it; False: it has not."""
        folder = self._workflow[self._node]["inputs"]["output"]
        result = ImageRef(self._node, task.result, folder, "output")
        try:
            data = self._again_if_cut(client, lambda: client.download(result))
        except ServerUnreachable:
            self.fail(task, f"the connection broke off {LOSSES} times while its result was downloaded")
            return True
        except RequestRefused:
            return False
        save(self._output / task.result, data)
        self.summary.written += 1
        self._since_loss += 1
        self._alone = False
        return True

    def fail(self, task: Task, why: str) -> None:
        """Count an item as failed."""
        item = task.item
        self.summary.failed.append(Refused(item.line, item.name, f"{item.where}: {why}"))

    def _recover(self, client: ComfyClient) -> None:
        """The server has gone: wait for it, take what it has finished, and put the rest of its queue back."""
        self._wait(client)
        for queued in self._queued:
            client.interrupt(queued.prompt_id)  # it is there still if only the connection was lost
        settled = {bad.line for bad in self.summary.failed}
        queued = [task for queued in self._queued for task in queued.tasks if task.item.line not in settled]
        lost = [task for task in queued if not (self._output / task.result).exists()]
        left = [task for task in lost if not self._collect(client, task)]
        self._queued.clear()
        if left and not self._since_loss:
            first, self._alone = left[0], True
            self._losses[first.result] += len(left) == 1
            if self._losses[first.result] == LOSSES:
                self.fail(left.pop(0), f"the server went away {LOSSES} times while it was on this item alone")
        self._since_loss = 0
        self._again.extendleft(reversed(left))

    def _wait(self, client: ComfyClient) -> None:
        begin = time.monotonic()
        while True:
            try:
                client.get("/system_stats")
                return
            except ServerUnreachable as error:
                if time.monotonic() - begin > self._patience_s:
                    raise ComfyError(f"The server stayed away for {duration(self._patience_s)}. {error}") from None
                time.sleep(1)


def fields_of(item: Item) -> dict[str, Any]:
    """An item's line in a manifest, but for its pictures."""
    return {name: getattr(item, name) for name in (*Defaults.__dataclass_fields__, "name")}


def save(path: Path, data: bytes) -> None:
    """Write a result such that it is whole whenever it exists."""
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the name without the contents, and that counts as done
    os.replace(temporary, path)


def _cancel(client: ComfyClient, prompt_id: str) -> None:
    with contextlib.suppress(ComfyError):  # there may be no server to cancel it on
        client.interrupt(prompt_id)


def _read(source: Path, defaults: Defaults) -> tuple[Path, list[Item | Refused]]:
    try:
        if source.is_dir():
            names = sorted(path.name for path in source.iterdir() if path.is_file() and is_picture(path.name))
            if not names:
                raise JobError(f"{source} holds no picture.")
            return source, items_of_pictures(names, defaults)
        return source.parent, read_manifest(source, defaults)
    except (OSError, ValueError) as error:
        raise JobError(f"The manifest can't be read: {error}") from error
