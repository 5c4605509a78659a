"""One edit as the command line sees it: pictures and an instruction in, picture files out.

Fills a workflow in API format by finding its nodes by their class, so that any workflow with these
nodes works, not only the shipped ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from comfy_client import ComfyClient, ComfyError, Event, Interrupted, node_order
from comfy_host import REPO, write_atomically

WORKFLOWS = REPO / "workflows" / "api"
SHIPPED = {1: "single_edit.json", 2: "two_references.json"}


class JobError(RuntimeError):
    """What was asked for does not fit together. The text says what to change."""


@dataclass(frozen=True)
class Edit:
    """One instruction for one or more pictures, and where the result goes (a .png path, or .webp).

    None leaves what the workflow says.
    """

    pictures: tuple[Path, ...]
    prompt: str
    output: Path
    preset: str | None = None
    seed: int | None = None
    model: str | None = None
    megapixels: float | None = None


@dataclass(frozen=True)
class Edited:
    """A finished edit: ComfyUI's id of it and the files that were written."""

    prompt_id: str
    paths: list[Path]


def load_workflow(pictures: int, named: Path | None = None) -> dict[str, Any]:
    """The workflow for this number of pictures, or the one that is named. Raises JobError."""
    if named is None and pictures not in SHIPPED:
        raise JobError(
            f"The shipped workflows take one or two pictures, not {pictures}. Save a workflow with "
            f"{pictures} Load Image nodes from ComfyUI (Export, API) and name it with --workflow."
        )
    path = named or WORKFLOWS / SHIPPED[pictures]
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"The workflow {path} cannot be read: {error}") from error
    if not isinstance(workflow, dict) or not all("class_type" in node for node in workflow.values()):
        raise JobError(f"{path} is not a workflow in API format. In ComfyUI, use Export (API) to save one.")
    return workflow


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model makes pictures of which size, and in which workflow."""
    parser.add_argument(
        "--model", metavar="NAME",
        help="as Qwen Edit Loader lists it: a folder or checkpoint (default: the workflow's, which is the demo model)",
    )  # fmt: skip
    parser.add_argument(
        "--megapixels", type=float, metavar="N",
        help="of the picture that the model makes (default: 1 with --model, else the workflow's)",
    )  # fmt: skip
    parser.add_argument("--workflow", type=Path, metavar="FILE", help="another workflow in API format")


def megapixels_for(options: argparse.Namespace) -> float | None:
    """Megapixels (2²⁰ px) to set in a workflow; None leaves what it says.

    The shipped ones, taken when none is named, have the demo model's size, a fourteenth of what real weights like.
    """
    own_weights = options.model is not None and not options.model.startswith("demo")
    return 1.0 if options.megapixels is None and options.workflow is None and own_weights else options.megapixels


def nodes_of(workflow: dict[str, Any], class_type: str) -> list[str]:
    """Ids of the nodes of a class, in order."""
    return sorted((n for n, node in workflow.items() if node["class_type"] == class_type), key=node_order)


def fill_workflow(workflow: dict[str, Any], names: list[str], edit: Edit) -> dict[str, Any]:
    """A copy of the workflow with the edit's values; `names` are the uploaded pictures. Raises JobError."""
    filled = copy.deepcopy(workflow)
    loaders = nodes_of(filled, "LoadImage")
    if len(loaders) != len(names):
        raise JobError(f"The workflow has {len(loaders)} Load Image nodes, but there are {len(names)} pictures.")
    for node, name in zip(loaders, names, strict=True):
        filled[node]["inputs"]["image"] = name
    _set(filled, "QwenEditEncode", "prompt", edit.prompt)
    _set(filled, "QwenEditSampler", "preset", edit.preset)
    _set(filled, "QwenEditSampler", "seed", edit.seed)
    _set(filled, "QwenEditLoader", "model", edit.model)
    _set(filled, "QwenEditSmartResize", "megapixels", edit.megapixels)
    return filled


def _set(workflow: dict[str, Any], class_type: str, name: str, value: str | float | None) -> None:
    if value is None:
        return
    nodes = nodes_of(workflow, class_type)
    if not nodes:
        raise JobError(f"The workflow has no {class_type} node to set {name} on.")
    for node in nodes:
        workflow[node]["inputs"][name] = value


def run_edit(client: ComfyClient, workflow: dict[str, Any], edit: Edit) -> Edited:
    """Upload, queue, show the progress, download. Raises ComfyError.

    When it is stopped (Ctrl-C), the prompt is taken out of ComfyUI's queue.
    """
    filled = fill_workflow(workflow, [client.upload(picture) for picture in edit.pictures], edit)
    prompt_id = client.queue(filled)
    try:
        with ProgressBar(filled) as bar:
            result = client.wait(prompt_id, bar.show)
    except Interrupted:
        raise
    except BaseException as error:
        if not isinstance(error, ComfyError):
            client.interrupt(prompt_id)
        raise
    images = result.images()
    if not images:
        raise ComfyError("The workflow finished, but it has no Save Image node that left a picture.")
    paths = []
    for number, image in enumerate(images, 1):
        paths.append(ending_like(numbered(edit.output, number), image.filename))
        write_atomically(paths[-1], client.download(image))
    return Edited(prompt_id, paths)


def numbered(path: Path, number: int) -> Path:
    """`path` for the first picture, name_2.png, name_3.png for the others."""
    return path if number == 1 else path.with_stem(f"{path.stem}_{number}")


def ending_like(path: Path, saved: str) -> Path:
    """`path` with the ending of the server's file `saved`: a workflow need not save PNG files. A file that is there already
    was not named by anybody, so another name is taken."""
    suffix = Path(saved).suffix
    if suffix.lower() == path.suffix.lower():
        return path
    found, number = path.with_suffix(suffix), 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}_{number}{suffix}")
    return found


class ProgressBar:
    """Shows a prompt's events on a terminal as one line, elsewhere as a line for each node."""

    WIDTH = 30

    def __init__(self, workflow: dict[str, Any], stream: TextIO | None = None):
        self._workflow = workflow
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._drawn = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._draw("")

    def show(self, event: Event) -> None:
        """Take one event of the prompt."""
        if event.type == "execution_cached" and (nodes := event.data["nodes"]):
            self._line(f"  {len(nodes)} of {len(self._workflow)} nodes are unchanged since the last time")
        elif event.type == "executing" and (node := event.data.get("node")):
            text = f"  {self._title(node)}"
            if self._live:
                self._draw(text)
            else:
                self._line(text)
        elif event.type == "progress" and self._live:
            value, total = event.data["value"], max(event.data["max"], 1)
            bar = "#" * round(self.WIDTH * value / total)
            self._draw(f"  {self._title(event.data['node'])} [{bar:.<{self.WIDTH}}] {value:g}/{total:g}")

    def _title(self, node: str) -> str:
        # A node that was expanded at run time is not in the workflow that was queued.
        described = self._workflow.get(node, {"class_type": f"node {node}"})
        return described.get("_meta", {}).get("title") or described["class_type"]

    def _line(self, text: str) -> None:
        self._draw("")
        print(text, file=self._stream, flush=True)

    def _draw(self, text: str) -> None:
        if self._live:
            self._stream.write("\r" + text + " " * (self._drawn - len(text)) + ("" if text else "\r"))
            self._stream.flush()
            self._drawn = len(text)
