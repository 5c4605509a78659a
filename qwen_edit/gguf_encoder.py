"""Qwen2.5-VL in GGUF: the language model in one file, and in another beside it (mmproj) what sees pictures.

Names are llama.cpp's (``gguf-py/gguf/constants.py`` and ``tensor_mapping.py``); here they become those of transformers,
which ComfyUI's text encoder has too. Its converter takes the vision part's joined queries, keys and values apart, and
the two frames of its patch convolution; here they come together again.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from .blocks import BLOCK_TYPES, BlockType, dequantize, packed_shape
from .checkpoints import FLOAT_DTYPES, check_names, check_shape
from .errors import WEIGHTS
from .gguf import LANGUAGE, SUFFIX, VISION
from .headers import read_header
from .host_memory import Lock, page_lock
from .reading import Stored, mapped, read_ahead

VISION_MARK = "mmproj"  # in the names of vision files
EMBEDDING = "model.embed_tokens.weight"
MERGED = "visual.merger.mlp.2.weight"  # [C of the language model, C of four patches]
PATCHES = "visual.patch_embed.proj.weight"  # [C, 3, frames, height, width]

_ALONE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}
_FEED_FORWARD = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_IN_LANGUAGE_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
} | _FEED_FORWARD
_IN_VISION_BLOCKS = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
} | _FEED_FORWARD
_JOINED = ("attn_q", "attn_k", "attn_v")
_BLOCK = re.compile(r"(v\.)?blk\.(\d+)\.(\w+)")
_FORMAT = re.compile(r"[-_.](ud-)?(i?q\d\w*|bf16|f(p)?(16|32))$", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A tensor of a file: the shape of its values, and their format where they are in ggml's blocks."""

    stored: Stored
    shape: tuple[int, ...]
    kind: BlockType | None


Parts = dict[str, tuple[Part, ...]]


@dataclass(frozen=True)
class EncoderSource:
    """Where a text encoder's weights lie. ``parts`` has for each tensor (transformers' names) what it is made of."""

    language: Path
    vision: Path
    parts: Mapping[str, tuple[Part, ...]]

    @property
    def nbytes(self) -> int:
        return sum(part.stored.nbytes for parts in self.parts.values() for part in parts)

    def shape(self, name: str) -> list[int]:
        parts = self.parts[name]
        first, *rest = parts[0].shape
        if len(parts) == 1:
            return [first, *rest]
        if name == PATCHES:
            return [first, rest[0], len(parts), *rest[1:]]
        return [sum(part.shape[0] for part in parts), *rest]

    def dtype(self, name: str) -> torch.dtype:
        """Of what ``read_encoder`` makes of a tensor that is not to stay packed."""
        dtypes = [part.stored.dtype if part.kind is None else torch.bfloat16 for part in self.parts[name]]
        return reduce(torch.promote_types, dtypes)

    def kind(self, name: str) -> BlockType | None:
        """The format of a tensor that can stay in its blocks, because it lies in the file in one piece."""
        parts = self.parts[name]
        return parts[0].kind if len(parts) == 1 else None


def transformers_name(name: str) -> tuple[str, int] | None:
    """The tensor that one of llama.cpp's belongs to, and as which of its parts; None: none that is needed here.

    >>> transformers_name("v.blk.3.attn_k.bias")
    ('visual.blocks.3.attn.qkv.bias', 1)
    """
    if name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        return PATCHES, int(name.endswith(".1"))
    module, _, parameter = name.rpartition(".")
    found = _BLOCK.fullmatch(module)
    if found is None:
        return (f"{_ALONE[module]}.{parameter}", 0) if module in _ALONE else None
    vision, number, inside = found.groups()
    if vision and inside in _JOINED:
        return f"visual.blocks.{number}.attn.qkv.{parameter}", _JOINED.index(inside)
    there = (_IN_VISION_BLOCKS if vision else _IN_LANGUAGE_BLOCKS).get(inside)
    blocks = f"visual.blocks.{number}" if vision else f"model.layers.{number}"
    return None if there is None else (f"{blocks}.{there}.{parameter}", 0)


def encoder_source(language: Path) -> EncoderSource:
    """The text encoder whose language model is this file; what sees pictures is looked for beside it.

    Raises:
        ValueError: another model, a damaged file, or nothing beside it that sees pictures for it.
    """
    words = _parts(language, LANGUAGE)
    if EMBEDDING not in words:
        raise ValueError(f"{WEIGHTS} {language.name} is no language model: it has no tensor token_embd.weight.")
    vision, pictures = _vision(language, words[EMBEDDING][0].shape[-1])
    return EncoderSource(language, vision, words | pictures)


def is_vision_name(name: str) -> bool:
    return VISION_MARK in name.lower()


def vision_files(language: Path) -> list[Path]:
    """The files beside a GGUF file that may hold what sees pictures for it."""
    beside = sorted(language.parent.iterdir())
    return [p for p in beside if p.suffix.lower() == SUFFIX and is_vision_name(p.name) and p.is_file()]


def _vision(language: Path, channels: int) -> tuple[Path, Parts]:
    """The mmproj file in the same folder that makes pictures into tokens of so many channels; of several one whose name
    contains that of the language model up to its format."""
    fitting, others = [], []
    for path in vision_files(language):
        try:
            parts = _parts(path, VISION)
        except ValueError as e:
            others.append(str(e).removeprefix(WEIGHTS).strip())
            continue
        if MERGED in parts and parts[MERGED][0].shape[0] == channels:
            fitting.append((path, parts))
        else:
            others.append(f"{path.name} is of another model.")
    if not fitting:
        raise ValueError(
            f"{WEIGHTS} {language.name} reads text only, and what sees pictures, a second GGUF file with {VISION_MARK} in its"
            f" name, is not beside it. Download that of Qwen2.5-VL 7B into the same folder. {' '.join(others[:3])}".rstrip()
        )
    own = _FORMAT.sub("", language.stem).lower()
    return max(fitting, key=lambda found: own in found[0].name.lower())


def _parts(path: Path, architecture: str) -> Parts:
    found: dict[str, dict[int, Part]] = defaultdict(dict)
    for key, entry in read_header(path, (architecture,)).items():
        belongs = transformers_name(key)
        if belongs is None:
            continue
        if not entry["shape"]:
            raise ValueError(f"{WEIGHTS} {path.name}: {key} has no dimensions. Download it again.")
        kind = BLOCK_TYPES.get(entry["dtype"])
        shape = tuple(entry["shape"]) if kind is None else packed_shape(entry["shape"], kind)
        dtype = FLOAT_DTYPES[entry["dtype"]] if kind is None else torch.uint8
        stored = Stored(key, path, entry["data_offsets"][0], shape, dtype)
        found[belongs[0]][belongs[1]] = Part(stored, tuple(entry["shape"]), kind)
    return {name: tuple(part for _, part in sorted(parts.items())) for name, parts in found.items()}


def check_encoder(source: EncoderSource, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise a ValueError unless the files hold tensors of these names and shapes; they may hold more."""
    label = f"{source.language.name} and {source.vision.name}"
    check_names(label, expected, source.parts.keys() & expected.keys())
    for name, shape in expected.items():
        check_shape(label, name, source.shape(name), shape)


def read_encoder(
    source: EncoderSource,
    names: Collection[str],
    packed: Collection[str],
    device: torch.device,
    lock: Lock = page_lock,
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """These tensors on the device, in the order of the files.

    Those of ``packed`` are uint8, of ``packed_shape``; others that are in blocks become bfloat16, and floats stay as they
    are. On the CPU the files' own pages serve as memory. ``lock``: see ``read_ahead``.

    Raises:
        OSError: a file ends early or can't be read.
    """
    belongs = {part.stored.name: (name, part) for name in names for part in source.parts[name]}
    wanted = {key: part.stored for key, (_, part) in belongs.items()}
    wanted = dict(sorted(wanted.items(), key=lambda item: (item[1].path, item[1].offset)))
    waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    with closing(mapped(wanted) if device.type == "cpu" else read_ahead(wanted, device, lock)) as tensors:
        for key, tensor in tensors:
            name, part = belongs[key]
            if part.kind is not None and name not in packed:
                tensor = dequantize(tensor, part.kind, torch.bfloat16).view(part.shape)
            waiting[name][key] = tensor
            if len(waiting[name]) == len(source.parts[name]):
                parts = waiting.pop(name)
                yield name, _joined(name, [parts[part.stored.name] for part in source.parts[name]])


def _joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, dim=2) if name == PATCHES else torch.cat(parts)
