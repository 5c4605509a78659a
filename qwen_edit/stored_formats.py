"""Which tensors of a ComfyUI single file are quantized and how, from its header and the small JSON beside them.

ComfyUI 0.30 writes and reads three dialects (``comfy/ops.py``, ``comfy/utils.py`` ``convert_old_quants``):

- plain fp8: a tensor of that dtype and nothing else; its scale is 1.
- scaled fp8: a tensor ``scaled_fp8`` for the file, ``scale_weight`` and ``scale_input`` beside each weight. A marker of
  two elements asks for products in full precision.
- for each layer a tensor ``comfy_quant`` (JSON as uint8), or one entry ``_quantization_metadata`` of the file's metadata
  for all layers, with ``weight_scale`` and so on beside the weights.

Scales of activations (``scale_input``, ``input_scale``) are not used: ours are measured for each token.
"""

import json
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .errors import WEIGHTS

Header = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Format:
    """One of ComfyUI's formats.

    Attributes:
        dtype: safetensors' name of the stored elements.
        family: what it is called on the node.
        packed: numbers in one element, side by side in a row.
        multiple: rows and columns are padded to multiples of this.
        scales: parameter of comfy-kitchen's layout -> name beside the weight.
        block: numbers of a row that share a scale; None: one scale for the weight or for each row.
    """

    dtype: str
    family: str
    packed: int = 1
    multiple: int = 1
    scales: Mapping[str, str] = field(default_factory=lambda: {"scale": "weight_scale"})
    block: int | None = None


FORMATS = {
    "float8_e4m3fn": Format("F8_E4M3", "fp8"),
    "float8_e5m2": Format("F8_E5M2", "fp8"),
    "int8_tensorwise": Format("I8", "int8"),
    "convrot_w4a4": Format("I8", "w4a4", packed=2),
    "nvfp4": Format(
        "U8",
        "nvfp4",
        packed=2,
        multiple=16,
        scales={"scale": "weight_scale_2", "block_scale": "weight_scale"},
        block=16,
    ),
    "mxfp8": Format("F8_E4M3", "mxfp8", multiple=32, block=32),
}
PLAIN_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FLOATS = ("BF16", "F16", "F32", *PLAIN_FP8)  # what every other tensor may be
ROTATIONS = (16, 64, 256)  # channels rotated together, as comfy-kitchen's kernels know them
MARKER = "scaled_fp8"
OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
SMOOTHING = "pre_quant_scale"
BESIDE = ("weight_scale", "weight_scale_2", "input_scale", SMOOTHING, "comfy_quant")


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight ``[N, K]`` of a file.

    Attributes:
        format: one of ``FORMATS``.
        scales: parameter of comfy-kitchen's layout -> name in the file.
        rotation: how many channels are rotated together (ConvRot, arXiv 2512.03673); 0: none.
        full_precision: the file asks for a product with float activations.
        smoothing: name in the file of factors ``[K]`` for the input, which the weight expects.
    """

    format: str
    scales: Mapping[str, str]
    rotation: int = 0
    full_precision: bool = False
    smoothing: str | None = None

    @property
    def family(self) -> str:
        return "int8_convrot" if self.format == "int8_tensorwise" and self.rotation else FORMATS[self.format].family

    def stored_shape(self, shape: Sequence[int]) -> list[int]:
        """That of the file's tensor, of one byte an element, for a weight of this shape."""
        kind = FORMATS[self.format]
        rows, columns = (_up(size, kind.multiple) for size in shape)
        return [rows, columns // kind.packed]

    def nbytes(self, shape: Sequence[int]) -> int:
        """What a weight of this shape takes in memory, with its scales."""
        data = self.stored_shape(shape)
        scales = 4 * shape[0] if FORMATS[self.format].block is None else block_scales(self.format, data)
        return math.prod(data) + scales


def block_scales(format: str, data: Sequence[int]) -> int:
    """How many scales, of a byte each, the blocks of a stored tensor have: comfy-kitchen lays them out in tiles of 128 x 4."""
    kind = FORMATS[format]
    assert kind.block is not None
    return _up(data[0], 128) * _up(data[1] * kind.packed // kind.block, 4)


def unpacked(stored: StoredWeight | None, shape: list[int]) -> list[int]:
    """The shape ``[N, K]`` of a weight whose tensor in the file has this one."""
    return shape if stored is None else [shape[0], shape[1] * FORMATS[stored.format].packed]


def take_stored_weights(
    path: Path, header: Header, names: MutableMapping[str, str], metadata: Mapping[str, str]
) -> dict[str, StoredWeight]:
    """The quantized weights among ``names`` (the model's tensor name -> name in the file), by the model's names. What
    belongs to them is taken out of ``names``.

    Raises:
        ValueError: a format or dtype that is not understood, or scales that are missing or of the wrong shape.
    """
    layers = _described_for_all(path, metadata, names)
    marker = names.pop(MARKER, None)
    full_precision = marker is not None and math.prod(header[marker]["shape"]) == 2
    beside = _take_what_lies_beside(names)
    for layer, tensors in beside.items():
        if "comfy_quant" in tensors:
            layers[layer] = _read_json(path, tensors["comfy_quant"], header[tensors["comfy_quant"]])
    stored = {}
    for name, key in names.items():
        layer, _, parameter = name.rpartition(".")
        found, shape = header[key]["dtype"], header[key]["shape"]
        described = layers.get(layer) if parameter == "weight" else None
        if described is None and found in PLAIN_FP8 and len(shape) == 2:
            described = {"format": PLAIN_FP8[found], "full_precision_matrix_mult": full_precision}
        if described is not None:
            stored[name] = _stored_weight(path, name, header, header[key], described, beside.pop(layer, {}))
        elif found not in FLOATS:
            _not_understood(path, name, f"has dtype {found} and no description of its format")
    left = [f"{layer}.{what}" for layer, tensors in beside.items() for what in tensors if what != "input_scale"]
    if left:
        _not_understood(path, left[0], "belongs to no quantized weight")
    return stored


def _described_for_all(path: Path, metadata: Mapping[str, str], names: Mapping[str, str]) -> dict[str, dict]:
    """What the file's metadata say of its layers, which it may call with or without the prefix of its tensors."""
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = dict(json.loads(text)["layers"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{WEIGHTS} {path.name}: its _quantization_metadata can't be read ({e!r}).") from e
    found = {}
    for name, key in names.items():
        layer, stored_layer = name.removesuffix(".weight"), key.removesuffix(".weight")
        if layer != name and (layer in layers or stored_layer in layers):
            found[layer] = layers.get(layer, layers.get(stored_layer))
    return found


def _take_what_lies_beside(names: MutableMapping[str, str]) -> dict[str, dict[str, str]]:
    """Layer -> {what: name in the file}."""
    found: dict[str, dict[str, str]] = {}
    for name in list(names):
        layer, _, what = name.rpartition(".")
        what = OLD_NAMES.get(what, what)
        if what in BESIDE:
            found.setdefault(layer, {})[what] = names.pop(name)
    return found


def _read_json(path: Path, name: str, entry: Mapping[str, Any]) -> dict:
    begin, end = entry["data_offsets"]
    with path.open("rb") as file:
        file.seek(begin)
        text = file.read(end - begin)
    try:
        described = json.loads(text)
    except ValueError:
        described = None
    if not isinstance(described, dict):
        _not_understood(path, name, f"is no JSON object ({text[:40]!r})")
    return described


def _stored_weight(
    path: Path,
    name: str,
    header: Header,
    entry: Mapping[str, Any],
    described: Mapping[str, Any],
    beside: Mapping[str, str],
) -> StoredWeight:
    kind = FORMATS.get(str(described.get("format")))
    if kind is None:
        _not_understood(path, name, f"has the format {described.get('format')!r}")
    if entry["dtype"] != kind.dtype or len(entry["shape"]) != 2:
        _not_understood(path, name, f"is {entry['dtype']} {entry['shape']}, but called {described['format']}")
    nested = described.get("params")  # as some writers have it
    options = {**(nested if isinstance(nested, dict) else {}), **described}
    rotation = 0
    if described["format"] == "convrot_w4a4" or (described["format"] == "int8_tensorwise" and options.get("convrot")):
        rotation = options.get("convrot_groupsize", 256)
    rows, columns = entry["shape"][0], entry["shape"][1] * kind.packed
    if rotation and (rotation not in ROTATIONS or columns % rotation):
        _not_understood(path, name, f"is rotated in groups of {rotation!r} of its {columns} channels")
    scales = {parameter: beside[what] for parameter, what in kind.scales.items() if what in beside}
    lacks = [what for parameter, what in kind.scales.items() if parameter not in scales]
    if lacks and kind.family != "fp8":  # fp8 without a scale is plain
        _not_understood(path, name, f"is called {described['format']}, but {lacks[0]} is missing")
    for parameter, key in scales.items():
        what, wanted = kind.scales[parameter], (1, rows)
        if kind.block is not None and what == "weight_scale":
            wanted = (block_scales(described["format"], entry["shape"]),)
        if math.prod(header[key]["shape"]) not in wanted:
            _not_understood(path, name, f"{entry['shape']} has a {what} {header[key]['shape']}")
    smoothing = beside.get(SMOOTHING)
    if smoothing is not None and (described["format"] != "nvfp4" or math.prod(header[smoothing]["shape"]) != columns):
        _not_understood(path, name, f"{entry['shape']} has a {SMOOTHING} {header[smoothing]['shape']}")
    full_precision = bool(described.get("full_precision_matrix_mult"))
    return StoredWeight(described["format"], scales, rotation, full_precision, smoothing)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _not_understood(path: Path, tensor: str, found: str) -> NoReturn:
    raise ValueError(
        f"{WEIGHTS} {path.name}: {tensor} {found}. This loader understands bf16, fp16, fp32 and ComfyUI's formats"
        f" {', '.join(FORMATS)}, plain, scaled or mixed. Use a file of one of these, or the loader that the file was made"
        " for and Qwen Edit Accelerate after it."
    )
