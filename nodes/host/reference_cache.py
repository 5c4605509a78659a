"""Qwen Edit Reference Cache in ComfyUI's samplings: where the kept keys and values live, and when they are made anew.

They belong to one sampling and go with it. Each conditioning has its own, told apart by ComfyUI's id of it.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import comfy.model_management
import comfy.patcher_extension
import torch

from ...qwen_edit.reference_cache import ReferenceCache, cached_bytes
from . import notes

KEY = "qwen_edit_references"  # of the wrapper, and in transformer_options during a sampling


@dataclass
class Sampling:
    """One sampling's caches, by conditioning; of how many forwards some took their references from one."""

    tolerance: float
    caches: dict[Hashable, ReferenceCache] = field(default_factory=dict)
    forwards: int = 0
    reused: int = 0
    stopped: bool = False

    def cache_for(self, key: Hashable, sigma: float, nbytes: int, device: torch.device) -> ReferenceCache | None:
        """The cache that this forward of the conditioning takes its references from or leaves them in; None: neither."""
        if self.stopped:
            return None
        self.forwards += 1
        cache = self.caches.get(key)
        if cache is None:
            if not _has_room(nbytes, device):
                self.stop(
                    f"the keys and values of the references take {nbytes / 2**30:.1f} GiB, and the card has no room for them"
                )
                return None
            cache = self.caches[key] = ReferenceCache()
        cache.renew(sigma, self.tolerance)
        self.reused += cache.complete
        return cache

    def sum_up(self) -> None:
        if self.reused:
            notes.say(
                f"Reference cache: {self.reused} of {self.forwards} forwards took the references from an earlier one. The"
                " picture differs a little from the one without it."
            )
        elif self.forwards and not self.stopped:
            notes.say(
                f"Reference cache: no step took the references from an earlier one, because sigma falls by more than"
                f" {self.tolerance:g} in each. Choose a larger tolerance or more steps."
            )

    def stop(self, why: str) -> None:
        """Compute all references from here on, and say so."""
        self.stopped = True
        self.caches.clear()
        notes.say(f"Reference cache: not used, because {why}. Every step computes the references.")


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
        sampling = Sampling(self.tolerance)
        options = executor.class_obj.model_options["transformer_options"]
        options[KEY] = sampling
        try:
            return executor(*args, **kwargs)
        finally:
            del options[KEY]
            sampling.sum_up()


def cache_for(transformer_options, model, tokens, timestep: torch.Tensor) -> ReferenceCache | None:
    """What ``denoise`` is to be given as ``references`` in this forward.

    Args:
        tokens: output and references, packed ``[B, L, 64]`` each.
    """
    sampling: Sampling | None = transformer_options.get(KEY)
    ids = transformer_options.get("uuids")
    if sampling is None or ids is None or len(tokens) == 1:
        return None
    blocks, batch = model.transformer_blocks, len(tokens[0])
    width = blocks[0].attn.to_k.out_features
    references = sum(t.shape[1] for t in tokens[1:])
    key = (*ids, batch, *(t.shape[1] for t in tokens))
    nbytes = cached_bytes(len(blocks), width, batch, references, tokens[0].dtype)
    return sampling.cache_for(key, timestep[0].item(), nbytes, tokens[0].device)


def give_up(transformer_options) -> None:
    """Memory ran out in a forward: let go of what is kept, and keep nothing more in this sampling."""
    sampling: Sampling | None = transformer_options.get(KEY)
    if sampling is not None and sampling.caches:
        sampling.stop("memory ran out")


def _has_room(nbytes: int, device: torch.device) -> bool:
    """Whether so many bytes fit beside what a forward needs, if models that do not sample leave the card."""
    if device.type == "cpu":
        return True
    management = comfy.model_management
    wanted = nbytes + management.minimum_inference_memory()
    if management.get_free_memory(device) < wanted:
        in_use = [entry for entry in management.current_loaded_models if entry.currently_used]
        management.free_memory(wanted, device, keep_loaded=in_use)
    return management.get_free_memory(device) >= wanted
