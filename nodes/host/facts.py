"""What ``qwen_edit.doctor`` goes by, read off ComfyUI's objects."""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from comfy_execution.graph_utils import is_link
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ...qwen_edit.attention import KernelChoice
from ...qwen_edit.checkpoints import TransformerSource
from ...qwen_edit.doctor import NO_MARK, LoraFacts, ModelFacts, RunFacts
from ...qwen_edit.kernels import FusedKernels
from ...qwen_edit.perf import record_facts
from ...qwen_edit.precision import Precision
from ...qwen_edit.recipes import Recipe
from .doctor import server_flags
from .lora import LORAS, LoraStack


def model_facts(
    source: TransformerSource, precision: Precision, attention: KernelChoice, kernels: FusedKernels
) -> ModelFacts:
    """Of a transformer of QwenEditLoader."""
    return ModelFacts(
        model=source.label,
        version=_version(source),
        version_by=source.version_by,
        precision=precision.name,
        **_what_runs(attention, kernels),
    )


def _what_runs(attention: KernelChoice, kernels: FusedKernels) -> dict[str, Any]:
    return {
        "attention": attention.name,
        "attention_wanted": attention.wanted,
        "attention_why": attention.why,
        "attention_fell_back": attention.fell_back,
        "kernels": kernels.name,
        "kernels_why": kernels.why,
        "kernels_fell_back": kernels.fell_back,
        "flags": server_flags(),
    }


def facts_of_model(model) -> ModelFacts:
    """Of a MODEL of QwenEditLoader."""
    transformer = model.model.diffusion_model
    return model_facts(model.model.source, transformer.precision, transformer.attention, transformer.kernels)


def run_facts(model, recipe: Recipe) -> RunFacts:
    """Of an edit with a MODEL of QwenEditLoader, sampled by the node that is being executed."""
    source: TransformerSource = model.model.source
    stack: LoraStack = model.model_options["transformer_options"].get(LORAS, LoraStack())
    ours = [
        LoraFacts(item.lora.path.name, item.strength, len(item.lora.scales), len(item.lora.skipped))
        for item in stack.active
    ]
    patched = bool(model.patches or model.injections)
    native = _native_loras() if patched else []
    return RunFacts(
        model=source.label,
        version=_version(source),
        steps=recipe.steps,
        true_cfg_scale=recipe.true_cfg_scale,
        loras=(*ours, *native),
        other_patches=patched and not native,
    )


def log_run(model, recipe: Recipe) -> None:
    """Tell the performance log what is sampled, with a MODEL of QwenEditLoader."""
    transformer = model.model.diffusion_model
    record_facts(
        steps=recipe.steps,
        true_cfg_scale=recipe.true_cfg_scale,
        attention=transformer.attention.name,
        attention_fell_back=transformer.attention.fell_back,
        precision=transformer.precision.name,
        streamed=transformer.streamed,
    )


def _version(source: TransformerSource) -> str:
    return "2511" if source.config.get("zero_cond_t") else "2509"


def native_model_facts(
    dtype: torch.dtype, zero_cond_t: bool, attention: KernelChoice, kernels: FusedKernels
) -> ModelFacts:
    """Of a MODEL that another loader made; its file is the one that the loader's widget names.

    Args:
        zero_cond_t: whether ComfyUI found the mark of 2511.
    """
    names = (inputs.get("unet_name", inputs.get("ckpt_name")) for inputs in _upstream())
    file = next((name for name in names if isinstance(name, str)), "this MODEL")
    return ModelFacts(
        model=_file_name(file),
        version="2511" if zero_cond_t else "2509",
        version_by="the file's mark" if zero_cond_t else NO_MARK,
        precision=Precision("", dtype, None, "").name,
        **_what_runs(attention, kernels),
    )


def _native_loras() -> list[LoraFacts]:
    """LoRAs of other loaders, by the widgets that ComfyUI's have. A MODEL itself holds the patches only, without the names
    of their files."""
    found = []
    for inputs in _upstream():
        name, strength = inputs.get("lora_name"), inputs.get("strength_model", 1.0)
        if isinstance(name, str):
            number = float(strength) if isinstance(strength, int | float) and math.isfinite(strength) else 1.0
            if number != 0:
                found.append(LoraFacts(_file_name(name), number))
    return found[::-1]


def _upstream() -> Iterator[dict]:
    """The inputs of the node that is being executed and of those before it along the links named model."""
    context = get_executing_context()
    graph = get_progress_state().dynprompt
    seen, at = set(), context.node_id if context is not None else None
    while at is not None and at not in seen and graph.has_node(at):
        seen.add(at)
        inputs = graph.get_node(at)["inputs"]
        yield inputs
        link = inputs.get("model")
        at = link[0] if is_link(link) else None


def _file_name(name: str) -> str:
    return re.split(r"[\\/]", name)[-1]
