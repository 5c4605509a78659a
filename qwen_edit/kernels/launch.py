"""Launching a Triton kernel again without Triton's own argument handling.

``kernel[grid](...)`` looks at every argument anew, which costs about 0.1 ms of Python a call; at 600 calls a forward that
is more than a small picture's arithmetic. A call whose arguments are alike in everything a kernel is specialized for
(dtypes, alignment, the integers' values) goes straight to the kernel that the first one compiled.
"""

import torch

MOST_KEPT = 4096  # calls; each length of a prompt makes a few

_compiled: dict[tuple, object] = {}


def launch(
    kernel,
    programs: int,
    tensors: tuple,
    numbers: tuple,
    constants: dict,
    warps: int,
    stages: int = 3,
    registers: int | None = None,
) -> None:
    """Run ``kernel`` over a grid of ``programs``; its parameters are, in this order, tensors, numbers and constants.

    Args:
        registers: the most that a thread may take; None: as many as the compiler wants.

    Raises:
        Whatever Triton raises where it can't compile or run the kernel.
    """
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch(kernel, programs, tensors, numbers, constants, warps, stages, registers)
    likeness = tuple((t.dtype, t.data_ptr() % 16) for t in tensors)
    key = (kernel, device, likeness, numbers, tuple(constants.values()), warps, stages, registers)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*tensors, *numbers, *constants.values())  # pyright: ignore[reportIndexIssue]
        return
    options = {"num_warps": warps, "num_stages": stages} | ({} if registers is None else {"maxnreg": registers})
    found = kernel[(programs,)](*tensors, *numbers, **constants, **options)
    if len(_compiled) >= MOST_KEPT:
        _compiled.clear()
    if found is not None:  # Triton's interpreter compiles nothing
        _compiled[key] = found
