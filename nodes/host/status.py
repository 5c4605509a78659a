"""``GET /qwen_edit/status``: what a service that runs this server unattended asks it.

``ready`` is true once an edit has been made and for as long as the weights it was made with are in memory, so that a load
balancer which waits for it sends no work to a server that would still have to read 40 GB. ``workflows/api/warm_up.json``
makes it so.
"""

import re
import threading
from collections import Counter

import comfy.model_management
import psutil
from aiohttp import web
from server import PromptServer

from ...qwen_edit.errors import INPUT
from .doctor import environment, models_in_memory, public

ROUTE = "/qwen_edit/status"
MAX_ERROR = 2000  # characters
LOOKED_AT = 64  # prompts of ComfyUI's history

_LOCK = threading.Lock()
_COUNTERS: Counter[str] = Counter(dict.fromkeys(("edits", "items_written", "items_already_there", "items_failed"), 0))
_ITEM_ERROR: list[str] = []  # the last, of a batch


def count(what: str, by: int = 1) -> None:
    with _LOCK:
        _COUNTERS[what] += by


def keep_error(text: str) -> None:
    """Remember what a batch's item failed with; a prompt that fails is in ComfyUI's history."""
    with _LOCK:
        _ITEM_ERROR[:] = [text]


def register() -> None:
    """Add the route to ComfyUI's server; called once, when ComfyUI loads the pack."""
    PromptServer.instance.routes.get(ROUTE)(_answer)


async def _answer(request: web.Request) -> web.Response:
    if request.query:
        return web.json_response({"error": f"{INPUT} This takes no parameters."}, status=400)
    queue = PromptServer.instance.prompt_queue
    running, waiting = queue.get_current_queue_volatile()
    with _LOCK:
        counters, item_error = dict(_COUNTERS), list(_ITEM_ERROR)
    models, transformer_loaded = _resident()
    return web.json_response(
        {
            "ready": bool(counters["edits"]) and transformer_loaded,
            "queue": {"running": len(running), "waiting": len(waiting)},
            "resident_bytes": {"models": models, "process": psutil.Process().memory_info().rss},
            "last_error": {
                "prompt": _prompt_error(queue),
                "item": public(item_error[0])[:MAX_ERROR] if item_error else None,
            },
            "counters": counters,
            "environment": environment(models_in_memory()),
        }
    )


def _resident() -> tuple[int, bool]:
    """Bytes of all models that ComfyUI holds on its device, and whether one of them is a transformer."""
    size, transformer = 0, False
    for loaded in list(comfy.model_management.current_loaded_models):
        patcher = loaded.model
        if patcher is not None:
            size += loaded.model_loaded_memory()
            transformer = transformer or hasattr(patcher.model, "diffusion_model")
    return size, transformer


def _prompt_error(queue) -> dict | None:
    """What the last failed prompt failed with; None if none of the last ones did."""
    recent = queue.get_history(max_items=LOOKED_AT, map_function=_error_of)
    return next((error for error in reversed(recent.values()) if error is not None), None)


def _error_of(entry: dict) -> dict | None:
    messages = dict(entry["status"]["messages"]) if entry.get("status") else {}
    failed = messages.get("execution_error")
    if failed is None:
        return None
    text = public(str(failed["exception_message"]).strip())
    code = re.match(r"\[(QE_\w+)\]", text)
    return {
        "prompt_id": failed["prompt_id"],
        "node_type": failed["node_type"],
        "code": code[1] if code else None,
        "message": text[:MAX_ERROR],
    }
