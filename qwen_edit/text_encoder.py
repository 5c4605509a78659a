"""Instruction and pictures to hidden states: the prompt template and Qwen2.5-VL, as diffusers' pipeline does it.

Source: diffusers ``pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`` (``_get_qwen_prompt_embeds``). Two
differences are deliberate: the user's own text is tokenized with special tokens off, so that ``<|image_pad|>`` in
a prompt is text and not a picture that is missing; and ``mm_token_type_ids`` is passed, without which
transformers 5 gives pictures one-dimensional positions (diffusers issue 14194).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .errors import INPUT

EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects,"
    " background), then explain how the user's text instruction should alter or modify the image. Generate a new"
    " image that meets the user's requirements while maintaining consistency with the original input where"
    " appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEXT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
USER = "user\n"
_PLACEHOLDER = re.compile(r"(Picture \d+: )?<\|vision_start\|><\|image_pad\|><\|vision_end\|>")
_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]+\|>")
# About 2,000 tokens; the released model was trained with far shorter instructions.
MAX_PROMPT_CHARACTERS = 8000


def with_pictures(prompt: str, count: int) -> str:
    """The prompt behind one placeholder for each picture, as the pipeline writes it."""
    return "".join(PICTURE.format(i + 1) for i in range(count)) + prompt


def as_plain_text(prompt: str) -> tuple[str, list[str]]:
    """The prompt as any encoder can take it, with a note for everything that was changed.

    Special tokens are broken up (``<|image_pad|>`` -> ``< |image_pad| >``): ComfyUI's own tokenizer would otherwise
    read them as commands. The length is bounded.
    """
    notes = []
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        notes.append(f"The prompt has {len(prompt):,} characters; the first {MAX_PROMPT_CHARACTERS:,} are used.")
        prompt = prompt[:MAX_PROMPT_CHARACTERS]
    encodable = prompt.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no text
    if encodable != prompt:
        notes.append("Characters that are no valid Unicode were replaced.")
        prompt = encodable
    plain = _SPECIAL.sub(lambda m: f"< {m.group()[1:-1]} >", prompt)
    if plain != prompt:
        notes.append("Special tokens in the prompt are taken as text.")
    return plain, notes


class FolderTextEncoder:
    """Tokenizer, processor and (once loaded) Qwen2.5-VL of a diffusers folder."""

    def __init__(self, folder: Path):
        from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

        # The fast and slow variants of this processor differ by rounding; the pipeline's folder decides which
        # is the default, and PIL's is the one that every machine has.
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.image_processor = Qwen2VLImageProcessor.from_pretrained(folder / "processor", local_files_only=True)

    def tokenize(self, text: str, pictures: Sequence[Image.Image] = (), template: str | None = None) -> dict:
        """Model inputs for one prompt.

        Args:
            text: the prompt, behind its picture placeholders (see ``with_pictures``) if there are pictures.
            template: chat template with ``{}``; None: the edit template with pictures, the plain one without.

        Returns:
            ``input_ids`` and the rest of Qwen2.5-VL's arguments, plus ``drop``: how many leading hidden states
            belong to the template.

        Raises:
            ValueError: the text has fewer placeholders than there are pictures.
        """
        template = template or (EDIT_TEMPLATE if pictures else TEXT_TEMPLATE)
        head, body = template.split(USER, 1)
        body, tail = body.split("{}", 1)
        body += text
        processed = self.image_processor(images=list(pictures), return_tensors="pt") if pictures else {}
        merge = self.image_processor.merge_size**2

        ids = self._ids(head, special=True)
        plain = USER
        for number, grid in enumerate(processed.get("image_grid_thw", ())):
            placeholder = _PLACEHOLDER.match(body)
            if placeholder is None:
                raise ValueError(f"{INPUT} There are {len(pictures)} pictures but {number} placeholders in the text.")
            ids += self._ids(plain + (placeholder.group(1) or ""))
            ids += self._ids("<|vision_start|>", special=True)
            ids += self._ids("<|image_pad|>", special=True) * (int(grid.prod()) // merge)
            ids += self._ids("<|vision_end|>", special=True)
            plain, body = "", body[placeholder.end() :]
        ids += self._ids(plain + body) + self._ids(tail, special=True)

        input_ids = torch.tensor([ids])
        image_pad = self._ids("<|image_pad|>", special=True)[0]
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == image_pad).int(),
            "drop": len(self._ids(head + USER, special=True)),
            **processed,
        }

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]


def encode(model: Any, inputs: dict) -> torch.Tensor:
    """Hidden states ``[1, L, C]`` of the user's part: pictures, prompt and the template's end.

    Args:
        model: ``Qwen2_5_VLForConditionalGeneration``; its language head is not run.
    """
    inputs = dict(inputs)
    drop = inputs.pop("drop")
    parameter = next(model.parameters())
    inputs = {k: v.to(parameter.device) for k, v in inputs.items()}
    return model.model(**inputs).last_hidden_state[:, drop:]
