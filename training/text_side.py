"""Batches of prompts and pictures through the vision-language encoder, as the pipeline would one by one.

The class's own vision tower loops over pictures; all pictures of a batch have one size here, so the blocks
run on `[B, patches, width]`. `tests/test_demo_model.py` compares the two.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from training.tokenizer import PICTURE, TEMPLATE, TEMPLATE_TOKENS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def vision_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Size that the encoder sees: the pipeline's 384² area in multiples of 32, then multiples of `factor`."""
    ratio = width / height
    w = math.sqrt(384 * 384 * ratio)
    h = w / ratio
    return round(round(h / 32) * 32 / factor) * factor, round(round(w / 32) * 32 / factor) * factor


class TextSide:
    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration, tokenize, device: torch.device):
        """`tokenize` maps a text with special tokens to a list of ids."""
        self.encoder, self.device = encoder, device
        self.visual, self.language = encoder.model.visual, encoder.model.language_model
        self.patch = encoder.config.vision_config.patch_size
        self.factor = self.patch * encoder.config.vision_config.spatial_merge_size
        self.image_token = encoder.config.image_token_id
        self.pad_token = encoder.config.text_config.pad_token_id
        self.tokenize = tokenize
        self.prefix, self.suffix = (tokenize(part) for part in TEMPLATE.split("{}"))
        assert len(self.prefix) == TEMPLATE_TOKENS
        self.mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)

    def vision_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, 3]` in [0, 1] to what the vision tower sees, `[B, 3, H', W']` normalized."""
        size = vision_size(pictures.shape[1], pictures.shape[2], self.factor)
        resized = F.interpolate(pictures.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
        return (resized.clamp(0, 1) - self.mean) / self.std

    @lru_cache(maxsize=64)  # noqa: B019 - one object per training
    def _rotary(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[patches, 1, head]` in merged order (2×2 patches of a token adjacent)."""
        config = self.encoder.config.vision_config
        half = config.hidden_size // config.num_heads // 2
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, half, 2, device=self.device).float() / half))
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")

        def merged(index: torch.Tensor) -> torch.Tensor:
            return index.reshape(rows // 2, 2, columns // 2, 2).permute(0, 2, 1, 3).flatten().to(self.device)

        angles = torch.cat([merged(y)[:, None] * frequencies, merged(x)[:, None] * frequencies], -1)
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()

    def vision_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H', W']` normalized to `[B, H'/56 · W'/56, text width]`."""
        b, _, height, width = pictures.shape
        rows, columns, p = height // self.patch, width // self.patch, self.patch
        patches = pictures.reshape(b, 3, rows // 2, 2, p, columns // 2, 2, p)
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(b, rows * columns, 3 * p * p)
        # a picture is a video of two equal frames, so the kernel's two temporal slices add up
        kernel = self.visual.patch_embed.proj.weight.sum(2).flatten(1)
        x = F.linear(patches, kernel)
        cos, sin = self._rotary(rows, columns)

        def rotate(value: torch.Tensor) -> torch.Tensor:
            first, second = value.float().chunk(2, -1)
            return (value * cos + torch.cat([-second, first], -1) * sin).to(value.dtype)

        for block in self.visual.blocks:
            heads = block.attn.num_heads
            qkv = block.attn.qkv(block.norm1(x)).reshape(b, rows * columns, 3, heads, -1)
            q, k, v = qkv.unbind(2)
            q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return self.visual.merger(x.reshape(b * rows * columns, -1)).reshape(b, rows * columns // 4, -1)

    @lru_cache(maxsize=64)  # noqa: B019
    def _head(self, pictures: int, rows: int, columns: int) -> tuple[list[int], torch.Tensor, int]:
        """Token ids before the user's text, their positions `[3, N]`, and the position of the next token."""
        ids, positions, place = list(self.prefix), [], 0
        for number in range(pictures):
            for token in self.tokenize(PICTURE.format(number + 1)):
                ids += [token] * (rows * columns if token == self.image_token else 1)
        index = 0
        while index < len(ids):
            if ids[index] == self.image_token:
                y, x = np.mgrid[:rows, :columns]
                grid = np.stack([np.zeros_like(y), y, x]).reshape(3, -1) + place
                positions.append(grid)
                place += max(rows, columns)
                index += rows * columns
            else:
                positions.append(np.full((3, 1), place))
                place += 1
                index += 1
        return ids, torch.from_numpy(np.concatenate(positions, 1)).to(self.device), place

    @lru_cache(maxsize=256)  # noqa: B019
    def _layout(self, pictures: int, rows: int, columns: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions `[3, length]` of a whole text and the places of its picture tokens."""
        head, positions, place = self._head(pictures, rows, columns)
        tail = torch.arange(place, place + length - len(head), device=self.device).expand(3, -1)
        at = torch.tensor([i for i, t in enumerate(head) if t == self.image_token], device=self.device)
        return torch.cat([positions, tail], 1), at

    def ids(
        self, prompts: list[list[int]], pictures: list[torch.Tensor], longest: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids `[B, L]` of whole texts, padded on the right, and their mask.

        prompts: token ids of the users' texts; pictures: one `[B, 3, H', W']` per picture of the instruction;
        longest: pad as if the longest prompt had so many tokens.
        """
        rows, columns = (side // self.factor for side in pictures[0].shape[2:])
        head = self._head(len(pictures), rows, columns)[0]
        length = (longest or max(len(p) for p in prompts)) + len(self.suffix)
        length += -(len(head) - TEMPLATE_TOKENS + length) % 8
        ids = np.full((len(prompts), len(head) + length), self.pad_token)
        ids[:, : len(head)] = head
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            end = len(head) + len(prompt) + len(self.suffix)
            ids[row, len(head) : end] = prompt + self.suffix
            mask[row, :end] = True
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def embed(self, ids: torch.Tensor, pictures: list[torch.Tensor]) -> torch.Tensor:
        """Embeddings `[B, L - 64, width]` of `ids` (the template dropped)."""
        rows, columns = (side // self.factor for side in pictures[0].shape[2:])
        positions, at = self._layout(len(pictures), rows, columns, ids.shape[1])
        seen = torch.cat([self.vision_tokens(p) for p in pictures], 1)
        embeddings = self.language.embed_tokens(ids)
        embeddings = embeddings.index_copy(1, at, seen.to(embeddings.dtype))
        # padding is on the right and attention causal, so no mask is needed
        output = self.language(
            inputs_embeds=embeddings,
            position_ids=positions[:, None].expand(-1, len(ids), -1),
            use_cache=False,
        )
        return output.last_hidden_state[:, TEMPLATE_TOKENS:]

    def encode(self, prompts: list[list[int]], pictures: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[B, L, width]` and their mask `[B, L]`."""
        ids, mask = self.ids(prompts, pictures)
        return self.embed(ids, pictures), mask[:, TEMPLATE_TOKENS:]
