"""The joint attention: one interface, several implementations, chosen once at load.

An implementation takes ``q, k, v`` of ``[B, L, heads, D]`` and an optional boolean mask ``[B, 1, 1, L]``
(True = attend) and returns ``[B, L, heads, D]``. ``resolve`` tries the wanted one with a real call on the
device (importing is not enough: xformers' kernels refuse to run on a torch that they were not built for) and
falls back to PyTorch's own, with the reason in ``KernelChoice.why`` for the node to show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

CHOICES = ("auto", "pytorch", "cudnn", "xformers", "sage", "flash")


@dataclass(frozen=True)
class KernelChoice:
    """What was asked for, what runs, and why."""

    wanted: str
    name: str
    why: str
    attend: Attend
    fell_back: bool = False


def _pytorch(q, k, v, mask=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _cudnn(q, k, v, mask=None):
    # Masked calls are rare (native encoders with padding) and not every cuDNN takes a mask.
    if mask is not None:
        return _pytorch(q, k, v, mask)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _pytorch(q, k, v)


def _xformers(q, k, v, mask=None):
    if mask is not None:
        return _pytorch(q, k, v, mask)
    return import_module("xformers.ops").memory_efficient_attention(q, k, v)


def _sage(q, k, v, mask=None):
    if mask is not None:
        return _pytorch(q, k, v, mask)
    return import_module("sageattention").sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


def _flash(q, k, v, mask=None):
    if mask is not None:
        return _pytorch(q, k, v, mask)
    return import_module("flash_attn").flash_attn_func(q, k, v)


_IMPLEMENTATIONS: dict[str, Attend] = {
    "pytorch": _pytorch,
    "cudnn": _cudnn,
    "xformers": _xformers,
    "sage": _sage,
    "flash": _flash,
}


@lru_cache(maxsize=32)
def resolve(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelChoice:
    """The implementation to run for ``wanted`` (one of ``CHOICES``) on ``device``.

    ``auto`` is a table, never a measurement, so that equal machines choose equally and the same seed gives
    the same picture: cuDNN on Hopper and newer, PyTorch's choice elsewhere. On an H100 with torch 2.11 the two are
    equally fast (``benchmarks/results/forward_h100.json``); naming cuDNN keeps older torch off its slower kernel.

    Raises:
        ValueError: ``wanted`` is not one of ``CHOICES``.
    """
    if wanted not in CHOICES:
        raise ValueError(f"attention is {wanted!r}; it must be one of {', '.join(CHOICES)}.")
    name = _automatic(device, dtype) if wanted == "auto" else wanted
    problem = _probe(name, device, dtype, head_dim)
    if problem is None:
        return KernelChoice(
            wanted, name, "chosen for this card" if wanted == "auto" else "as asked", _IMPLEMENTATIONS[name]
        )
    return KernelChoice(wanted, "pytorch", f"{name} does not run here: {problem}", _pytorch, fell_back=True)


def _automatic(device: torch.device, dtype: torch.dtype) -> str:
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device)[0] >= 9:
        return "cudnn"
    return "pytorch"


def _probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Call the implementation on a small input; the reason why it can't be used, or None."""
    if name == "pytorch":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA card, the model runs on {device.type}"
    x = torch.randn(1, 128, 2, head_dim, device=device, dtype=dtype)
    try:
        out = _IMPLEMENTATIONS[name](x, x, x, None)
        error = (out.float() - _pytorch(x, x, x).float()).abs().max().item()
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as e:  # any failure of a foreign kernel means the same here; its reason is shown
        return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"
    # 8-bit attention (sage) stays within a few hundredths on unit-normal inputs.
    return None if error < 0.1 else f"its result is off by {error:.3g} on the probe"
