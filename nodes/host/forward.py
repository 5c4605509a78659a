"""One forward as ComfyUI asks for it: its tensors and timesteps as the engine wants them, and what follows when memory
runs out."""

from dataclasses import dataclass, replace
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import torch

from ...qwen_edit.errors import MEMORY
from ...qwen_edit.reference_cache import ReferenceCache
from ...qwen_edit.transformer import Forward, denoise
from . import notes, reference_cache

STEPS = "qwen_edit_steps"  # key in transformer_options: our sampler's KnownSteps
ROWS_WHEN_SHORT = 2048


@dataclass
class KnownSteps:
    """Which step our sampler is at, so that no forward has to wait for the card to say its timestep. Euler asks for
    each sigma of the schedule once."""

    sigmas: list[float]
    done: int = 0


def run_forward(
    model, forward: Forward, latents, timesteps, context, attention_mask, transformer_options, **of_the_model
) -> torch.Tensor:
    """``denoise`` over ComfyUI's arguments; if memory runs out, once more item by item and with the MLPs in parts.

    Args:
        latents: output and references, each ``[B, 16, 1, h, w]``.
        attention_mask: of the text, boolean or ComfyUI's additive form; None: all of it counts.
        of_the_model: what else ``denoise`` is told.

    Returns:
        Velocity, shaped as the output.

    Raises:
        torch.OutOfMemoryError: memory ran out again; ComfyUI then unloads all models.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask >= 0  # ComfyUI's additive masks: 0 attends, hugely negative hides
    tokens, grids = zip(*(_pack(picture) for picture in latents), strict=True)
    # diffusers rounds the timestep to the model's dtype; ComfyUI does not
    rounded = latents[0].dtype if forward.positions == "diffusers" else None
    timestep, schedule = _known_times(timesteps, transformer_options, rounded)

    def run(forward: Forward, items: slice = slice(None), references: ReferenceCache | None = None) -> torch.Tensor:
        packed = torch.cat([t[items] for t in tokens], dim=1)
        mask = None if attention_mask is None else attention_mask[items]
        options: dict[str, Any] = {
            "text_mask": mask, "schedule": schedule, "references": references, **of_the_model
        }  # fmt: skip
        velocity = denoise(model, packed, timestep[items], context[items], grids, forward, **options)
        return _unpack(velocity, grids[0], latents[0][items].shape)

    try:
        return run(forward, references=reference_cache.cache_for(transformer_options, model, tokens, grids, timestep))
    except Exception as e:
        _raise_unless_memory(e)  # the rest outside, so that the tensors of the failed run are free
    forward.weights.release()
    reference_cache.give_up(transformer_options)
    comfy.model_management.soft_empty_cache()
    batch = len(latents[0])
    one_by_one = f"its {batch} pictures one by one and " if batch > 1 else ""
    notes.say(f"Out of memory: trying once more with {one_by_one}the MLPs in parts, which is a little slower.")
    smaller = replace(forward, mlp_rows=ROWS_WHEN_SHORT)
    try:
        return torch.cat([run(smaller, slice(i, i + 1)) for i in range(batch)])
    except Exception as e:
        _raise_unless_memory(e)
        reason = str(e)
    raise torch.OutOfMemoryError(
        f"{MEMORY} There is not enough memory for this edit, in parts neither. Choose a smaller size, fewer pictures, a"
        f" smaller precision (profile 'fast' or 'small') or offload 'stream' on the loader. ({reason})"
    )


def _raise_unless_memory(e: Exception) -> None:
    """Raise what is no lack of memory, on the card (as ComfyUI tells it) or in RAM."""
    if not (isinstance(e, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(e)):
        comfy.model_management.raise_non_oom(e)


def _known_times(timesteps: torch.Tensor, transformer_options, rounded: torch.dtype | None):
    """The timesteps ``[B]``, on the CPU where they are known without asking the card, and the schedule they belong to.

    Args:
        rounded: the dtype to which both are rounded; None: float32.
    """
    dtype = rounded or torch.float32
    steps: KnownSteps | None = transformer_options.get(STEPS)
    if steps is not None:
        schedule = torch.tensor(steps.sigmas).to(dtype)
        return schedule[steps.done].expand(len(timesteps)), schedule.tolist()
    sigmas = transformer_options.get("sample_sigmas")
    return timesteps.to(dtype), [] if sigmas is None else sigmas.to(dtype).tolist()


def _pack(latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """``[B, C, 1, h, w]`` -> 2x2 patches ``[B, rows * columns, 4C]`` and (rows, columns); odd sides are padded."""
    padded = comfy.ldm.common_dit.pad_to_patch_size(latents, (1, 2, 2))
    rows, columns = padded.shape[-2] // 2, padded.shape[-1] // 2
    patches = padded[:, :, 0].unflatten(-1, (columns, 2)).unflatten(-3, (rows, 2))  # B C rows 2 columns 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), (rows, columns)


def _unpack(tokens: torch.Tensor, grid: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    patches = tokens.unflatten(1, grid).unflatten(-1, (-1, 2, 2))  # B rows columns C 2 2
    latents = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).unsqueeze(2)
    return latents[..., : shape[-2], : shape[-1]]
