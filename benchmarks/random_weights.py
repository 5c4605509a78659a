"""Full-size random weights as the single files that ComfyUI users have, for speed measurements without the released ones.

    python benchmarks/random_weights.py FOLDER --comfyui PATH [--layers 60]

Writes FOLDER/{diffusion_models,text_encoders,vae,loras}/random_*.safetensors: the transformer of Qwen-Image-Edit-2511
(41 GB in bf16) and its twin in the form of the official fp8mixed file (27 GB), Qwen2.5-VL-7B (16.6 GB), the VAE, and a
LoRA of rank 64 on every linear of the blocks, tensor by tensor, so that memory stays small. Speed does not depend on
the values; pictures made with these weights mean nothing.
"""

import argparse
import json
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

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


def fp8_mixed(shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, torch.Size, str]]:
    """The tensors of ComfyUI's fp8mixed form: fp8 with one scale for each linear of the blocks but the modulation's."""
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if name.startswith("transformer_blocks.") and len(shape) == 2 and "_mod." not in name:
            yield name, shape, "F8_E4M3"
            yield f"{layer}.weight_scale", torch.Size([]), "F32"
            yield f"{layer}.comfy_quant", torch.Size([len(FP8_MARK)]), "U8"
        else:
            yield name, shape, "BF16"


FP8_MARK = json.dumps({"format": "float8_e4m3fn"}).encode()
FP8_SCALE = 4 * STD / 448
SIZES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "U8": 1}


class Pool:
    """Random numbers that the tensors take in turn: making 40 GB of them afresh would take most of the time."""

    def __init__(self, elements: int = 2**26):
        plain = torch.empty(elements).normal_(std=STD, generator=torch.Generator().manual_seed(0))
        scaled = (plain / FP8_SCALE).clamp(-448, 448)
        self._bytes = {
            "BF16": plain.bfloat16().view(torch.uint8).numpy().data,
            "lora_B": (plain * LORA_B).bfloat16().view(torch.uint8).numpy().data,
            "F8_E4M3": scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy().data,
        }

    def write(self, file: BinaryIO, name: str, shape: torch.Size, dtype: str) -> None:
        if dtype == "U8":
            file.write(FP8_MARK)
        elif dtype == "F32":
            file.write(struct.pack("<f", FP8_SCALE))
        elif "norm" in name.rsplit(".", 2)[-2:][0] or name.endswith("gamma"):  # gains of norms, as in any trained model
            file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
        else:
            pool, left = self._bytes["lora_B" if ".lora_B." in name else dtype], shape.numel() * SIZES[dtype]
            while left > 0:
                file.write(pool[: min(left, len(pool))])
                left -= len(pool)


def write(path: Path, tensors: Iterable[tuple[str, torch.Size, str]], pool: Pool) -> int:
    """Write random tensors (name, shape, dtype) as one safetensors file; returns its size in bytes."""
    header: dict[str, Any] = {"__metadata__": {"content": "random weights"}}
    offset = 0
    tensors = list(tensors)
    for name, shape, dtype in tensors:
        size = shape.numel() * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, dtype in tensors:
            pool.write(file, name, shape, dtype)
    return path.stat().st_size


def lora(shapes: Mapping[str, torch.Size], rank: int) -> Iterator[tuple[str, torch.Size, str]]:
    for name, shape in shapes.items():
        if name.startswith("transformer_blocks.") and len(shape) == 2:
            layer = f"transformer.{name.removesuffix('.weight')}"
            yield f"{layer}.lora_A.weight", torch.Size([rank, shape[1]]), "BF16"
            yield f"{layer}.lora_B.weight", torch.Size([shape[0], rank]), "BF16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=60, help="transformer blocks (fewer: a quick try)")
    parser.add_argument("--without-fp8", action="store_true", help="leave out the fp8mixed twin")
    parser.add_argument("--without-bf16", action="store_true", help="only the fp8mixed twin and the VAE (27 GB)")
    options = parser.parse_args()
    pool = Pool()
    transformer = transformer_names(options.layers)
    files = {"diffusion_models": transformer} | names_of_comfyui(options.comfyui)
    plans = {(kind, kind): [(n, shape, "BF16") for n, shape in shapes.items()] for kind, shapes in files.items()}
    if not options.without_fp8:
        plans["diffusion_models", "fp8"] = list(fp8_mixed(transformer))
    plans["loras", "rank64"] = list(lora(transformer, 64))
    if options.without_bf16:
        plans = {key: plans[key] for key in (("diffusion_models", "fp8"), ("vae", "vae"))}
    for (kind, name), tensors in plans.items():
        path = options.folder / kind / f"random_{name}.safetensors"
        print(f"{path}: {write(path, tensors, pool) / 1e9:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
