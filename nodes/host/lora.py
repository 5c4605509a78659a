"""LoRAs of QwenEditLoraSwitch in ComfyUI: resident, accounted for, named by each MODEL for itself.

A MODEL says which LoRAs it wants in ``transformer_options``; nothing is set on the shared weights, so two
branches of one graph with different LoRAs do not disturb each other.
"""

import logging
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...qwen_edit.checkpoints import fingerprint
from ...qwen_edit.linear import NO_ADAPTERS, Adapter, Adapters, HighRank, LowRank
from ...qwen_edit.lora import read_lora
from ...qwen_edit.quantize import is_modulation
from .memory import Owner, ShellPatcher

LORAS = "qwen_edit_loras"  # key in transformer_options and among the patcher's additional models

SHARE_OF_CARD = 0.25
SHARE_OF_RAM = 0.125  # where they wait while the card is wanted for something else


def budget() -> float:
    """What resident LoRAs may take together, in bytes."""
    manager = comfy.model_management
    return min(
        manager.total_ram * 2**20 * SHARE_OF_RAM,
        manager.get_total_memory(manager.get_torch_device()) * SHARE_OF_CARD,
    )


POOL: Owner[ShellPatcher] = Owner(lambda patcher: [patcher], budget)


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
        self.rank = 0  # the highest of those that are beside the weights
        self.high_rank: dict[str, int] = {}  # the number of factors of the others
        self._answer: tuple[weakref.ref, float, list[tuple[torch.nn.Module, Adapter]]] | None = None
        self.fill(torch.device("cpu"))

    @property
    def is_empty(self) -> bool:
        return len(self.weights) == 0

    def fill(self, device: torch.device) -> None:
        logging.info("Qwen Edit Fast: reading the LoRA %s", self.path.name)
        file = read_lora(self.path, self.model_config, self.dtype)
        self.skipped, self.scales = file.skipped, {}
        self.rank, self.high_rank = 0, {}
        for name, layer in file.layers.items():
            key = name.replace(".", "/")  # ParameterDict takes no dots
            factors = layer.factors if isinstance(layer, HighRank) else (layer.a, layer.b)
            for part, tensor in enumerate(factors):
                moved = tensor.to(device, self.dtype)
                self.weights[f"{key}/{part}"] = torch.nn.Parameter(moved, requires_grad=False)
            self.scales[name] = layer.scale
            if isinstance(layer, HighRank):
                self.high_rank[name] = len(factors)
            else:
                self.rank = max(self.rank, len(layer.a))

    def empty(self) -> None:
        self.weights = _Weights()
        self._answer = None

    def adapters(self, strength: float) -> list[tuple[str, Adapter]]:
        """What each layer of the file adds, by the linear's name."""
        weights: Any = self.weights._parameters  # a dict: ParameterDict's own lookup takes ten times as long
        layers: list[tuple[str, Adapter]] = []
        for name, scale in self.scales.items():
            key = name.replace(".", "/")
            parts = [weights[f"{key}/{part}"] for part in range(self.high_rank.get(name, 2))]
            if name in self.high_rank:
                layers.append((name, HighRank(tuple(parts), scale * strength)))
            else:
                layers.append((name, LowRank(parts[0], parts[1], scale * strength, self.weights.derived[key])))
        return layers

    def addends(self, transformer: torch.nn.Module, strength: float) -> list[tuple[torch.nn.Module, Adapter]]:
        """What each linear of ``transformer`` gets; asked for every forward, so the last answer is kept."""
        if self._answer is None or self._answer[0]() is not transformer or self._answer[1] != strength:
            layers = [(transformer.get_submodule(name), adapter) for name, adapter in self.adapters(strength)]
            self._answer = weakref.ref(transformer), strength, layers
        return self._answer[2]


class LoraPatcher(ShellPatcher):
    """Counts, on a card, also what a transformer lays out of the LoRA (see ``extra_channels.py``): about as much again."""

    def model_size(self):
        if not self.size:  # clones are given it
            self.size = comfy.model_management.module_size(self.model) * (2 if self.load_device.type == "cuda" else 1)
        return self.size


@dataclass(frozen=True)
class ActiveLora:
    """A LoRA, how strongly a MODEL wants it, and where: one of ``LORA_MODES``."""

    lora: ResidentLora
    strength: float
    mode: str = "resident"


@dataclass(frozen=True)
class LoraStack:
    """What one MODEL has switched on, in order."""

    active: tuple[ActiveLora, ...] = ()


NOTHING = LoraStack()


@dataclass(frozen=True)
class LoraTarget:
    """What LoRAs are read for: the arguments of diffusers' ``QwenImageTransformer2DModel``, and the dtype of activations."""

    config: Mapping[str, object]
    dtype: torch.dtype


def resident(path: Path, target: LoraTarget) -> tuple[ShellPatcher, bool]:
    """The one patcher of a file, and whether it was in the pool. One of an older file behind the same name leaves it.

    Raises:
        ValueError: the file is no LoRA of this model (see ``read_lora``).
    """

    def make() -> ShellPatcher:
        return LoraPatcher(
            ResidentLora(path, target.config, target.dtype),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    config = tuple(sorted((k, str(v)) for k, v in target.config.items()))
    POOL.forget(lambda patcher: patcher.model.path == path and patcher.model.fingerprint != fingerprint([path]))
    return POOL.get((fingerprint([path]), target.dtype, config), make, lambda patcher: patcher.model_size())


def residents() -> list[tuple[str, int]]:
    """Name and bytes of each resident LoRA; for ``canvas.py``, from the server's thread."""
    return [(p.model.path.stem, p.model_size()) for p in POOL.things() if not p.model.is_empty]


def pool_line() -> str:
    """How full the pool is."""
    size = sum(patcher.model_size() for patcher in POOL.things())
    return f"{len(POOL.things())} resident: {size / 2**30:.2f} of {budget() / 2**30:.1f} GiB"


def active_adapters(transformer, transformer_options: Mapping) -> Adapters:
    """The addends of this MODEL's LoRAs, by linear; called once for each forward."""
    stack: LoraStack = transformer_options.get(LORAS, NOTHING)
    return adapters_of(transformer, stack.active) if stack.active else NO_ADAPTERS


def adapters_of(transformer, items: Sequence[ActiveLora]) -> dict[torch.nn.Module, list[Adapter]]:
    adapters: dict[torch.nn.Module, list[Adapter]] = {}
    for item in items:
        for linear, addend in item.lora.addends(transformer, item.strength):
            adapters.setdefault(linear, []).append(addend)
    return adapters


def modulation_key(transformer_options: Mapping) -> tuple:
    """Names the LoRAs that change the modulation of this MODEL, and how strongly."""
    stack: LoraStack = transformer_options.get(LORAS, NOTHING)
    return tuple(
        (item.lora.fingerprint, item.strength)
        for item in stack.active
        if any(name == "norm_out.linear" or is_modulation(name) for name in item.lora.scales)
    )
