"""One forward of the transformer at full size with random weights: ours with each attention beside diffusers' own.

    python benchmarks/forward.py [--layers 60] [--side 1024] [--text 280] [--repeat 7]

bf16, one reference of the output's size, batch 1. Milliseconds are medians of CUDA events (wall time on the CPU);
errors are relative to diffusers' output.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from environment import environment, keep

from qwen_edit.attention import CHOICES, resolve
from qwen_edit.transformer import QwenEditTransformer


def random_model(layers: int, device: torch.device) -> QwenEditTransformer:
    """The 2511 architecture with random bf16 weights."""
    with torch.device("meta"):
        model = QwenEditTransformer(num_layers=layers, zero_cond_t=True)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        if "norm" in name and tensor.ndim == 1 and name.endswith("weight"):
            state[name] += 1
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def milliseconds(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median of ``repeat`` calls after two that are not counted."""
    times = []
    for index in range(repeat + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - begin) * 1000
        if index >= 2:
            times.append(elapsed)
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--text", type=int, default=280, help="text tokens")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--name", default="forward")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = random_model(options.layers, device)
    theirs = QwenImageTransformer2DModel(num_layers=0, zero_cond_t=True)
    # the same modules, so the weights are there once
    for name, child in ours.named_children():
        if name != "pos_embed":
            setattr(theirs, name, child)

    grid = (1, options.side // 16, options.side // 16)
    tokens = 2 * grid[1] * grid[2]
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64, device=device, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, options.text, 3584, device=device, dtype=torch.bfloat16),
        "timestep": torch.tensor([0.7], device=device, dtype=torch.bfloat16),
        "img_shapes": [[grid, grid]],
        "return_dict": False,
    }
    expected = theirs(**inputs)[0][:, : tokens // 2].float()
    rows = [{"path": "diffusers", "ms": round(milliseconds(lambda: theirs(**inputs), device, options.repeat), 1)}]
    print(rows[-1], flush=True)
    for wanted in CHOICES[1:]:
        choice = resolve(wanted, device, torch.bfloat16, 128)
        if choice.fell_back:
            rows.append({"path": f"ours, attention {wanted}", "ms": None, "why": choice.why})
        else:
            ours.attention = choice
            error = (ours(**inputs)[0].float() - expected).norm() / expected.norm()
            elapsed = milliseconds(lambda: ours(**inputs), device, options.repeat)
            rows.append(
                {"path": f"ours, attention {wanted}", "ms": round(elapsed, 1), "error": float(f"{error.item():.2g}")}
            )
        print(rows[-1], flush=True)
    result = {"benchmark": "forward", "environment": environment(), "tokens": tokens + options.text, "rows": rows}
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
