"""Encode and decode of one picture: ComfyUI's own VAE beside the same VAE with the pack's 2D form for single frames.

    python benchmarks/vae.py --comfyui PATH [--side 1024] [--repeat 10]

Random weights at the released VAE's size, in the type that ComfyUI chooses for the device. "network" is the VAE's
network alone, with its input on the device (CUDA events; wall time on the CPU). "node" is all of VAE.encode or
VAE.decode, pixels and latents in RAM as between nodes (wall time). Milliseconds are medians, the two taking turns.
"error" is relative to ComfyUI's own VAE in fp32; "peak_gib" is what the network takes beside its weights.
"""

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from environment import environment, keep

REPO = Path(__file__).resolve().parents[1]
NATIVE, PACK = "comfyui native", "qwen edit fast"


def import_comfyui(comfyui: Path) -> tuple[Any, Any]:
    """ComfyUI's module ``comfy.sd`` and the pack's ``nodes.host.picture_vae``, without its nodes."""
    sys.path.insert(0, str(comfyui))
    sys.argv = sys.argv[:1]
    import_module("comfy.cli_args").args.cpu = not torch.cuda.is_available()
    for name, folder in (("pack", REPO), ("pack.nodes", REPO / "nodes")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return import_module("comfy.sd"), import_module("pack.nodes.host.picture_vae")


def random_state(width: int = 96) -> dict[str, torch.Tensor]:
    """Tensors of the released VAE's names and (with its width, 96) shapes, such that activations keep their size."""
    with torch.device("meta"):
        shapes = import_module("comfy.ldm.wan.vae").WanVAE(
            dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], image_channels=3, conv_out_channels=3, dropout=0.0,
        ).state_dict()  # fmt: skip
    state = {}
    for name, tensor in shapes.items():
        if name.endswith("gamma"):
            state[name] = 1 + 0.02 * torch.randn(tensor.shape)
        elif tensor.ndim >= 4:
            state[name] = torch.randn(tensor.shape) * (tensor.shape[1] * tensor.shape[-1] * tensor.shape[-2]) ** -0.5
        else:
            state[name] = 0.02 * torch.randn(tensor.shape)
    return state


def wall(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1000


def on_device(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        return wall(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_gib(call: Callable[[], object]) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def measure(vaes: dict[str, Any], exact: Any, direction: str, given: torch.Tensor, repeat: int) -> list[dict[str, Any]]:
    """One row per VAE. ``given``: pixels ``[1, H, W, 3]`` to encode, or latents ``[1, 16, 1, h, w]`` to decode."""
    expected = getattr(exact, direction)(given).float()
    seen = exact.process_input(given.movedim(-1, 1)).unsqueeze(2) if direction == "encode" else given
    calls, rows = {}, {}
    for name, vae in vaes.items():
        result = getattr(vae, direction)(given).float()  # also brings the weights to the device
        x, network = seen.to(vae.device, vae.vae_dtype), getattr(vae.first_stage_model, direction)
        error = float(f"{((result - expected).norm() / expected.norm()).item():.2g}")
        calls[name] = (
            lambda network=network, x=x: network(x),
            lambda vae=vae: getattr(vae, direction)(given),
        )
        rows[name] = {"direction": direction, "path": name, "error": error, "peak_gib": peak_gib(calls[name][0])}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in vaes}
    for index in range(repeat + 1):
        for name, (network, node) in calls.items():
            pair = on_device(network), wall(node)
            if index:
                times[name].append(pair)
    for name, row in rows.items():
        network, node = (round(statistics.median(column), 2) for column in zip(*times[name], strict=True))
        row |= {"network_ms": network, "node_ms": node}
        print(row, flush=True)
    return list(rows.values())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--side", type=int, default=1024, help="pixels, a multiple of 8")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--name", default="vae", help="of the result file")
    parser.add_argument("--results", type=Path, help="folder for it (default: benchmarks/results)")
    options = parser.parse_args()
    sd, picture_vae = import_comfyui(options.comfyui.resolve())
    torch.manual_seed(0)
    state = random_state()
    vaes = {name: sd.VAE(sd=dict(state)) for name in (NATIVE, PACK)}
    picture_vae.run_pictures_in_2d(vaes[PACK])
    exact = sd.VAE(sd=dict(state), dtype=torch.float32)
    for vae in (*vaes.values(), exact):
        vae.not_video = True
    pixels = torch.rand(1, options.side, options.side, 3)
    latents = torch.randn(1, 16, 1, options.side // 8, options.side // 8)
    rows = measure(vaes, exact, "encode", pixels, options.repeat)
    rows += measure(vaes, exact, "decode", latents, options.repeat)
    result = {
        "benchmark": "vae",
        "environment": environment(),
        "side": options.side,
        "dtype": str(vaes[PACK].vae_dtype).removeprefix("torch."),
        "rows": rows,
    }
    print(f"Wrote {keep(options.name, result, options.results)}")


if __name__ == "__main__":
    main()
