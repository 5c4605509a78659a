"""LoRAs of QwenEditLoraSwitch in ComfyUI: resident, accounted for, named by each MODEL for itself.

A MODEL says which LoRAs it wants in ``transformer_options``; nothing is set on the shared weights, so two
branches of one graph with different LoRAs do not disturb each other.
"""

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...qwen_edit.checkpoints import fingerprint
from ...qwen_edit.linear import NO_ADAPTERS, Adapters, LowRank
from ...qwen_edit.lora import read_lora
from ...qwen_edit.quantize import is_modulation
from .memory import Owner, ShellPatcher

LORAS = "qwen_edit_loras"  # key in transformer_options and among the patcher's additional models

POOL: Owner[ShellPatcher] = Owner(lambda patcher: [patcher])


class _Weights(torch.nn.ParameterDict):
    """With what transformers make of each layer, which lies on the same device and leaves it with them."""

    def __init__(self) -> None:
        super().__init__()
        self.derived: defaultdict[str, dict] = defaultdict(dict)

    def _apply(self, fn, recurse=True):
        for made in self.derived.values():
            made.clear()
        return super()._apply(fn, recurse)


class ResidentLora(torch.nn.Module):
    """One LoRA's layers; a shell (see ``memory.py``)."""

    def __init__(self, path: Path, model_config: Mapping[str, object], dtype: torch.dtype):
        super().__init__()
        self.path, self.model_config, self.dtype = path, model_config, dtype
        self.fingerprint = fingerprint([path])
        self.device: torch.device | None = None
        self.weights = _Weights()
        self.scales: dict[str, float] = {}
        self._answer: tuple[weakref.ref, float, list[tuple[torch.nn.Module, LowRank]]] | None = None
        self.fill(torch.device("cpu"))

    @property
    def is_empty(self) -> bool:
        return len(self.weights) == 0

    def fill(self, device: torch.device) -> None:
        file = read_lora(self.path, self.model_config, self.dtype)
        self.skipped, self.scales = file.skipped, {}
        for name, layer in file.layers.items():
            key = name.replace(".", "/")  # ParameterDict takes no dots
            for part, tensor in (("a", layer.a), ("b", layer.b)):
                moved = tensor.to(device, self.dtype)
                self.weights[f"{key}/{part}"] = torch.nn.Parameter(moved, requires_grad=False)
            self.scales[name] = layer.scale

    def empty(self) -> None:
        self.weights = _Weights()
        self._answer = None

    def addends(self, transformer: torch.nn.Module, strength: float) -> list[tuple[torch.nn.Module, LowRank]]:
        """What each linear of ``transformer`` gets; asked for every forward, so the last answer is kept."""
        if self._answer is None or self._answer[0]() is not transformer or self._answer[1] != strength:
            weights: Any = self.weights._parameters  # a dict: ParameterDict's own lookup takes ten times as long
            layers, derived = [], self.weights.derived
            for name, scale in self.scales.items():
                key = name.replace(".", "/")
                parts = weights[f"{key}/a"], weights[f"{key}/b"]
                layers.append((transformer.get_submodule(name), LowRank(*parts, scale * strength, derived[key])))
            self._answer = weakref.ref(transformer), strength, layers
        return self._answer[2]


class LoraPatcher(ShellPatcher):
    """Counts, on a card, also what a transformer lays out of the LoRA (see ``extra_channels.py``): about as much again."""

    def model_size(self):
        return super().model_size() * (2 if self.load_device.type == "cuda" else 1)


@dataclass(frozen=True)
class ActiveLora:
    """A LoRA and how strongly a MODEL wants it."""

    lora: ResidentLora
    strength: float


@dataclass(frozen=True)
class LoraStack:
    """What one MODEL has switched on, in order."""

    active: tuple[ActiveLora, ...] = ()


@dataclass(frozen=True)
class LoraTarget:
    """What LoRAs are read for: the arguments of diffusers' ``QwenImageTransformer2DModel``, and the dtype of activations."""

    config: Mapping[str, object]
    dtype: torch.dtype


def switch(model, target: LoraTarget, wanted: Sequence[tuple[Path, float]]):
    """A clone of ``model`` with these LoRAs added to those it has already.

    Args:
        wanted: files and strengths; strength 0 leaves a LoRA resident but out of the forward.

    Returns:
        The clone, and a line for each LoRA: resident or read now, its size, what was skipped.

    Raises:
        ValueError: a file is no LoRA of this model (see ``read_lora``).
    """
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    stack: LoraStack = options.get(LORAS, LoraStack())
    patchers = list(clone.get_additional_models_with_key(LORAS))
    lines = []
    for path, strength in wanted:
        patcher, was_resident = _resident(path, target)
        lora: ResidentLora = patcher.model
        if strength != 0:
            stack = LoraStack((*stack.active, ActiveLora(lora, strength)))
            patchers.append(patcher.clone())
        lines.append(_line(lora, strength, was_resident, patcher.model_size()))
    options[LORAS] = stack
    clone.set_additional_models(LORAS, patchers)
    return clone, lines


def _resident(path: Path, target: LoraTarget) -> tuple[ShellPatcher, bool]:
    def make() -> ShellPatcher:
        return LoraPatcher(
            ResidentLora(path, target.config, target.dtype),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    config = tuple(sorted((k, str(v)) for k, v in target.config.items()))
    return POOL.get((fingerprint([path]), target.dtype, config), make, lambda patcher: patcher.model_size())


def residents() -> list[tuple[str, int]]:
    """Name and bytes of each resident LoRA; for ``canvas.py``, from the server's thread."""
    return [(patcher.model.path.stem, size) for patcher, size in POOL.sizes() if not patcher.model.is_empty]


def _line(lora: ResidentLora, strength: float, was_resident: bool, size: int) -> str:
    state = "resident" if was_resident else "read from disk"
    line = f"{lora.path.stem}: strength {strength:g}, {len(lora.scales)} layers, {size / 2**20:.1f} MiB, {state}"
    if lora.skipped:
        line += f". Warning: {len(lora.skipped)} modules of the file are not applied (first: {lora.skipped[0]})"
    return line


def active_adapters(transformer, transformer_options: Mapping) -> Adapters:
    """The addends of this MODEL's LoRAs, by linear; called once for each forward."""
    stack: LoraStack | None = transformer_options.get(LORAS)
    if stack is None or not stack.active:
        return NO_ADAPTERS
    adapters: dict[torch.nn.Module, list[LowRank]] = {}
    for item in stack.active:
        for linear, addend in item.lora.addends(transformer, item.strength):
            adapters.setdefault(linear, []).append(addend)
    return adapters


def modulation_key(transformer_options: Mapping) -> tuple:
    """Names the LoRAs that change the modulation of this MODEL, and how strongly."""
    stack: LoraStack = transformer_options.get(LORAS, LoraStack())
    return tuple(
        (item.lora.fingerprint, item.strength)
        for item in stack.active
        if any(name == "norm_out.linear" or is_modulation(name) for name in item.lora.scales)
    )
