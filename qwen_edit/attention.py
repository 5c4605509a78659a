"""The joint attention: one interface, several implementations, chosen once at load.

An implementation takes ``q, k, v`` of ``[B, L, heads, D]`` and an optional boolean mask ``[B, 1, 1, L]``
(True = attend) and returns ``[B, L, heads, D]``. The three may be views of one buffer ``[B, L, 3, heads, D]``: only
the last dimension has to be contiguous, and nothing is copied (sage excepted) or written to. Except for math, the
result is contiguous, so that ``flatten(2, 3)`` is a view.

========== =======================================================================================================
pytorch    ``scaled_dot_product_attention`` as PyTorch chooses. It also serves every call with a mask, which only
           math and efficient take themselves: such calls are rare (native encoders with padding).
cudnn      the same function held to cuDNN
efficient  the same function held to its memory-efficient kernel, which also runs in fp32 and on old cards
math       float32 scores, one head at a time: slow and exact, on any device. The others are judged by it
flash      FlashAttention 2: the package flash-attn if it is installed, else the build of it inside PyTorch
flash3     FlashAttention 3, the package flash-attn-3 (module ``flash_attn_interface``): Hopper
flash4     FlashAttention 4, the package flash-attn-4 (module ``flash_attn.cute``): compiled at the first call
xformers   ``xformers.ops.memory_efficient_attention``
sage       SageAttention: scores from 8-bit integers, in some versions values in 8 bit too. Never chosen by the table
========== =======================================================================================================

``resolve`` tries the wanted one with a real call on the device (importing is not enough: xformers' kernels refuse to
run on a torch that they were not built for) and falls back to PyTorch's own, with the reason in ``KernelChoice.why``
for the node to show. What ``auto`` means is in ``attention_auto``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_auto import PACKAGES, candidates, environment, installed, read_tuned

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Append only: saved workflows hold these names.
CHOICES = (
    "auto", "pytorch", "cudnn", "xformers", "sage", "flash", "flash3", "flash4", "efficient", "math",
)  # fmt: skip
EIGHT_BIT = frozenset({"sage"})
HALF_ONLY = frozenset({"cudnn", "flash", "flash3", "flash4"})

# The largest relative error (norm of the difference over norm, against math) that passes, on ``joint_inputs``.
# 16 bit: rounding alone gives 0.0019 in bf16 and 0.00024 in fp16 there, so a wrong kernel or a hidden 8-bit step
# (0.018 at least) does not pass. 8 bit: integer scores with smoothed keys give 0.02, with values in fp8 too 0.04;
# without smoothing of the keys it is 0.065 and more, which must not pass (tests/test_attention.py emulates them).
BOUNDS = {torch.bfloat16: 0.006, torch.float16: 0.001, torch.float32: 1e-4}
BOUND_8_BIT = 0.055


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


def _efficient(q, k, v, mask=None):
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return _pytorch(q, k, v, mask)


def _math(q, k, v, mask=None):
    """One head at a time: its scores take ``4 B L²`` bytes, those of all heads of a full-size edit 7 GB."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    precise = torch.promote_types(q.dtype, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        for head in range(q.shape[2]):
            one = (slice(None), slice(None), slice(head, head + 1))
            out[one] = _pytorch(q[one].to(precise), k[one].to(precise), v[one].to(precise), mask)
    return out


def _unmasked(call: Callable[..., torch.Tensor]) -> Attend:
    def attend(q, k, v, mask=None):
        return call(q, k, v) if mask is None else _pytorch(q, k, v, mask)

    return attend


def _held_to(backend: SDPBackend) -> Attend:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return _pytorch(q, k, v)

    return _unmasked(call)


def _load_xformers() -> Attend:
    from xformers.ops import memory_efficient_attention

    return _unmasked(memory_efficient_attention)


def _load_sage() -> Attend:
    from sageattention import sageattn

    def call(q, k, v):
        # Version 1 subtracts the mean of the keys in place.
        return sageattn(q, k.clone(), v, tensor_layout="NHD", is_causal=False)

    return _unmasked(call)


def _load_flash() -> Attend:
    # By distribution, not by import: with only flash-attn-4 installed ``import flash_attn`` succeeds as well.
    if installed(PACKAGES["flash"]) is None:
        return _held_to(SDPBackend.FLASH_ATTENTION)
    from flash_attn import flash_attn_func

    return _unmasked(flash_attn_func)


def _load_flash3() -> Attend:
    from flash_attn_interface import flash_attn_func

    return _unmasked(lambda q, k, v: _output(flash_attn_func(q, k, v)))


def _load_flash4() -> Attend:
    from flash_attn.cute import flash_attn_func

    return _unmasked(lambda q, k, v: _output(flash_attn_func(q, k, v)))


def _output(returned):
    """Some versions of FlashAttention 3 and 4 return (output, log-sum-exp), others the output."""
    return returned[0] if isinstance(returned, tuple) else returned


_LOADERS: dict[str, Callable[[], Attend]] = {
    "pytorch": lambda: _pytorch,
    "cudnn": lambda: _held_to(SDPBackend.CUDNN_ATTENTION),
    "xformers": _load_xformers,
    "sage": _load_sage,
    "flash": _load_flash,
    "flash3": _load_flash3,
    "flash4": _load_flash4,
    "efficient": lambda: _efficient,
    "math": lambda: _math,
}


def resolve(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, tuned: Path | None = None
) -> KernelChoice:
    """The implementation to run for ``wanted`` (one of ``CHOICES``) on ``device``.

    ``auto`` is a table or, where it fits this environment, the ``tuned`` file that scripts/tune_attention.py wrote;
    never a measurement, so that equal machines choose equally and the same seed gives the same picture.

    Raises:
        ValueError: ``wanted`` is not one of ``CHOICES``.
    """
    if wanted not in CHOICES:
        raise ValueError(f"attention is {wanted!r}; it must be one of {', '.join(CHOICES)}.")
    problems: list[str] = []
    if wanted != "auto":
        order = [(wanted, f"as asked ({_maker(wanted)})")]
    else:
        order, ignored = _automatic(device, dtype, head_dim, tuned)
        problems += ignored
    for name, why in order:
        attend, problem = _try(name, device, dtype, head_dim)
        if attend is not None:
            return KernelChoice(wanted, name, "; ".join([why, *problems]), attend, fell_back=bool(problems))
        problems.append(f"{name} does not run here: {problem}")
    return KernelChoice(wanted, "pytorch", "; ".join(problems), _pytorch, fell_back=True)


def _automatic(device, dtype, head_dim, tuned) -> tuple[list[tuple[str, str]], list[str]]:
    """What to try for ``auto``, each with its reason; and why the tuned file is not followed."""
    if device.type != "cuda":
        return [("pytorch", f"PyTorch's choice on {device.type}")], []
    if dtype not in (torch.bfloat16, torch.float16):
        return [("pytorch", f"PyTorch's choice in {_short(dtype)}")], []
    here = environment(device)
    name, problem = read_tuned(tuned, here, CHOICES[1:]) if tuned else (None, None)
    first = [(name, f"measured as the fastest on this card ({tuned})")] if name else []
    return first + candidates(here, head_dim), [problem] if problem else []


@lru_cache(maxsize=64)
def _try(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Attend | None, str]:
    """The implementation if a call with few tokens runs and is right, else the reason why it can't be used."""
    if name in ("pytorch", "math"):
        return _LOADERS[name](), ""
    if device.type != "cuda":
        return None, f"it needs a CUDA card, the model runs on {device.type}"
    if name in HALF_ONLY and dtype not in (torch.bfloat16, torch.float16):
        return None, f"it needs bf16 or fp16, the model runs in {_short(dtype)}"
    q, k, v = joint_inputs(2, 337, 2, head_dim, device, dtype)
    try:
        attend = _LOADERS[name]()
        error = relative_error(attend(q, k, v, None), q, k, v)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as e:  # any failure of a foreign kernel means the same here; its reason is shown
        return None, one_line(e)
    limit = bound(name, dtype)
    if not error <= limit:  # NaN too
        return None, f"its result is off by {error:.2g} on the probe, more than {limit:g}"
    return attend, ""


def joint_inputs(batch: int, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
    """q, k, v ``[B, L, heads, D]`` as views of one buffer, the same for the same arguments.

    Scores have a standard deviation of 2, and one channel of the keys lies far from zero, as the weights of the
    QK norm make it: what 8-bit kernels without care fail on.
    """
    generator = torch.Generator(device).manual_seed(0)
    joint = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, device=device)
    joint[:, :, 0] *= 2
    joint[:, :, 1, :, 0] += 16
    return joint.to(dtype).unbind(2)


def relative_error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Norm of the difference to math over math's norm, on two heads and at least 512 of many tokens.

    Raises:
        ValueError: ``out`` has not the shape of ``q``.
    """
    if out.shape != q.shape:
        raise ValueError(f"the result is {list(out.shape)}, not {list(q.shape)}")
    some = (slice(None), slice(None, None, max(1, q.shape[1] // 512)), slice(2))
    expected = _math(q[some].float(), k[:, :, :2].float(), v[:, :, :2].float())
    return ((out[some].float() - expected).norm() / expected.norm()).item()


def bound(name: str, dtype: torch.dtype) -> float:
    """The largest ``relative_error`` on ``joint_inputs`` with which an implementation is used."""
    return BOUND_8_BIT if name in EIGHT_BIT else BOUNDS[dtype]


def one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"


def _maker(name: str) -> str:
    package = PACKAGES.get(name, "torch")
    version = installed(package)
    if version:
        return f"{package} {version}"
    return "the one inside torch" if name == "flash" else f"{package} of unknown version"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
