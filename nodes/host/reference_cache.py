"""Qwen Edit Reference Cache in ComfyUI's samplings: where the kept keys and values live, and when they are made anew.

They belong to one sampling and go with it. Each conditioning has its own, told apart by ComfyUI's id of it.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch

from ...qwen_edit.reference_cache import ReferenceCache, cached_bytes, forward_bytes
from . import notes

KEY = "qwen_edit_references"  # of the wrapper, and in transformer_options during a sampling
# Not with these: windows share a conditioning's id among several parts, several cards run in threads of their own.
WINDOWS, SEVERAL_CARDS = "context_handler", "multigpu_thread_device"


@dataclass(frozen=True)
class Part:
    """What one forward computes: ``conditionings`` are ComfyUI's ids of those in its batch, and for each whether it is the
    positive or the negative one (ComfyUI gives both the same id where one has an area); ``shapes`` tells other pictures."""

    conditionings: frozenset[tuple[Hashable, int]]
    shapes: tuple


@dataclass
class Sampling:
    """One sampling's caches; of how many forwards some took their references from one.

    ``conditionings``: how many there will be.
    """

    tolerance: float
    conditionings: int
    caches: dict[Part, ReferenceCache] = field(default_factory=dict)
    forwards: int = 0
    reused: int = 0
    stopped: bool = False

    def cache_for(
        self, part: Part, sigma: float, nbytes: int, beside: int, device: torch.device
    ) -> ReferenceCache | None:
        """The cache that this forward takes its references from or leaves them in; None: neither.

        Args:
            nbytes, beside: what the cache takes, and what the forward takes beside it.
        """
        self.forwards += 1
        if self.stopped:
            return None
        cache = self.caches.get(part)
        if cache is None:
            for other in [other for other in self.caches if other.conditionings & part.conditionings]:
                del self.caches[other]  # ComfyUI has joined or parted them since
            to_come = 1 if self.caches else math.ceil(self.conditionings / len(part.conditionings))
            if not _has_room(nbytes * to_come + beside, device):
                gib = nbytes * to_come / 2**30
                self.stop(
                    f"the keys and values of the references take {gib:.1f} GiB, and the card has no room for them"
                )
                return None
            cache = self.caches[part] = ReferenceCache()
        cache.renew(sigma, self.tolerance)
        self.reused += cache.complete
        return cache

    def sum_up(self) -> None:
        self.caches.clear()  # whoever still holds the options of a sampling that failed
        if self.reused:
            notes.say(
                f"Reference cache: {self.reused} of {self.forwards} forwards took the references from an earlier one. The"
                " picture differs a little from the one without it."
            )
        elif not self.stopped:
            notes.say(
                "Reference cache: no step took the references from an earlier one. Choose more steps or a tolerance above"
                f" {self.tolerance:g}."
                if self.forwards
                else "Reference cache: not used, because no forward of ours with reference pictures ran."
            )

    def stop(self, why: str) -> None:
        """Compute all references from here on, and say so."""
        self.stopped = True
        self.caches.clear()
        notes.say(f"Reference cache: given up, because {why}. From here on every step computes the references.")


def cache_references(model, tolerance: float):
    """A clone of ``model``, which has to run our forward, that takes its reference tokens from an earlier forward until sigma
    has fallen by more than ``tolerance``; 0: never."""
    clone = model.clone()
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    clone.remove_wrappers_with_key(kind, KEY)
    if tolerance > 0:
        clone.add_wrapper_with_key(kind, KEY, _Sampled(tolerance))
    return clone


class _Sampled:
    """Around a whole sampling, of which ComfyUI has made its own copy of the options."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance

    def __call__(self, executor, *args, **kwargs):
        guider = executor.class_obj
        options = guider.model_options["transformer_options"]
        sampling = Sampling(self.tolerance, _conditionings(guider))
        if WINDOWS not in guider.model_options:
            options[KEY] = sampling
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(KEY, None)
            sampling.sum_up()


def _conditionings(guider: Any) -> int:
    """How many conditionings have forwards of their own; without guidance the negative ones have none."""
    return sum(len(conds) for name, conds in guider.conds.items() if name != "negative" or guider.cfg != 1.0)


def cache_for(transformer_options, model, tokens, grids, timestep: torch.Tensor) -> ReferenceCache | None:
    """What ``denoise`` is to be given as ``references`` in this forward.

    Args:
        tokens: output and references, packed ``[B, L, 64]`` each; ``grids``: their rows and columns.
    """
    sampling: Sampling | None = transformer_options.get(KEY)
    ids, kinds = transformer_options.get("uuids"), transformer_options.get("cond_or_uncond")
    if sampling is None or not ids or len(tokens) == 1 or SEVERAL_CARDS in transformer_options:
        return None
    blocks, batch, dtype = model.transformer_blocks, len(tokens[0]), tokens[0].dtype
    width = blocks[0].attn.to_k.out_features
    references = sum(t.shape[1] for t in tokens[1:])
    part = Part(frozenset(zip(ids, kinds, strict=True)), (batch, *grids))
    beside = forward_bytes(width, batch, tokens[0].shape[1] + references, dtype)
    nbytes = cached_bytes(len(blocks), width, batch, references, dtype)
    return sampling.cache_for(part, timestep[0].item(), nbytes, beside, tokens[0].device)


def give_up(transformer_options) -> None:
    """Memory ran out in a forward: let go of what is kept, and keep nothing more in this sampling."""
    sampling: Sampling | None = transformer_options.get(KEY)
    if sampling is not None and sampling.caches:
        sampling.stop("memory ran out")


def _has_room(nbytes: int, device: torch.device) -> bool:
    """Whether so many bytes fit beside what the models in use still have to bring, if the others leave the card."""
    if device.type == "cpu":
        return True
    management = comfy.model_management
    in_use = [entry for entry in management.current_loaded_models if entry.currently_used]
    # DynamicVRAM brings weights only when a forward reads them
    to_come = sum(e.model.model_size() - e.model.loaded_size() for e in in_use if e.model.is_dynamic())
    wanted = nbytes + max(0, to_come) + management.minimum_inference_memory()
    if management.get_free_memory(device) < wanted:
        management.free_memory(wanted, device, keep_loaded=in_use)
    return management.get_free_memory(device) >= wanted
