"""Findings of ``qwen_edit.doctor`` shown on the node, logged once for each prompt, and kept for ``GET /qwen_edit/doctor``.

A prompt's record begins when a node of the pack reports in it, with or without findings. Nodes that ComfyUI answers from its
cache do not run and report nothing; what they found is in their cached texts.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict
from weakref import WeakKeyDictionary

import comfy.model_management
import folder_paths
import torch
from aiohttp import web
from comfy.cli_args import args
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from comfyui_version import __version__ as comfyui_version
from server import PromptServer

from ...qwen_edit.attention_auto import installed
from ...qwen_edit.doctor import Finding, ModelFacts, without_paths
from ...qwen_edit.errors import INPUT

ROUTE = "/qwen_edit/doctor"
KEPT_PROMPTS = 32
MAX_ID = 128  # characters of a prompt id in a request

_LOCK = threading.Lock()  # prompts run in one thread, requests are answered in another
_PROMPTS: OrderedDict[str, dict[Finding, str]] = OrderedDict()  # prompt id -> finding -> the node that told it first
_MODELS: WeakKeyDictionary[torch.nn.Module, ModelFacts] = WeakKeyDictionary()


class Report(ui.PreviewText):
    """What a node shows after it ran: its lines, and beside them what the page has words of its own for, in the language of
    the user: the findings among them, and what was chosen to run.

    Args:
        facts: of the model that the node chose how to run.
    """

    def __init__(self, lines: Iterable[str | Finding], facts: ModelFacts | None = None):
        lines = list(lines)
        super().__init__("\n".join(line.line if isinstance(line, Finding) else line for line in lines))
        self._findings = [asdict(line) for line in lines if isinstance(line, Finding)]
        self._chosen = [] if facts is None else [f"{facts.version} · {facts.precision} · {facts.attention}"]

    def as_dict(self) -> dict:
        return super().as_dict() | {"findings": self._findings, "chosen": self._chosen}


def report(findings: Iterable[Finding], unseen: Iterable[Finding] = ()) -> list[Finding]:
    """The findings, for the ``Report`` of the node that is being executed; shown at once, while it still runs.

    Args:
        unseen: findings that another node shows; kept under this node if the other did not run in this prompt.
    """
    findings = list(findings)
    context = get_executing_context()
    prompt, node = (context.prompt_id, context.node_id) if context is not None else ("", "")
    with _LOCK:
        record = _PROMPTS.setdefault(prompt, {})
        _PROMPTS.move_to_end(prompt)
        new = [finding for finding in dict.fromkeys([*unseen, *findings]) if finding not in record]
        record.update(dict.fromkeys(new, node))
        while len(_PROMPTS) > KEPT_PROMPTS:
            _PROMPTS.popitem(last=False)
    for finding in new:
        level = logging.WARNING if finding.severity == "warning" else logging.INFO
        logging.log(level, "Qwen Edit Fast: %s", finding.line)
    if findings and context is not None:
        PromptServer.instance.send_progress_text("\n".join(finding.line for finding in findings), node)
    return findings


def keep_facts(model: torch.nn.Module, facts: ModelFacts) -> None:
    """Remember what a model is, for as long as it lives."""
    with _LOCK:
        _MODELS[model] = facts


def server_flags() -> tuple[str, ...]:
    """The options of ComfyUI's command line that change its numerics."""
    fast = ["--fast " + " ".join(sorted(feature.value for feature in args.fast))] if args.fast else []
    return tuple(fast + (["--use-sage-attention"] if args.use_sage_attention else []))


def register() -> None:
    """Add the route to ComfyUI's server; called once, when ComfyUI loads the pack."""
    PromptServer.instance.routes.get(ROUTE)(_answer)


async def _answer(request: web.Request) -> web.Response:
    """The findings of the last prompt that one of our nodes ran in, or of ``?prompt_id=``, and what they ran on."""
    asked = request.query.getall("prompt_id", [])
    if set(request.query) - {"prompt_id"} or len(asked) > 1 or any(not 0 < len(one) <= MAX_ID for one in asked):
        return _refused(400, f"{INPUT} This takes one prompt_id of up to {MAX_ID} characters, or nothing.")
    with _LOCK:
        prompt = asked[0] if asked else next(reversed(_PROMPTS), None)
        if asked and prompt not in _PROMPTS:
            return _refused(404, f"{INPUT} No node of this pack ran in that prompt, or it was too long ago.")
        record = {} if prompt is None else dict(_PROMPTS[prompt])
        models = list(_MODELS.values())
    findings = [
        {"code": f.code, "severity": f.severity, "sentence": public(f.sentence), "node_id": node}
        for f, node in record.items()
    ]
    return web.json_response({"prompt_id": prompt, "findings": findings, "environment": environment(models)})


def _refused(status: int, error: str) -> web.Response:
    return web.json_response({"error": error}, status=status)


def models_in_memory() -> list[ModelFacts]:
    with _LOCK:
        return list(_MODELS.values())


def environment(models: list[ModelFacts]) -> dict:
    """What this server runs on, and with which choices, and why."""
    device = comfy.model_management.get_torch_device()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "card": card,
        "total_memory_gib": round(comfy.model_management.get_total_memory(device) / 2**30, 2),
        "torch": torch.__version__,
        "comfyui": comfyui_version,
        "comfy_kitchen": installed("comfy-kitchen"),
        "flags": list(server_flags()),
        "models": [
            {
                "model": facts.model,
                "version": facts.version,
                "version_by": facts.version_by,
                "precision": facts.precision,
                "attention": facts.attention,
                "attention_why": public(facts.attention_why),
                "kernels": facts.kernels,
                "kernels_why": public(facts.kernels_why),
            }
            for facts in models
        ],
    }


def public(text: str) -> str:
    """A text without this machine's folders."""
    return without_paths(text, folder_paths.get_user_directory(), folder_paths.base_path)
