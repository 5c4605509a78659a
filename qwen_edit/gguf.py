"""GGUF files: their header, read with every count and size checked before it is believed.

The form is that of ggml's ``docs/gguf.md``, versions 2 and 3, little endian. A header is returned in the shape of
a safetensors one (``checkpoints.read_header``), so what decides from headers need not know which file it has. Two
habits of the files that people have come from ComfyUI-GGUF's converter (``tools/convert.py``): names are diffusers', and
a weight whose rows are no whole number of blocks is stored reshaped, with its own shape in the metadata.
"""

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .blocks import BLOCK_TYPES
from .errors import WEIGHTS

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURES = ("qwen_image", "pig", None)  # pig: calcuis' converter, for any model; None: stable-diffusion.cpp's
LANGUAGE, VISION = "qwen2vl", "clip"  # Qwen2.5-VL's two files, see gguf_encoder.py
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# A language model's header, with its vocabulary, has about 10 MB; a 60-block transformer's 0.2 MB.
MAX_HEADER_BYTES = 100_000_000
MAX_ENTRIES = 100_000
MAX_DIMENSIONS = 8  # ggml's own limit is 4
MAX_NESTING = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# By ggml's number (enum ggml_type in ggml.h): name, values in a block, its bytes.
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
_TYPES |= {kind.number: (kind.name, kind.values, kind.nbytes) for kind in BLOCK_TYPES.values()}
# Those that are not decoded here, for the message.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


class _Unusable(Exception):
    """Why a file is refused, as the end of a sentence."""


class _Reader:
    """Reads the header's numbers and strings, and nothing beyond the file's end or the limit."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, min(size, MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise _Unusable("its header does not end where the file does, so the download was cut off or bytes changed")
        self._left -= count
        return self._file.read(count)

    def number(self, code: str):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, most: int) -> int:
        found = self.number("Q")
        if found > most:
            raise _Unusable(f"its header announces {found:,} {what}")
        return found

    def string(self) -> str:
        return self.take(self.count("bytes of text", MAX_HEADER_BYTES)).decode("utf-8", errors="replace")

    def value(self, kind: int, nesting: int = 0):
        """A value of the metadata; of arrays only short ones of numbers are kept, the others become None."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or nesting == MAX_NESTING:
            raise _Unusable(f"its metadata has a value of type {kind}")
        item, length = self.number("I"), self.count("items in a list", MAX_HEADER_BYTES)
        if item in _SCALARS:
            data = self.take(length * struct.calcsize("<" + _SCALARS[item]))
            return struct.unpack(f"<{length}{_SCALARS[item]}", data) if length <= MAX_DIMENSIONS else None
        for _ in range(length):
            if item == _STRING:  # a vocabulary
                self.take(self.count("bytes of text", MAX_HEADER_BYTES))
            else:
                self.value(item, nesting + 1)
        return None


def read_gguf_header(
    path: Path, architectures: Sequence[str | None] = ARCHITECTURES
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Tensors and metadata of a GGUF file of one of these architectures, without reading weights.

    Returns:
        Tensor name -> {"dtype", "shape", "data_offsets"}: dtype is a name of ``BLOCK_TYPES``, F32, F16 or BF16; the shape
        is the weight's own, ``[N, K]``; offsets are counted from the file's start. And the metadata, long lists left out.

    Raises:
        ValueError: no GGUF file, with the likely cause, or one that is damaged, of another architecture or of a type that
            is not decoded here.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            return _read(_Reader(file, size), size, file.tell, architectures)
        except _Unusable as e:
            raise ValueError(f"{WEIGHTS} {path.name} ({size:,} bytes) can't be used: {e}.") from e


def _read(
    reader: _Reader, size: int, position: Callable[[], int], architectures: Sequence[str | None]
) -> tuple[dict[str, dict], dict[str, Any]]:
    magic = reader.take(4)
    if magic != MAGIC:
        raise _Unusable(f"it does not begin as a GGUF file does ({magic!r}). Download it again")
    version = reader.number("I")
    if version not in VERSIONS:
        raise _Unusable(f"it is of GGUF version {version}, this loader reads 2 and 3 (little endian)")
    tensor_count, value_count = (reader.count(what, MAX_ENTRIES) for what in ("tensors", "values of metadata"))
    metadata = {}
    for _ in range(value_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    architecture = metadata.get("general.architecture")
    if architecture not in architectures:
        raise _Unusable(_unfit(architecture, architectures))
    described = [_tensor(reader, metadata) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in (2**n for n in range(3, 17)):
        raise _Unusable(f"its alignment is {alignment!r}, not a power of two from 8 to 65536")
    start = -(-position() // alignment) * alignment
    header, end = {}, start
    for name, dtype, shape, offset, nbytes in sorted(described, key=lambda tensor: tensor[3:]):
        begin = start + offset
        if name in header or begin < end or offset % alignment:
            raise _Unusable(f"the tensor {name} is there twice, or lies where it can't. Download it again")
        end = begin + nbytes
        if end > size:
            raise _Unusable(f"it ends inside the tensor {name}, so the download was cut off. Download it again")
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, metadata


def _unfit(architecture: Any, architectures: Sequence[str | None]) -> str:
    needed = {
        ARCHITECTURES: "the transformer of Qwen-Image-Edit",
        (LANGUAGE,): "the text encoder of Qwen-Image, Qwen2.5-VL 7B",
        (VISION,): "the vision part of Qwen2.5-VL 7B",
    }[tuple(architectures)]
    hint = ""
    if architecture in (LANGUAGE, VISION) and architectures is ARCHITECTURES:
        hint = ". This is a text encoder: put it into models/text_encoders and choose it as text_encoder"
    return f"found the architecture {architecture!r}, this needs {needed}{hint}"


def _tensor(reader: _Reader, metadata: dict[str, Any]) -> tuple[str, str, list[int], int, int]:
    """Name, type, shape, offset and size of the next tensor."""
    name = reader.string()
    dimensions = reader.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise _Unusable(f"the tensor {name} has {dimensions} dimensions")
    stored = [reader.number("Q") for _ in range(dimensions)]  # the fastest first
    number, offset = reader.number("I"), reader.number("Q")
    if number not in _TYPES:
        raise _Unusable(
            f"the tensor {name} is stored as {_OTHER_TYPES.get(number, f'type {number}')}. This loader takes F32, F16,"
            f" BF16, {', '.join(BLOCK_TYPES)}; choose a file of one of those"
        )
    dtype, values, nbytes = _TYPES[number]
    row = stored[0] if stored else 1
    if row % values:
        raise _Unusable(f"the tensor {name} has rows of {row} values, {dtype} needs multiples of {values}")
    shape = metadata.get(ORIGINAL_SHAPE + name, tuple(reversed(stored)))
    sizes = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sizes or math.prod(shape) != math.prod(stored):
        raise _Unusable(f"the shape {shape} that its metadata gives the tensor {name} is not that of {stored} values")
    return name, dtype, list(shape), offset, math.prod(stored) // values * nbytes
