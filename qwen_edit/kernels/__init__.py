"""The fused elementwise operations of the forward: one interface, chosen once for a device.

Implementations are modules with the functions of ``reference.py``: Triton kernels on CUDA, plain PyTorch elsewhere.
They are tried with a real call; what does not run is replaced by PyTorch, with the reason in ``why``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import reference
from .contract import RANK_STEP, Addend, Modulation, Rows, Update, padded_width

__all__ = [
    "RANK_STEP",
    "REFERENCE",
    "Addend",
    "FusedKernels",
    "Modulation",
    "Rows",
    "Update",
    "padded_width",
    "resolve_kernels",
]


@dataclass(frozen=True)
class FusedKernels:
    """Which implementation runs, and why."""

    name: str
    why: str
    norm_modulate: Callable[..., Rows]
    qk_norm_rope: Callable[..., None]
    gelu: Callable[..., Rows]
    quantize_rows: Callable[..., Rows]
    append_low_rank: Callable[..., torch.Tensor]
    add_to_quantized: Callable[..., None]
    fell_back: bool = False


def _of(module, name: str, why: str, fell_back: bool = False) -> FusedKernels:
    functions = (
        module.norm_modulate, module.qk_norm_rope, module.gelu, module.quantize_rows, module.append_low_rank,
        module.add_to_quantized,
    )  # fmt: skip
    return FusedKernels(name, why, *functions, fell_back=fell_back)


REFERENCE = _of(reference, "pytorch", "plain PyTorch")


@lru_cache(maxsize=32)
def resolve_kernels(device: torch.device, dtype: torch.dtype, quantize: torch.dtype | None = None) -> FusedKernels:
    """The kernels for models of this dtype on this device, with activations quantized to ``quantize``."""
    if device.type != "cuda":
        return _of(reference, "pytorch", f"the model runs on {device.type}")
    try:
        from . import fused

        problem = _probe(fused, device, dtype, quantize)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as e:  # no Triton, no compiler, an unsupported card: the reason is shown
        problem = f"{type(e).__name__}: {next(iter(str(e).splitlines()), 'no message')}"
    if problem is not None:
        return _of(reference, "pytorch", f"Triton kernels do not run here: {problem}", fell_back=True)
    return _of(fused, "triton", "chosen for CUDA")


def _probe(fused, device: torch.device, dtype: torch.dtype, quantize: torch.dtype | None) -> str | None:
    """Run every kernel against its reference on small inputs; the reason why they can't be used, or None.

    Twice, because a second launch takes another way (see ``launch.py``)."""
    x = torch.linspace(-3, 3, 4 * 64, device=device).reshape(1, 4, 64).to(dtype)
    table = torch.linspace(-1, 1, 2 * 192, device=device).reshape(2, 192).to(dtype)
    modulation = Modulation(table, torch.tensor([[0], [1]], device=device), 2)
    rope = torch.linspace(-1, 1, 2 * 4 * 8, device=device).reshape(2, 4, 8)
    weight = torch.linspace(0.5, 1.5, 16, device=device).to(dtype)
    results = []
    for module in (reference, fused, fused):
        found = [
            module.norm_modulate(x.clone(), modulation, Update(x, modulation), eps=1e-6, quantize=quantize),
            module.gelu(x[0], quantize=quantize),
            module.quantize_rows(x[0], quantize),
        ]
        joint = torch.zeros(1, 4, 3, 4, 16, device=device, dtype=dtype)
        heads = x.unflatten(-1, (4, 16))
        module.qk_norm_rope(heads, heads, heads, weight, weight, rope, joint, eps=1e-6)
        values = [rows.data.float() * (1 if rows.scale is None else rows.scale) for rows in found]
        if quantize != torch.int8:
            rows = module.gelu(x[0], quantize=quantize, room=16).data
            values.append(module.append_low_rank(rows, rows[:1].repeat(16, 1), rope.new_full((16,), 0.001)).float())
        if quantize is not None:
            rows = reference.quantize_rows(x[0], quantize)
            out, scale = torch.empty_like(rows.data), rope.new_empty((len(x[0]), 1))
            module.add_to_quantized(rows.data, rows.scale, x[0, :2] / 8, x[0, :, :2].contiguous(), out, scale)
            values.append(out.float() * scale)
        results.append([*values, joint.float()])
    for result in results[1:]:
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(result, results[0], strict=True)]
        if not max(errors) < 0.05:
            return f"the result is off by {max(errors):.3g} on the probe"
    return None
