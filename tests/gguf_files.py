"""GGUF files for tests, written with the ``gguf`` package."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from qwen_edit.blocks import BLOCK_TYPES

FLOATS = ("F32", "F16", "BF16")
# Formats that the package reads but does not write, and where their blocks have float16 scales.
SCALES_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def random_weight(shape: tuple[int, ...], kind: str, scale: float, seed: int) -> np.ndarray:
    """Blocks with random bytes whose float16 scales are small: what no quantizer of the package makes."""
    block = BLOCK_TYPES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block.values, block.nbytes), dtype=np.uint8)
    for at in SCALES_AT[kind]:
        numbers = rng.normal(0, scale, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write(
    path: Path,
    state: Mapping[str, torch.Tensor],
    kind_of: Callable[[str, torch.Tensor], str],
    *,
    architecture: str = "qwen_image",
    prefix: str = "",
    name: str | None = None,
) -> dict[str, torch.Tensor]:
    """Write ``state``; each tensor in the format that ``kind_of(name, tensor)`` says. Those of ``SCALES_AT`` get random weights.

    A weight whose rows are no whole number of blocks is stored reshaped, as ComfyUI-GGUF's converter does.

    Returns:
        What the file's weights are as float32, by the package's own arithmetic.
    """
    writer = gguf.GGUFWriter(path, architecture)
    if name is not None:
        writer.add_name(name)
    floats = {}
    for index, (key, tensor) in enumerate(state.items()):
        kind = gguf.GGMLQuantizationType[kind_of(key, tensor)]
        values = tensor.float().numpy()
        if kind.name in BLOCK_TYPES and values.shape[-1] % BLOCK_TYPES[kind.name].values:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{key}", [int(n) for n in values.shape])
            values = values.reshape(-1, BLOCK_TYPES[kind.name].values)
        if kind.name in SCALES_AT:
            data = random_weight(values.shape, kind.name, 0.002, index)
        else:
            data = gguf.quants.quantize(values, kind)
        writer.add_tensor(prefix + key, data, raw_dtype=kind)
        floats[key] = torch.from_numpy(gguf.quants.dequantize(data, kind)).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return floats
