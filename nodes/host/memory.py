"""How our weights live in ComfyUI's memory manager.

A *shell* is a module whose weights come and go: they are read from disk when ComfyUI first puts the model on a
device, move as ComfyUI asks, and are dropped when ComfyUI frees memory between prompts (``/free``). The shell
itself, its names and its shape stay, so a MODEL that a graph cache still holds keeps working: the next use reads
the weights again.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from comfy.patcher_extension import CallbacksMP
from server import PromptServer

from ...qwen_edit.perf import stage

EVERYTHING = 1e32
SHARE_OF_RAM = 0.75  # what all kept models may take together


def still_loaded(patcher: Any) -> bool:
    """Whether DynamicVRAM has the model on the card as this patcher wants it, or room there for what is missing, so that
    loading would change nothing.

    ComfyUI then prepares every weight again and sends the small ones over the bus again, which for a text encoder takes
    longer than encoding. What remains of loading is done here.
    """
    if not patcher.is_dynamic() or all(
        entry.model is not patcher for entry in comfy.model_management.current_loaded_models
    ):
        return False
    return _still_prepared(patcher, max(0, patcher.model_size() - patcher.loaded_size()))


class PreparedOnce(ModelPatcherDynamic):
    """DynamicVRAM for a model without patches, of which each run uses a part (a VAE encodes or decodes): what is not on the
    card comes when it is used, however long ago it was prepared. Preparing a VAE takes longer than a picture's decoding."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if device_to == self.load_device and _still_prepared(self):
            return None
        return super().partially_load(device_to, extra_memory, force_patch_weights)


def prepare_once(patcher: Any) -> None:
    """Have ComfyUI prepare this patcher's model again only after it has unloaded it; those without DynamicVRAM are left alone."""
    if type(patcher) is ModelPatcherDynamic:
        patcher.__class__ = PreparedOnce


def _still_prepared(patcher: Any, missing: int = 0) -> bool:
    """Whether DynamicVRAM would prepare the weights as it has left them, and ``missing`` bytes of them have room. Then what
    remains of loading is done: the model's pages are the last that others may take, its pinned memory counts as used."""
    model = patcher.model
    extras = (patcher.patches, patcher.weight_wrapper_patches, patcher.injections)
    if (
        any(extras)
        or not objects_in_place(patcher)
        or patcher.forced_hooks
        or patcher.get_all_callbacks(CallbacksMP.ON_LOAD)
        or model.model_loaded_weight_memory == 0
    ):
        return False
    room = comfy.model_management.get_free_memory(patcher.load_device)
    if (
        patcher.current_loaded_device() != patcher.load_device  # a clone may have another
        or model.current_weight_patches_uuid != patcher.patches_uuid
        or room - missing < comfy.model_management.minimum_inference_memory()
    ):
        return False
    model.dynamic_vbars[patcher.load_device].prioritize()
    model.dynamic_pins[patcher.load_device]["active"] = True
    return True


def objects_in_place(patcher: Any) -> bool:
    """Whether the model has the objects that this patcher gives it, and no others: a CLIP's always has the dtype to cast to."""
    given = patcher.object_patches
    return patcher.object_patches_backup.keys() == given.keys() and all(
        comfy.utils.get_attr(patcher.model, name) is thing for name, thing in given.items()
    )


class Shell(Protocol):
    """What a module needs so that ``ShellPatcher`` can manage it."""

    device: torch.device

    @property
    def is_empty(self) -> bool: ...

    def fill(self, device: torch.device) -> None:
        """Read the weights onto the device."""
        ...

    def empty(self) -> None:
        """Drop the weights."""
        ...


class ShellPatcher(ModelPatcher):
    """ComfyUI's classic patcher for a shell: loaded whole or not at all, read on first load.

    Whole, because ComfyUI's partial loading counts on layers that cast their own weights, which diffusers' are
    not: it would leave some on the CPU and the forward would break.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        SHELLS.add(self)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if self.model.is_empty:
            with stage("load"):
                self.model.fill(device_to)
        self._stay = self.model.device == device_to
        try:
            return super().partially_load(device_to, EVERYTHING, force_patch_weights)
        finally:
            self._stay = False

    _stay = False

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0  # nothing in parts: ComfyUI then detaches the whole model

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        # A clone with other patches takes over on the same device: only patched weights need to move.
        leaving = not (self._stay or self.model.is_empty)
        super().unpatch_model(device_to if leaving else None, unpatch_weights)

    def detach(self, unpatch_all=True):
        self._stay = False  # a load that failed half-way is detached from inside partially_load
        return super().detach(unpatch_all)

    def release(self) -> None:
        """Drop the weights; the next load reads them again."""
        super().unpatch_model(None, True)
        self.model.empty()
        self.model.device = self.offload_device


T = TypeVar("T")


class Owner(Generic[T]):
    """Keeps what the loader made between prompts, least recently used first out, within a bound in bytes.

    ComfyUI drops cached outputs that the running prompt does not use, so without an owner another client's
    prompt would cost a reload from disk.
    """

    def __init__(self, shells: Callable[[T], Iterable[ShellPatcher]], bound: Callable[[], float] | None = None) -> None:
        """
        Args:
            shells: the patchers of a kept thing whose weights can be dropped.
            bound: in bytes; None: a share of RAM.
        """
        self._shells = shells
        self._bound = bound or (lambda: comfy.model_management.total_ram * 1024 * 1024 * SHARE_OF_RAM)
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._idle: list[T] = []
        OWNERS.append(self)

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> tuple[T, bool]:
        """The thing kept under ``key``, made if there is none, and whether it was there already."""
        self._idle.clear()
        found = key in self._kept
        if found:
            thing, _ = self._kept[key]
        else:
            thing = make()
            self._kept[key] = (thing, size(thing))
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(s for _, s in self._kept.values()) > self._bound():
            logging.info("Qwen Edit Fast: more models than memory; forgetting the one used longest ago.")
            self._drop(next(iter(self._kept)))
        return thing, found

    def forget(self, which: Callable[[T], bool]) -> None:
        """Drop some things."""
        for key in [key for key, (thing, _) in self._kept.items() if which(thing)]:
            self._drop(key)

    def things(self) -> list[T]:
        return [thing for thing, _ in list(self._kept.values())]  # any thread may ask

    def _drop(self, key: Hashable) -> None:
        dropped, _ = self._kept.pop(key)
        for shell in self._shells(dropped):  # its room is wanted now; a graph that still holds it reads it again
            if not shell.model.is_empty:
                shell.release()
        self._idle.append(dropped)

    def forget_all(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._idle.clear()


OWNERS: list[Owner[Any]] = []
SHELLS: weakref.WeakSet[ShellPatcher] = weakref.WeakSet()
WHEN_FREED: list[Callable[[], object]] = []  # what else is to be let go of, added by its owner

_unload_all_models = comfy.model_management.unload_all_models


def _unload_all_models_and_ours() -> None:
    """ComfyUI's. Between prompts (``/free``) memory is wanted back, not copies in RAM, so that all of our weights go, also
    those that have waited in RAM since a prompt ran out of memory and are in ComfyUI's list no more."""
    free = not PromptServer.instance.prompt_queue.currently_running
    for shell in list(SHELLS) if free else ():
        if not shell.model.is_empty:
            shell.release()
    _unload_all_models()
    if (
        free
    ):  # not before: dropping the last reference to what ComfyUI's list holds, while it walks that, ends its worker
        for let_go in (*(owner.forget_all for owner in OWNERS), *WHEN_FREED):
            let_go()


comfy.model_management.unload_all_models = _unload_all_models_and_ours
