"""Checks your Qwen-Image-Edit weights with this pack's forward beside diffusers' own, on your machine.

    python scripts/verify_weights.py PATH [--side 512] [--references 1]

PATH is a diffusers folder or a single safetensors file of the transformer. Run it with the Python of your ComfyUI.
It says what the weights are, reads them once, runs one forward through both and compares. The released weights could
not be run where this pack was developed, so what this prints on your machine is worth telling us.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
# The largest relative difference that rounding explains, by precision.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.02, "float32": 1e-4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--side", type=int, default=512, help="pixels of the square result (a multiple of 16)")
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")
    options = parser.parse_args()
    try:
        import torch
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
    except ImportError as e:
        print(f"This Python lacks {e.name}. Run it with the Python of your ComfyUI.", file=sys.stderr)
        return 1
    sys.path.append(str(REPO))
    from qwen_edit import checkpoints, filling
    from qwen_edit.transformer import QwenEditTransformer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    try:
        read = checkpoints.transformer_from_folder if options.path.is_dir() else checkpoints.transformer_from_file
        source = read(options.path)
        with torch.device("meta"):
            ours = QwenEditTransformer.from_config(dict(source.config)).eval()
        print(
            f"{source.label}: {len(source.tensors)} tensors, {source.dtype} on disk, zero_cond_t {source.config.get('zero_cond_t')}"
        )
        start = time.perf_counter()
        filling.fill(ours, source, dtype, device)
        print(f"Read in {time.perf_counter() - start:.1f} s as {dtype} on {device}.")
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 1

    theirs: Any = QwenImageTransformer2DModel.from_config(dict(source.config) | {"num_layers": 0})
    for name, child in ours.named_children():
        if name != "pos_embed":  # the same weights in both
            setattr(theirs, name, child)
    config, grid = ours.config, (1, options.side // 16, options.side // 16)
    tokens = grid[1] * grid[2]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, tokens * (1 + options.references), config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 200, config.joint_attention_dim, generator=generator),
        "timestep": torch.tensor([0.7]),
    }
    inputs = {k: v.to(device, dtype) for k, v in inputs.items()}
    shapes = [[grid] * (1 + options.references)]
    with torch.inference_mode():
        expected = theirs(**inputs, img_shapes=shapes, return_dict=False)[0][:, :tokens].float()
        found = ours(**inputs, img_shapes=shapes, return_dict=False)[0].float()
    error = ((found - expected).norm() / expected.norm()).item()
    limit = TOLERANCE[str(dtype).removeprefix("torch.")]
    good = bool(torch.isfinite(found).all()) and error < limit
    print(f"Relative difference to diffusers: {error:.2g} (limit {limit:g}): {'passed' if good else 'FAILED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
