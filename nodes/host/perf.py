"""Recording one prompt from ComfyUI's own events, without touching its code.

A run begins when ComfyUI asks a QwenEditPerfLogger or QwenEditPerfReport node for its fingerprint, which it does for every prompt
that holds one, before the first node and whatever is cached. From then on a progress handler sees each node
start, step and finish, native ones too. ComfyUI has no event for the end of a prompt, so a thread per
recorded prompt looks at the queue's history, which also tells success, error and interrupt; meanwhile it
samples how busy the machine is. When the prompt is over it writes the line and ends, and the next prompt's
reset of the progress state closes the run in any case, so a failed or interrupted prompt leaves nothing
behind.
"""

import hashlib
import logging
import re
import threading
import weakref

import comfy.model_management
from comfy_execution.graph_utils import is_link
from comfy_execution.progress import ProgressHandler, add_progress_handler, get_progress_state
from server import PromptServer

from ...qwen_edit import perf
from .perf_panel import NAME, log_path, send

NODE = "QwenEditPerfLogger"
COMFYUI_ENCODES = {"TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus"}
FAST_FORWARD = {"QwenEditLoader", "QwenEditAccelerate"}
POLL_S = 0.05
SAMPLE_EVERY = 4  # polls between two looks at the machine
# A finished prompt that is in neither the queue nor the history: the history was cleared in between.
GONE_AFTER = 10  # polls
SEND_EVERY = 8  # polls between two messages to the panel in the browser
MAX_TEXT = 2000  # characters of one text input


def ensure_run() -> perf.Run | None:
    """The run of the executing prompt, begun if this is the first logger to ask; None outside of one."""
    registry = get_progress_state()
    known = registry.handlers.get(NAME)
    if isinstance(known, _Handler):
        return known.run
    queue = PromptServer.instance.prompt_queue
    if not _is_running(queue, registry.prompt_id):
        return None
    run = perf.Run(comfy.model_management.get_torch_device(), registry.prompt_id)
    if any(_asks_for_text(node) for node in registry.dynprompt.original_prompt.values()):
        run.text = _texts(registry.dynprompt.original_prompt)
    prompt = registry.dynprompt.original_prompt.values()
    run.graph = hashlib.sha256("\n".join(sorted(node["class_type"] for node in prompt)).encode()).hexdigest()[:12]
    run.facts.update(_native_facts(prompt))
    add_progress_handler(_Handler(run))
    perf.activate(run)
    arguments = (run, queue, registry.dynprompt, PromptServer.instance.client_id)
    threading.Thread(target=_follow, args=arguments, name="qwen-edit-perf", daemon=True).start()
    return run


def earlier_runs(record: dict, count: int) -> list[dict]:
    """The log's latest runs of the graph that `record` is of, newest first."""
    return perf.previous_runs(record, perf.read_records(log_path()), count)


def so_far(run: perf.Run, node_id: str) -> dict:
    """The record up to a node that is being executed. What it depends on and what did not run was in ComfyUI's cache, which
    says so only at the end of the prompt."""
    graph = get_progress_state().dynprompt
    seen, ahead = set(), [node_id]
    while ahead:
        at = ahead.pop()
        if at not in seen and graph.has_node(at):
            seen.add(at)
            run.node_cached(at, _class_type(graph, at))  # passed over for nodes that ran
            ahead += [value[0] for value in graph.get_node(at)["inputs"].values() if is_link(value)]
    return run.record("so far", wait=False)


class _Handler(ProgressHandler):
    """Passes ComfyUI's progress events on to a run. What goes wrong here must not reach the prompt."""

    def __init__(self, run: perf.Run):
        super().__init__(NAME)
        self.run = run
        self._models = weakref.WeakSet(_loaded_models())

    def set_registry(self, registry):
        self._dynprompt = registry.dynprompt

    def start_handler(self, node_id, state, prompt_id):
        self._guarded(self.run.node_started, node_id, _class_type(self._dynprompt, node_id))

    def update_handler(self, node_id, value, max_value, state, prompt_id, image=None):
        self._guarded(self.run.progress, node_id, value)

    def finish_handler(self, node_id, state, prompt_id):
        self._guarded(self._finished, node_id)

    def reset(self):
        perf.deactivate(self.run)

    def _finished(self, node_id):
        self.run.node_finished(node_id)
        for model in _loaded_models():
            if model not in self._models:
                self._models.add(model)
                self.run.models_loaded.append(type(model).__name__)

    def _guarded(self, call, *args):
        try:
            call(*args)
        except Exception:
            self.disable()
            logging.warning("Qwen Edit Fast: the performance log of this prompt is incomplete.", exc_info=True)


def _follow(run: perf.Run, queue, dynprompt, client_id: str | None) -> None:
    """Until the prompt is over: sample, and show its client how far it is. Then write its line."""
    waiting = threading.Event()
    polls = gone = 0
    try:
        while True:
            entry = queue.get_history(run.run_id, map_function=lambda item: item["status"]).get(run.run_id)
            gone = 0 if entry or _is_running(queue, run.run_id) else gone + 1
            if entry or gone >= GONE_AFTER:
                break
            waiting.wait(POLL_S)
            polls += 1
            if polls % SAMPLE_EVERY == 0:
                run.monitor.sample()
            if polls % SEND_EVERY == 0 and client_id is not None:
                send(run.record("running", wait=False), None, client_id)
        perf.deactivate(run)
        for node_id in _cached(entry):
            run.node_cached(node_id, _class_type(dynprompt, node_id))
        record = run.record(**_outcome(entry, run.started_at))
        earlier = earlier_runs(record, 1)
        perf.append_record(log_path(), record)
        send(record, perf.advise(record, earlier[0] if earlier else None), None)
    except Exception:
        logging.warning("Qwen Edit Fast: the performance log of a prompt was lost.", exc_info=True)
    finally:
        perf.deactivate(run)


def _outcome(status: dict | None, started_at: float) -> dict:
    """Status, wall time and error for `Run.record`, from the status that ComfyUI keeps in its history."""
    if not status:
        return {"status": "unknown"}
    messages = dict(status["messages"])
    name, last = status["messages"][-1]
    total_ms = last["timestamp"] - started_at * 1000
    if "execution_interrupted" in messages:
        return {"status": "interrupted", "total_ms": total_ms}
    if name == "execution_error":
        code = re.match(r"\[(QE_\w+)\]", last["exception_message"])
        error = {"node_id": last["node_id"], "class_type": last["node_type"], "type": last["exception_type"]}
        return {"status": "error", "total_ms": total_ms, "error": error | ({"code": code[1]} if code else {})}
    return {"status": status["status_str"], "total_ms": total_ms}


def _cached(status: dict | None) -> list[str]:
    messages = dict(status["messages"]) if status else {}
    return messages.get("execution_cached", {}).get("nodes", [])


def _class_type(dynprompt, node_id: str) -> str:
    return dynprompt.get_node(node_id)["class_type"] if dynprompt.has_node(node_id) else "unknown"


def _is_running(queue, prompt_id: str | None) -> bool:
    return any(item[1] == prompt_id for item in queue.get_current_queue_volatile()[0])


def _loaded_models() -> list:
    patchers = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    return [patcher.model for patcher in patchers if patcher is not None]


def _asks_for_text(node: dict) -> bool:
    return node["class_type"] == NODE and node["inputs"].get("include_text") is True


def _native_facts(nodes) -> dict[str, float | bool]:
    """Steps and guidance of ComfyUI's KSampler, where its widgets say them, and which of our parts an edit does without."""
    found: dict[str, float | bool] = {}
    kinds = {node["class_type"] for node in nodes}
    if kinds & COMFYUI_ENCODES:
        found["native_encoding"] = True
        if not kinds & FAST_FORWARD:
            found["native_forward"] = True
    for node in nodes:
        if node["class_type"] in ("KSampler", "KSamplerAdvanced"):
            for name, fact in (("steps", "steps"), ("cfg", "true_cfg_scale")):
                value = node["inputs"].get(name)
                if isinstance(value, int | float):
                    found[fact] = value
    return found


def _texts(prompt: dict) -> dict[str, str]:
    return {
        f"{node_id}.{name}": value[:MAX_TEXT]
        for node_id, node in prompt.items()
        for name, value in node["inputs"].items()
        if isinstance(value, str) and not is_link(value)
    }
