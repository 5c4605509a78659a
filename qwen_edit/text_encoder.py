"""Instruction and pictures to hidden states: the prompt template and Qwen2.5-VL, as diffusers' pipeline does it.

Source: diffusers ``pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`` (``_get_qwen_prompt_embeds``). Two
differences are deliberate: the user's own text is tokenized with special tokens off, so that ``<|image_pad|>`` in
a prompt is text and not a picture that is missing; and ``mm_token_type_ids`` is passed, without which
transformers 5 gives pictures one-dimensional positions (diffusers issue 14194).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
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

    Raises:
        ValueError: it is no text.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"{INPUT} A prompt is {prompt!r}; it must be text.")
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


@dataclass
class PreparedPictures:
    """Pictures as the vision tower takes them. Prompts that share one of these share its run: the first one that is
    encoded leaves ``features`` here."""

    pixel_values: torch.Tensor  # [patches, C * 2 * 14 * 14]
    image_grid_thw: torch.Tensor  # [pictures, 3], in patches
    features: torch.Tensor | None = None  # [tokens, C]


class FolderTextEncoder:
    """Tokenizer, processor and (once loaded) Qwen2.5-VL of a diffusers folder."""

    def __init__(self, folder: Path):
        from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

        # The fast and slow variants of this processor differ by rounding; the pipeline's folder decides which
        # is the default, and PIL's is the one that every machine has.
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.image_processor = Qwen2VLImageProcessor.from_pretrained(folder / "processor", local_files_only=True)

    def prepare(self, pictures: Sequence[Image.Image]) -> PreparedPictures | None:
        """The pictures of one or several prompts; None without pictures."""
        if not pictures:
            return None
        processed = self.image_processor(images=list(pictures), return_tensors="pt")
        return PreparedPictures(processed["pixel_values"], processed["image_grid_thw"])

    def tokenize(self, text: str, pictures: PreparedPictures | None = None, template: str | None = None) -> dict:
        """Model inputs for one prompt.

        Args:
            text: the prompt, behind its picture placeholders (see ``with_pictures``) if there are pictures.
            template: chat template with ``{}``; None: the edit template with pictures, the plain one without.

        Returns:
            ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` as Qwen2.5-VL takes them, the ``pictures``,
            and ``drop``: how many leading hidden states belong to the template.

        Raises:
            ValueError: the text has fewer placeholders than there are pictures.
        """
        template = template or (EDIT_TEMPLATE if pictures else TEXT_TEMPLATE)
        head, body = template.split(USER, 1)
        body, tail = body.split("{}", 1)
        body += text
        grids = pictures.image_grid_thw if pictures else ()
        merge = self.image_processor.merge_size**2

        ids = self._ids(head, special=True)
        plain = USER
        for number, grid in enumerate(grids):
            placeholder = _PLACEHOLDER.match(body)
            if placeholder is None:
                raise ValueError(f"{INPUT} There are {len(grids)} pictures but {number} placeholders in the text.")
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
            "pictures": pictures,
        }

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]


def encode(model: Any, inputs: dict) -> torch.Tensor:
    """Hidden states ``[1, L, C]`` of the user's part: pictures, prompt and the template's end.

    Args:
        model: ``Qwen2_5_VLForConditionalGeneration``; its language head is not run.
    """
    inner = model.model
    device = next(model.parameters()).device
    arguments = {k: inputs[k].to(device) for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    embeds = inner.get_input_embeddings()(arguments["input_ids"])
    pictures: PreparedPictures | None = inputs["pictures"]
    if pictures is not None:
        grid = arguments["image_grid_thw"] = pictures.image_grid_thw.to(device)
        if pictures.features is None:
            seen = inner.get_image_features(pictures.pixel_values.to(device), grid)
            pictures.features = torch.cat(seen.pooler_output)
        places = arguments["mm_token_type_ids"].bool().unsqueeze(-1)
        embeds = embeds.masked_scatter(places, pictures.features.to(embeds))
    return inner(**arguments, inputs_embeds=embeds).last_hidden_state[:, inputs["drop"] :]
