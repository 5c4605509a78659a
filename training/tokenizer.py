"""A small piece of Qwen's BPE vocabulary that tokenizes the texts that matter exactly as the whole does.

Kept are all 256 bytes (so that any text can be written), the most frequent merges, and every merge that the
prompt template and the prompts of `training.instructions` use. A subset of the merges in their old order
gives the old tokens for those texts: at each step the merge that applies first is one that was kept.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from transformers import Qwen2Tokenizer

from training.instructions import all_prompts

# The template of diffusers' QwenImageEditPlusPipeline. The pipeline drops the first 64 tokens of its hidden
# states.
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 64
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"

# In the order of Qwen2.5-VL's own added tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FREQUENT_MERGES = 1200


def _used_merges(words: set[str], ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that BPE applies while it tokenizes `words` (in byte-level characters)."""
    used = set()
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            used.add((parts[at], parts[at + 1]))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return used


def build_tokenizer(source: Path) -> Qwen2Tokenizer:
    """Prune the vocabulary in `source` (a folder with Qwen2.5's vocab.json and merges.txt)."""
    vocabulary = json.loads((source / "vocab.json").read_text("utf-8"))
    lines = (source / "merges.txt").read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    whole = Qwen2Tokenizer(vocab=vocabulary, merges=merges)

    texts = [re.sub(r"<\|\w+\|>", "", TEMPLATE), "Picture 1: Picture 2: Picture 3: "]
    for prompt in all_prompts():
        american = re.sub("grey", "gray", re.sub("colour", "color", prompt))
        american = american.replace("centre", "center").replace("colorise", "colorize")
        for text in (prompt, american):
            texts += [
                text,
                text[:1].upper() + text[1:],
                text + ".",
                "please " + text,
                text + " please",
                " " + text,
            ]
    pre_tokenizer = whole.backend_tokenizer.pre_tokenizer
    words = {piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    kept = set(merges[:FREQUENT_MERGES]) | _used_merges(words, {m: i for i, m in enumerate(merges)})
    # a merge whose parts are themselves merged tokens needs the merges that make them
    kept |= _used_merges({a + b for a, b in kept}, {m: i for i, m in enumerate(merges)})
    small_merges = [m for m in merges if m in kept]
    tokens = sorted((t for t in vocabulary if len(t) == 1), key=vocabulary.get)
    tokens += list(dict.fromkeys(a + b for a, b in small_merges))
    small_vocabulary = {token: i for i, token in enumerate(tokens)}

    tokenizer = Qwen2Tokenizer(
        vocab=small_vocabulary,
        merges=small_merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=131072,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})

    for text in texts:
        assert tokenizer.tokenize(text) == whole.tokenize(text), text
    prefix = TEMPLATE.split("{}")[0]
    assert len(tokenizer(prefix)["input_ids"]) == TEMPLATE_TOKENS
    return tokenizer
