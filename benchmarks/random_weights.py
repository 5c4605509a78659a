"""Full-size random weights as the single files that ComfyUI users have, for speed measurements without the released ones.

    python benchmarks/random_weights.py FOLDER --comfyui PATH [--layers 60] [--formats int8_convrot,Q4_K,text_fp8] [--only]

Writes FOLDER/{diffusion_models,text_encoders,vae,loras}/random_*.safetensors: the transformer of Qwen-Image-Edit-2511
(41 GB in bf16) and its twin in the form of the official fp8mixed file (27 GB), Qwen2.5-VL-7B (16.6 GB), the VAE, and a
LoRA of rank 64 on every linear of the blocks, tensor by tensor, so that memory stays small. ``--formats`` adds the
transformer in other forms (random_NAME.safetensors or .gguf; 27 GB in 8 bits but for the modulation, 22 in Q8_0, 20 in w4a4, 12 in
Q4_K), and the text encoder in scaled fp8 (``text_fp8``, 9 GB) or as GGUF in Q4_K with its mmproj file (``text_gguf``, 6 GB).
Speed does not depend on the values; pictures made with these weights mean nothing.
"""

import argparse
import json
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from gguf_files import random_weight
from stored_files import in_layout

from qwen_edit.blocks import BLOCK_TYPES

STD = 0.02
LORA_B = 0.125  # of STD; a LoRA of rank 64 then changes its weights by 2 %, as trained ones do


def names_of_comfyui(comfyui: Path) -> dict[str, dict[str, torch.Size]]:
    """Tensor names and shapes of text encoder and VAE, from ComfyUI's own classes."""
    sys.path.insert(0, str(comfyui))
    sys.argv = [sys.argv[0]]
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.ldm.wan.vae
    import comfy.ops
    import comfy.text_encoders.llama

    with torch.device("meta"):
        encoder = comfy.text_encoders.llama.Qwen25_7BVLI({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
        vae = comfy.ldm.wan.vae.WanVAE(
            dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], image_channels=3, conv_out_channels=3, dropout=0.0,
        )  # fmt: skip
    return {
        "text_encoders": {k: v.shape for k, v in encoder.state_dict().items()},
        "vae": {k: v.shape for k, v in vae.state_dict().items()},
    }


def transformer_names(layers: int) -> dict[str, torch.Size]:
    """Tensor names and shapes of the 2511 transformer; ``layers`` is 60 in the released model."""
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=layers, zero_cond_t=True)
    return {k: v.shape for k, v in model.state_dict().items()} | {"__index_timestep_zero__": torch.Size([0])}


class Entry(NamedTuple):
    """A tensor of a file; ``data`` None: random numbers."""

    name: str
    shape: Sequence[int]
    dtype: str
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        count = int(np.prod(self.shape))
        kind = BLOCK_TYPES.get(self.dtype)
        return count * SIZES[self.dtype] if kind is None else count // kind.values * kind.nbytes


FP8_MARK = json.dumps({"format": "float8_e4m3fn"}).encode()
FP8_SCALE = 4 * STD / 448
FP8_SCALE_BYTES = struct.pack("<f", FP8_SCALE)
SIZES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "U8": 1, "I8": 1}
DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}
# By what --formats calls them, as tests/stored_files.py does.
LAYOUTS = {"int8_convrot": "int8_convrot", "int8": "int8 rowwise", "w4a4": "w4a4"}
BLOCKS = ("Q8_0", "Q4_K")
TEXT_FP8, TEXT_GGUF = "text_fp8", "text_gguf"


def in_block(name: str, shape: Sequence[int]) -> bool:
    return name.startswith("transformer_blocks.") and len(shape) == 2


def floats(shapes: Mapping[str, torch.Size]) -> Iterator[Entry]:
    return (Entry(name, shape, "BF16") for name, shape in shapes.items())


def fp8_mixed(shapes: Mapping[str, torch.Size]) -> Iterator[Entry]:
    """The tensors of ComfyUI's fp8mixed form: fp8 with one scale for each linear of the blocks but the modulation's."""
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if in_block(name, shape) and "_mod." not in name:
            yield Entry(name, shape, "F8_E4M3")
            yield Entry(f"{layer}.weight_scale", (), "F32", FP8_SCALE_BYTES)
            yield Entry(f"{layer}.comfy_quant", (len(FP8_MARK),), "U8", FP8_MARK)
        else:
            yield Entry(name, shape, "BF16")


def in_layout_of(shapes: Mapping[str, torch.Size], layout: str) -> Iterator[Entry]:
    """The same linears as comfy-kitchen quantizes them: one of each shape, and its bytes for all of that shape."""
    made: dict[torch.Size, list[Entry]] = {}
    for name, shape in shapes.items():
        if not in_block(name, shape) or "_mod." in name:
            yield Entry(name, shape, "BF16")
            continue
        if shape not in made:
            weight = torch.empty(shape).normal_(std=STD, generator=torch.Generator().manual_seed(0)).bfloat16()
            stored = in_layout({"x.weight": weight}, layout, lambda *_: True)
            made[shape] = [
                Entry(
                    part,
                    tensor.shape,
                    DTYPES[tensor.dtype],
                    tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
                )
                for part, tensor in stored.items()
            ]
        yield from (
            entry._replace(name=name.removesuffix("weight") + entry.name.removeprefix("x.")) for entry in made[shape]
        )


def in_blocks(shapes: Mapping[str, torch.Size], kind: str) -> Iterator[Entry]:
    """As the converters for GGUF leave it: all linears of the blocks, the modulation too."""
    return (
        Entry(name, shape, kind if in_block(name, shape) else "BF16") for name, shape in shapes.items() if shape.numel()
    )


def text_fp8(shapes: Mapping[str, torch.Size]) -> Iterator[Entry]:
    """The text encoder as the official fp8_scaled file has it: the language model's linears, one scale for each."""
    for name, shape in shapes.items():
        if name.endswith("_proj.weight") and not name.startswith("visual."):
            yield Entry(name, shape, "F8_E4M3")
            yield Entry(name.removesuffix("weight") + "scale_weight", (), "F32", FP8_SCALE_BYTES)
        else:
            yield Entry(name, shape, "BF16")
    yield Entry("scaled_fp8", (2,), "F8_E4M3", bytes(2))


def text_gguf(shapes: Mapping[str, torch.Size]) -> tuple[list[Entry], list[Entry]]:
    """The language model in Q4_K and the vision part (mmproj) in bf16, under llama.cpp's names."""
    import gguf

    tables = [gguf.get_tensor_name_map(arch, 64) for arch in (gguf.MODEL_ARCH.QWEN2VL, gguf.MODEL_ARCH.MMPROJ)]

    def named(name: str) -> str:
        module, _, parameter = name.rpartition(".")
        return next(f"{found}.{parameter}" for table in tables if (found := table.get_name(module)) is not None)

    def entry(name: str, shape: Sequence[int], dtype: str) -> Entry:
        return Entry(named(name), shape, "F32" if len(shape) == 1 else dtype)

    words, sees = [], []
    for name, shape in shapes.items():
        if name.endswith("patch_embed.proj.weight"):  # a part for each of two frames
            flat = (shape[0], shape[1], *shape[3:])
            sees += [Entry(named(name) + part, flat, "F32") for part in ("", ".1")]
        elif ".attn.qkv." in name:
            third = (shape[0] // 3, *shape[1:])
            sees += [entry(name.replace("attn.qkv", f"attn.{part}"), third, "BF16") for part in "qkv"]
        elif name.startswith("visual."):
            sees.append(entry(name, shape, "BF16"))
        else:
            words.append(entry(name, shape, "Q4_K"))
    return words, sees


class Pool:
    """Random numbers that the tensors take in turn: making 40 GB of them afresh would take most of the time."""

    def __init__(self, elements: int = 2**26):
        plain = torch.empty(elements).normal_(std=STD, generator=torch.Generator().manual_seed(0))
        scaled = (plain / FP8_SCALE).clamp(-448, 448)
        self._bytes: dict[str, Any] = {
            "F32": plain.view(torch.uint8).numpy().data,
            "BF16": plain.bfloat16().view(torch.uint8).numpy().data,
            "lora_B": (plain * LORA_B).bfloat16().view(torch.uint8).numpy().data,
            "F8_E4M3": scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy().data,
        }

    def write(self, file: BinaryIO, entry: Entry) -> None:
        module = entry.name.rpartition(".")[0].rpartition(".")[2]
        if entry.data is not None:
            file.write(entry.data)
        elif re.search("norm|ln", module) or entry.name.endswith("gamma"):  # gains of norms, as in any trained model
            ones = torch.ones(tuple(entry.shape), dtype=torch.float32 if entry.dtype == "F32" else torch.bfloat16)
            file.write(ones.view(torch.uint8).numpy().data)
        else:
            pool, left = self._of("lora_B" if ".lora_B." in entry.name else entry.dtype), entry.nbytes
            while left > 0:
                file.write(pool[: min(left, len(pool))])
                left -= len(pool)

    def _of(self, dtype: str) -> Any:
        if dtype not in self._bytes:
            self._bytes[dtype] = blocks(dtype).reshape(-1).data
        return self._bytes[dtype]


def blocks(kind: str, values: int = 2**24) -> np.ndarray:
    """Blocks of one of ggml's formats, whose values have about the spread of the others."""
    if kind == "Q4_K":
        return random_weight((values,), kind, STD / 256, 0)
    import gguf

    numbers = np.random.default_rng(0).normal(0, STD, values).astype(np.float32)
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind])


def write(path: Path, entries: Iterable[Entry], pool: Pool) -> int:
    """Write tensors as one safetensors or GGUF file; returns its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to = write_gguf if path.suffix == ".gguf" else write_safetensors
    write_to(path, list(entries), pool)
    return path.stat().st_size


def write_safetensors(path: Path, entries: Sequence[Entry], pool: Pool) -> None:
    header: dict[str, Any] = {"__metadata__": {"content": "random weights"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            pool.write(file, entry)


def write_gguf(path: Path, entries: Sequence[Entry], pool: Pool) -> None:
    import gguf

    language = any(entry.name == "token_embd.weight" for entry in entries)
    writer = gguf.GGUFWriter(path, "qwen2vl" if language else "clip" if "mmproj" in path.name else "qwen_image")
    writer.add_name("Qwen-Image-Edit-2511 random")  # by which a GGUF file of the transformer is told from 2509
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.dtype]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float16), entry.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        for entry in entries:
            file.write(bytes(-file.tell() % 32))
            pool.write(file, entry)


def lora(shapes: Mapping[str, torch.Size], rank: int) -> Iterator[Entry]:
    for name, shape in shapes.items():
        if in_block(name, shape):
            layer = f"transformer.{name.removesuffix('.weight')}"
            yield Entry(f"{layer}.lora_A.weight", (rank, shape[1]), "BF16")
            yield Entry(f"{layer}.lora_B.weight", (shape[0], rank), "BF16")


def in_format(wanted: str, transformer: Mapping[str, torch.Size], encoder: Mapping[str, torch.Size]):
    """The files (below the folder) of one of ``--formats``, and what is in them."""
    if wanted == TEXT_FP8:
        return {f"text_encoders/random_{TEXT_FP8}.safetensors": text_fp8(encoder)}
    if wanted == TEXT_GGUF:
        words, sees = text_gguf(encoder)
        return {"text_encoders/random_text_Q4_K.gguf": words, "text_encoders/random_text_mmproj_BF16.gguf": sees}
    if wanted in BLOCKS:
        return {f"diffusion_models/random_{wanted}.gguf": in_blocks(transformer, wanted)}
    return {f"diffusion_models/random_{wanted}.safetensors": in_layout_of(transformer, LAYOUTS[wanted])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=60, help="transformer blocks (fewer: a quick try)")
    parser.add_argument("--without-fp8", action="store_true", help="leave out the fp8mixed twin")
    parser.add_argument("--without-bf16", action="store_true", help="only the fp8mixed twin and the VAE (27 GB)")
    parser.add_argument(
        "--formats", help=f"further files, of {', '.join([*LAYOUTS, *BLOCKS, TEXT_FP8, TEXT_GGUF])}; comma between"
    )
    parser.add_argument("--only", action="store_true", help="nothing but the files of --formats")
    options = parser.parse_args()
    formats = options.formats.split(",") if options.formats else []
    unknown = set(formats) - {*LAYOUTS, *BLOCKS, TEXT_FP8, TEXT_GGUF}
    if unknown:
        parser.error(f"--formats does not know {', '.join(sorted(unknown))}.")
    pool = Pool()
    transformer = transformer_names(options.layers)
    others = names_of_comfyui(options.comfyui)
    bf16, fp8 = (f"diffusion_models/random_{name}.safetensors" for name in ("diffusion_models", "fp8"))
    encoder, vae = (f"{kind}/random_{kind}.safetensors" for kind in ("text_encoders", "vae"))
    plans = {bf16: floats(transformer), encoder: floats(others["text_encoders"]), vae: floats(others["vae"])}
    if not options.without_fp8:
        plans[fp8] = fp8_mixed(transformer)
    plans["loras/random_rank64.safetensors"] = lora(transformer, 64)
    if options.without_bf16:
        plans = {name: plans[name] for name in (fp8, vae)}
    if options.only:
        plans = {}
    for wanted in formats:
        plans |= in_format(wanted, transformer, others["text_encoders"])
    for name, entries in plans.items():
        print(f"{options.folder / name}: {write(options.folder / name, entries, pool) / 1e9:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
