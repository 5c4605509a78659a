"""One graph in which every node of the pack stands once, and the widgets of each, for tests that give them bad values."""

import json
from pathlib import Path
from typing import Any

from array_client import ArrayClient, to_png
from batches import batch_graph
from comfy_client import ExecutionFailed, PromptRejected
from edits import changed, picture, small_edit
from graphs import Graph, node

INFO = json.loads((Path(__file__).parent / "object_info.json").read_text(encoding="utf-8"))
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")


def every_node(client: ArrayClient) -> Graph:
    """A small edit and the other nodes around it; the nodes' ids are the names that `edit_graph` gives them, and these."""
    graph = small_edit(client, steps=1, true_cfg_scale=1.0)
    recipe = {"preset": "custom", "true_cfg_scale": 1.0, "shift": 0.0}
    conditioning = {"positive": ["encode", 0], "negative": ["encode", 1], "latent": ["encode", 2]}
    slots = {f"lora_{i}": "none" for i in range(1, 5)} | {f"strength_{i}": 1.0 for i in range(1, 5)}
    size = {"target": "area", "megapixels": 0.01, "longest_side": 64, "fit": "pad"}
    client.upload(to_png(picture()), "a.png", subfolder="every node")
    batch = batch_graph("every node", "every node", width=64, height=64, steps=1, true_cfg_scale=1.0)["batch"]
    return graph | {
        "accelerate": node("QwenEditAccelerate", model=["loader", 0], attention="auto"),
        "switch": node("QwenEditLoraSwitch", model=["loader", 0], mode="auto", **slots),
        "cache": node("QwenEditReferenceCache", model=["loader", 0], tolerance=0.1),
        "preset": node("QwenEditStepPreset", model=["loader", 0], latent=["encode", 2], steps=1, **recipe),
        "sweep": node(
            "QwenEditStepSweep",
            model=["loader", 0],
            **conditioning,
            vae=["loader", 2],
            sweep="1, 2",
            seed=3,
            theme="dark",
            **recipe,
        ),
        "batch": batch,
        "resize": node("QwenEditSmartResize", image=["picture_1", 0], **size),
        "restore": node(
            "QwenEditRestoreSize", image=["resize", 0], geometry=["resize", 1], mask=["mask", 0], feather=16
        ),
        "mask": node("SolidMask", value=0.5, width=64, height=64),
        "logger": node("QwenEditPerfLogger", value=["picture_1", 0], label="tap", include_text=False),
        "keep": node("QwenEditSave", images=["picture_1", 0], filename_prefix="every node", format="png"),
        "report": node("QwenEditPerfReport", image=["picture_1", 0], export="off", theme="dark"),
    }


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[1:] in ([0], [1], [2])


def widgets(graph: Graph) -> list[tuple[str, str, str]]:
    """Id, input and kind (one of `WIDGETS`) of every widget of the pack's nodes in a graph."""
    return [
        (which, name, kind)
        for which, one in graph.items()
        if one["class_type"] in INFO
        for name, _, kind, _ in INFO[one["class_type"]]["inputs"]
        if kind in WIDGETS
    ]


def linked(graph: Graph, which: str, name: str, value: Any) -> Graph:
    """The graph with a value that comes through a link, which ComfyUI checks neither for type nor for range."""
    return changed(graph, which, **{name: ["value", 0]}) | {"value": node("ProbeJson", value={"is": value})}


def only(graph: Graph, *which: str) -> Graph:
    """These nodes and what they need, shown."""
    needed, ahead = set(), list(which)
    while ahead:
        at = ahead.pop()
        needed.add(at)
        ahead += [value[0] for value in graph[at]["inputs"].values() if is_link(value)]
    shown = {f"shown {name}": node("PreviewAny", source=[name, 0]) for name in which}
    return {name: graph[name] for name in needed} | shown


def complaint(client: ArrayClient, graph: Graph, which: str) -> str:
    """The message with which ComfyUI refuses the node's inputs, or with which it fails while it runs."""
    try:
        result = client.run(only(graph, which), timeout_s=120)
    except PromptRejected as rejected:
        return str(rejected)
    except ExecutionFailed as failed:
        return str(failed.details["exception_message"])
    raise AssertionError(f"{which} should have been refused, but gave {result.outputs}.")
