"""The prompts of an edit through a CLIP, of whichever loader.

ComfyUI's own text encoder of Qwen-Image encodes prompt by prompt, looks at every picture for each of them, and
computes in float32. Here all prompts take one pass and all pictures another (``qwen_edit/qwen_vl.py``), in the dtype
that the CLIP's loader asked for. ComfyUI does the rest: it loads, tokenizes, embeds and cuts off the template. What the
pass does not honour is encoded by ComfyUI alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy.sd1_clip import ClipTokenWeightEncoder, SDClipModel
from comfy.text_encoders import llama, qwen_vl
from comfy.text_encoders.qwen_image import Qwen25_7BVLIModel, QwenImageTEModel

from ...qwen_edit.linear import runs_itself
from ...qwen_edit.quantize import QuantizedTensor
from ...qwen_edit.qwen_vl import LAYOUTS, read_together, see
from .clip import loaded_once
from .memory import WHEN_FREED

ACTIVATIONS = "qwen_edit_activations"  # attachment on the patcher: the dtype that prompts are encoded in

# Others have bits that bfloat16 would lose. uint8: ggml's blocks, of 8 bits at most.
BFLOAT16_WEIGHTS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)

# By the picture's id: the picture, so that its id stays its own, and its features and patch grid.
Seen = dict[int, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]

WHEN_FREED.append(LAYOUTS.clear)

_METHODS = (
    (ClipTokenWeightEncoder, "encode_token_weights"),
    (SDClipModel, "encode"),
    (SDClipModel, "forward"),
    (llama.Qwen25_7BVLI, "forward"),
    (llama.Qwen25_7BVLI, "preprocess_embed"),
    (llama.Llama2_, "forward"),
    (qwen_vl.Qwen2VLVisionTransformer, "forward"),
)
_NATIVE = [getattr(owner, name) for owner, name in _METHODS]


def encode_prompts(clip: comfy.sd.CLIP, prompts: Sequence[dict], seen: Seen) -> list[list]:
    """Each prompt's conditioning.

    Args:
        prompts: what ``clip.tokenize`` made of them.
        seen: what earlier calls with this CLIP saw in pictures, which are known by being the same tensor. Pictures of
            these prompts are added.
    """
    together = in_one_pass if runs_in_one_pass(clip, prompts) else seen_by_comfyui
    with loaded_once(clip), together(clip, prompts, seen):
        return [clip.encode_from_tokens_scheduled(prompt) for prompt in prompts]


def ask_for_bfloat16(clip: comfy.sd.CLIP) -> bool:
    """Have ``encode_prompts`` compute in bfloat16, as the official pipeline does, where this card and the encoder's weights
    allow it; whether they do. Other nodes encode with this CLIP in ComfyUI's float32 as before."""
    weight = clip.cond_stage_model.qwen25_7b.transformer.model.layers[0].self_attn.q_proj.weight
    device = clip.patcher.load_device
    on_card = not comfy.model_management.is_device_cpu(device) and comfy.model_management.should_use_bf16(device)
    if not on_card or not (isinstance(weight, QuantizedTensor) or weight.dtype in BFLOAT16_WEIGHTS):
        return False
    clip.patcher.set_attachments(ACTIVATIONS, torch.bfloat16)
    return True


def runs_in_one_pass(clip: comfy.sd.CLIP, prompts: Sequence[dict]) -> bool:
    """Whether the encoder is ComfyUI's own and as ComfyUI made it, and the prompts are text and pictures only."""
    model = clip.cond_stage_model
    if not isinstance(model, QwenImageTEModel) or clip.layer_idx is not None or clip.use_clip_schedule:
        return False
    text = model.qwen25_7b
    if type(text) is not Qwen25_7BVLIModel or type(text.transformer) is not llama.Qwen25_7BVLI:
        return False
    if [getattr(owner, name) for owner, name in _METHODS] != _NATIVE:
        return False
    transformer = text.transformer
    if any(runs_itself(m) for m in (text, transformer, transformer.model, transformer.visual)):
        return False
    if {"encode", "encode_token_weights", "process_tokens"} & vars(text).keys() or "preprocess_embed" in vars(
        transformer
    ):
        return False
    return all(_is_plain(prompt, text.special_tokens["pad"]) for prompt in prompts)


def _is_plain(prompt: dict, pad: int) -> bool:
    sections = prompt["qwen25_7b"]
    return len(sections) == 1 and all(
        weight == 1.0 and (token != pad if isinstance(token, Integral) else _picture(token) is not None)
        for token, weight, *_ in sections[0]
    )


def _picture(token: Any) -> torch.Tensor | None:
    """The IMAGE that stands at the place of a token."""
    return token["data"] if isinstance(token, dict) and token.get("type") == "image" else None


@contextmanager
def seen_by_comfyui(clip: comfy.sd.CLIP, prompts: Sequence[dict], seen: Seen) -> Iterator[None]:
    """While this is open, ComfyUI's own text encoder in ``clip`` looks at each picture once, whatever the prompts.

    ComfyUI runs the vision tower from ``preprocess_embed`` of the encoder's module, once for each prompt and picture.
    This puts a method that remembers in its place, on this one module, and takes it away at the end. The encoder of a
    folder needs it not (see ``shared_pictures``); another kind, or a method that another pack has put there, is left
    as it is.
    """
    model = clip.cond_stage_model
    transformer = getattr(model, model.clip).transformer if isinstance(model, QwenImageTEModel) else None
    if transformer is None or "preprocess_embed" in vars(transformer):
        yield
        return
    look = transformer.preprocess_embed

    def look_once(embed, device):
        picture = embed["data"]
        if id(picture) not in seen:
            seen[id(picture)] = picture, look(embed, device)
        return seen[id(picture)][1]

    transformer.preprocess_embed = look_once
    try:
        yield
    finally:
        del transformer.preprocess_embed


@contextmanager
def in_one_pass(clip: comfy.sd.CLIP, prompts: Sequence[dict], seen: Seen) -> Iterator[None]:
    """While this is open, ComfyUI's text encoder finds the hidden states of ``prompts``, in their order, ready made."""
    text = clip.cond_stage_model.qwen25_7b
    dtype = clip.patcher.get_attachment(ACTIVATIONS) or torch.float32
    tokens = [[token for token, *_ in prompt["qwen25_7b"][0]] for prompt in prompts]
    states = _hidden_states(text, tokens, seen, dtype)
    text.encode = lambda tokens: next(states)
    try:
        yield
    finally:
        del text.encode


def _hidden_states(text: SDClipModel, prompts: list[list], seen: Seen, dtype: torch.dtype) -> Iterator[tuple]:
    """What ``text.encode`` returns for each prompt. Begins when the first is asked for, and the encoder is loaded."""
    transformer, device = text.transformer, text.execution_device
    pictures = [image for prompt in prompts for token in prompt if (image := _picture(token)) is not None]
    _look(transformer.visual, pictures, seen, device, dtype)
    embeds, positions, spans = [], [], []
    transformer.preprocess_embed = lambda embed, device: seen[id(embed["data"])][1]
    try:
        for prompt in prompts:
            embedded, _, _, info = text.process_tokens([prompt], device)
            length = embedded.shape[1]
            at = qwen_vl.qwen2vl_mrope_position_ids(info, length, "cpu")
            embeds.append(embedded.to(dtype))
            positions.append(torch.arange(length).expand(3, -1) if at is None else at)
            spans.append([span["size"] for span in info])
    finally:
        del transformer.preprocess_embed
    shared = _shared_tokens(prompts)
    pictures_in_it = sum(_picture(token) is not None for token in prompts[0][:shared])
    shared += sum(spans[0][:pictures_in_it]) - pictures_in_it
    for hidden in read_together(transformer.model, embeds, positions, shared):
        mask = torch.ones(1, hidden.shape[1], dtype=torch.long)
        yield hidden.float(), None, {"attention_mask": mask}


def _look(visual: Any, pictures: list[torch.Tensor], seen: Seen, device: torch.device, dtype: torch.dtype) -> None:
    new = {id(picture): picture for picture in pictures if id(picture) not in seen}
    if not new:
        return
    made = [qwen_vl.process_qwen2vl_images(picture.to(device)) for picture in new.values()]
    patches, grids = [p for p, _ in made], [grid.cpu() for _, grid in made]
    features = see(visual, torch.cat(patches), torch.cat(grids), dtype)
    parts = features.split([len(p) // visual.spatial_merge_size**2 for p in patches])
    for picture, part, grid in zip(new.values(), parts, grids, strict=True):
        seen[id(picture)] = picture, (part, grid)


def _shared_tokens(prompts: list[list]) -> int:
    """How many tokens all prompts begin with; of a single prompt none, since there is nothing to share with."""
    if len(prompts) == 1:
        return 0
    count = 0
    for column in zip(*prompts):  # noqa: B905 (to the end of the shortest)
        first, *others = column
        picture = _picture(first)
        if any(_picture(o) is not picture if picture is not None else o != first for o in others):
            break
        count += 1
    return count
