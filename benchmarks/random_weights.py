"""Full-size random weights as the single files that ComfyUI users have, for speed measurements without the released ones.

    python benchmarks/random_weights.py FOLDER --comfyui PATH [--layers 60]

Writes FOLDER/{diffusion_models,text_encoders,vae}/random_*.safetensors: the transformer of Qwen-Image-Edit-2511
(41 GB in bf16), Qwen2.5-VL-7B (16.6 GB) and the VAE, tensor by tensor, so that memory stays small. Speed does not depend on the
values; pictures made with these weights mean nothing.
"""

import argparse
import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

STD = 0.02


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


def write(path: Path, shapes: Mapping[str, torch.Size], device: str) -> int:
    """Write random bf16 tensors as one safetensors file; returns its size in bytes."""
    header: dict[str, Any] = {"__metadata__": {"content": "random weights"}}
    offset = 0
    for name, shape in shapes.items():
        size = shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
            tensor.normal_(std=STD, generator=generator)
            if "norm" in name.rsplit(".", 2)[-2:][0] or name.endswith("gamma"):
                tensor += 1  # gains of norms, as in any trained model
            file.write(tensor.cpu().view(torch.uint8).numpy().data)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=60, help="transformer blocks (fewer: a quick try)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = {"diffusion_models": transformer_names(options.layers)} | names_of_comfyui(options.comfyui)
    for kind, shapes in files.items():
        path = options.folder / kind / f"random_{kind}.safetensors"
        print(f"{path}: {write(path, shapes, device) / 1e9:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
