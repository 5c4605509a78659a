"""Small edits for the fault tests: 64x64 pixels, two steps, and a fresh run each time.

ComfyUI answers an equal graph from its cache. `fresh` hands picture 1 through a probe node with a new nonce, so that
encoding and sampling really run again.
"""

import copy
import itertools
import re

import numpy as np
from array_client import ArrayClient
from comfy_client import ExecutionFailed, PromptRejected, Result
from comfy_server import ComfyServer
from graphs import Graph, edit_graph, node

PROMPT = "make it black and white"
_nonce = itertools.count(1)


def picture(seed: int = 0, width: int = 64, height: int = 64) -> np.ndarray:
    """A picture [H, W, 3], float, with slopes and some noise."""
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    slopes = rows * np.array([1.0, 0.6, 0.3]) * 0.7 + columns * np.array([0.1, 0.2, 0.3])
    return np.clip(slopes + np.random.default_rng(seed).normal(0, 0.05, slopes.shape), 0, 1)


def small_edit(client: ArrayClient, *pictures: np.ndarray, prompt: str = PROMPT, **sampler) -> Graph:
    """One edit of `pictures` (one of `picture()` by default)."""
    names = [client.upload_array(p) for p in pictures or (picture(),)]
    return edit_graph(names, prompt, **{"preset": "custom", "steps": 2, "seed": 3} | sampler)


def fresh(graph: Graph) -> Graph:
    """The graph such that encoding, sampling and decoding run again."""
    graph = copy.deepcopy(graph)
    inputs = graph["encode"]["inputs"]
    graph["fresh"] = node("ProbePass", value=inputs["pictures.picture_1"], nonce=str(next(_nonce)))
    inputs["pictures.picture_1"] = ["fresh", 0]
    return graph


def changed(graph: Graph, which: str, **inputs) -> Graph:
    """The graph with other inputs on the node `which`; a value of None removes the input."""
    graph = copy.deepcopy(graph)
    merged = graph[which]["inputs"] | inputs
    graph[which]["inputs"] = {name: value for name, value in merged.items() if value is not None}
    return graph


def between(graph: Graph, source: tuple[str, int], class_type: str, into: str, **inputs) -> Graph:
    """The graph with a node of `class_type` put on every link from `source`; `into` is its linked input."""
    graph = copy.deepcopy(graph)
    for other in graph.values():
        for name, value in other["inputs"].items():
            if value == list(source):
                other["inputs"][name] = ["between", 0]
    graph["between"] = node(class_type, **{into: list(source)}, **inputs)
    return graph


def run_fresh(client: ArrayClient, graph: Graph) -> Result:
    return client.run(fresh(graph), timeout_s=120)


def edited(client: ArrayClient, graph: Graph) -> np.ndarray:
    """The one picture that a really new run of the graph saves."""
    (array,) = client.arrays(run_fresh(client, graph))
    return array


def failure(client: ArrayClient, graph: Graph) -> str:
    """The message with which the graph fails while it runs. It must have run into the error."""
    try:
        result = run_fresh(client, graph)
    except ExecutionFailed as failed:
        return str(failed.details["exception_message"])
    raise AssertionError(f"The edit should have failed, but gave {result.outputs}.")


def refusal(client: ArrayClient, graph: Graph) -> str:
    """The message with which ComfyUI refuses to queue the graph."""
    try:
        client.queue(fresh(graph))
    except PromptRejected as rejected:
        return str(rejected)
    raise AssertionError("The workflow should have been refused.")


def note(result: Result, which: str) -> str:
    """What the node shows below itself."""
    return "\n".join(result.outputs[which]["text"])


def look(client: ArrayClient) -> dict:
    """What ComfyUI's memory manager and the pack hold (see `probe_nodes`)."""
    return client.get("/qwen_edit_probe")


def reads(server: ComfyServer) -> int:
    """How often the server has read a transformer from disk."""
    return len(re.findall("Qwen Edit Fast: reading the transformer of", server.log.read_text(errors="replace")))


def starved(graph: Graph, times: int, kind: str, nonce: str = "1") -> Graph:
    """The graph with a sampler whose memory runs out so many times."""
    graph = changed(graph, "sampler", model=["starved", 0])
    options = {"times": times, "kind": kind, "nonce": nonce + str(np.random.default_rng().integers(2**32))}
    return graph | {"starved": node("ProbeOutOfMemory", model=["loader", 0], **options)}
