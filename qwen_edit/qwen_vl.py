"""Qwen2.5-VL over ComfyUI's modules, for several prompts and several pictures at a time.

The modules are those of ComfyUI's ``comfy/text_encoders/llama.py`` and ``qwen_vl.py`` (0.30), whose blocks take the mask
or the attention function as an argument; they run as they are, so weights that are patched, quantized or wait in RAM
are their own business. New is what happens around the blocks: prompts with the same beginning share it in one
sequence, and the vision tower's windows are one masked attention for each block instead of one for each window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Without cuDNN, which plans anew for every length, and every prompt has a length of its own.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MASK_ALIGNMENT = 8  # elements; of other row lengths PyTorch makes an aligned copy at every call


def attend(q, k, v, heads, mask=None, skip_reshape=True, enable_gqa=False) -> torch.Tensor:
    """Attention in the calling convention of ComfyUI's blocks: q ``[B, heads, L, D]`` -> ``[B, L, heads * D]``.

    Args:
        mask: added to the scores, ``[1, 1, L, L]``, of the dtype of v.
        enable_gqa: k and v have fewer heads than q. PyTorch's masked kernels can't do that themselves.
    """
    if enable_gqa:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    # the vision blocks leave q and k in float32 after RoPE
    out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[L, L]`` bool, True where a row sees a column -> ``[1, 1, L, L]``, 0 or -inf."""
    rows, columns = visible.shape
    aligned = -(-columns // MASK_ALIGNMENT) * MASK_ALIGNMENT
    mask = torch.zeros(1, 1, rows, aligned, dtype=dtype, device=visible.device)[..., :columns]
    return mask.masked_fill_(~visible, float("-inf"))


@dataclass(frozen=True)
class Layout:
    """What the vision tower takes from the grids of its pictures alone; tensors on its device.

    ``order``: of the patches, window by window; ``merged_back``: of what the merger returns, picture by picture.
    ``positions``: cos and sin of the rotations, ``[patches, head_dim]``. ``windows`` and ``pictures``: in which of them each
    patch lies, ``[patches]``; None: there is one.
    """

    order: torch.Tensor
    merged_back: torch.Tensor
    positions: tuple[torch.Tensor, torch.Tensor]
    windows: torch.Tensor
    pictures: torch.Tensor | None


LAYOUTS: WeakKeyDictionary[Any, dict[tuple, Layout]] = WeakKeyDictionary()  # by the tower, the latest few
KEPT_LAYOUTS = 4


def see(visual: Any, patches: torch.Tensor, grids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the vision tower makes of one or several pictures.

    Args:
        visual: ComfyUI's ``Qwen2VLVisionTransformer``.
        patches: ``[patches, 3 * 2 * 14 * 14]`` of all pictures, one after the other, on the tower's device.
        grids: ``[pictures, 3]``, frames, rows and columns in patches, on the CPU, where everything that decides on a
            shape stays: nothing waits for the device.

    Returns:
        ``[patches / 4, C]`` in the order of the pictures.
    """
    layout = _layout(visual, grids, patches.device)
    hidden = visual.patch_embed(patches[layout.order].to(dtype))
    in_window = partial(attend, mask=_within(layout.windows, dtype))
    in_picture = partial(attend, mask=None if layout.pictures is None else _within(layout.pictures, dtype))
    together = torch.tensor([0, len(patches)])  # the block splits nothing
    with sdpa_kernel(BACKENDS):
        for index, block in enumerate(visual.blocks):
            attention = in_picture if index in visual.fullatt_block_indexes else in_window
            hidden = block(hidden, layout.positions, together, optimized_attention=attention)
    return visual.merger(hidden)[layout.merged_back]


def _layout(visual: Any, grids: torch.Tensor, device: torch.device) -> Layout:
    """Kept, because making it takes the host as long as the whole tower takes the card."""
    kept, key = LAYOUTS.setdefault(visual, {}), (device, *grids.flatten().tolist())
    if key not in kept:
        while len(kept) >= KEPT_LAYOUTS:
            del kept[next(iter(kept))]
        kept[key] = _make_layout(visual, grids, device)
    return kept[key]


def _make_layout(visual: Any, grids: torch.Tensor, device: torch.device) -> Layout:
    windows, ends = visual.get_window_index(grids)
    unit = visual.spatial_merge_size**2
    order = (windows.unsqueeze(1) * unit + torch.arange(unit)).flatten()
    angles = visual.get_position_embeddings(grids, grids.device)[order].repeat(1, 2)
    pictures = grids.prod(dim=1).tolist()
    return Layout(
        order.to(device),
        windows.argsort().to(device),
        (angles.cos().to(device), angles.sin().to(device)),
        _parts([end - start for start, end in pairwise(ends)]).to(device),
        _parts(pictures).to(device) if len(pictures) > 1 else None,
    )


def _within(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask of tokens that see their own part only."""
    return additive_mask(part.unsqueeze(1) == part, dtype)


def _parts(lengths: Sequence[int]) -> torch.Tensor:
    """``[sum(lengths)]`` on the CPU: which part each token lies in. (``repeat_interleave`` starts threads even for two.)"""
    return torch.tensor([part for part, length in enumerate(lengths) for _ in range(length)])


def read_together(
    model: Any, embeds: Sequence[torch.Tensor], positions: Sequence[torch.Tensor], shared: int
) -> list[torch.Tensor]:
    """Last hidden states of prompts that begin with the same ``shared`` tokens, in one pass.

    The beginning stands once in the sequence, then the rest of each prompt, which sees the beginning and itself, at the
    positions that it has alone.

    Args:
        model: ComfyUI's ``Llama2_``.
        embeds: of each prompt, ``[1, L, C]``.
        positions: of each prompt, ``[3, L]``: time, row and column.

    Returns:
        Of each prompt ``[1, L, C]``.
    """
    device, dtype = embeds[0].device, embeds[0].dtype
    lengths = [prompt.shape[1] - shared for prompt in embeds]
    hidden = torch.cat([embeds[0][:, :shared], *(prompt[:, shared:] for prompt in embeds)], dim=1)
    along = torch.cat([positions[0][:, :shared], *(prompt[:, shared:] for prompt in positions)], dim=1)
    part = _parts([shared, *lengths]).to(device)
    visible = ((part == 0) | (part.unsqueeze(1) == part)).tril_()
    mask = additive_mask(visible, dtype)
    rotation = model.compute_freqs_cis(along.to(device), device)
    with sdpa_kernel(BACKENDS):
        for layer in model.layers:
            hidden, _ = layer(hidden, mask, rotation, attend)
    hidden = model.norm(hidden)
    beginning, *rest = hidden.split([shared, *lengths], dim=1)
    return [torch.cat([beginning, own], dim=1) for own in rest]
