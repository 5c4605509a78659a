"""Measures every attention on the present card with this model's shapes, and says which is the best.

An explicit act, for scripts/tune_attention.py; loading a model never measures.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .attention import CHOICES, EIGHT_BIT, Attend, bound, joint_inputs, one_line, relative_error, resolve
from .attention_auto import Environment, candidates, environment

HEADS, HEAD_DIM, DTYPE = 24, 128, torch.bfloat16
# Output, one reference of the same size and 280 tokens of text, at 1024² and at 512². The first decides.
TOKENS = (8472, 2328)
WARM_UP, REPEAT = 3, 20
NOISE = 0.02  # two runs of one kernel differ by so much; what is not faster by more does not replace the table's


@dataclass(frozen=True)
class Measurement:
    """One attention at one size: median ms of a call, TFLOP/s, relative error against float32; or what failed."""

    attention: str
    tokens: int
    ms: float | None = None
    tflops: float | None = None
    error: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Tuning:
    """What was found, where, and why it is the choice."""

    environment: Environment
    measurements: tuple[Measurement, ...]
    attention: str
    why: str


@torch.inference_mode()
def tune(device: torch.device, allow_8_bit: bool, report: Callable[[Measurement], None]) -> Tuning:
    """Measure on a CUDA device; ``report`` gets every measurement as soon as it is there. About a minute."""
    measurements = []
    for tokens in TOKENS:
        for name in CHOICES[1:]:
            measurements.append(_measured(name, device, tokens))
            report(measurements[-1])
    here = environment(device)
    attention, why = choose(measurements, [name for name, _ in candidates(here, HEAD_DIM)], allow_8_bit)
    return Tuning(here, tuple(measurements), attention, why)


def _measured(name: str, device: torch.device, tokens: int) -> Measurement:
    kernel = resolve(name, device, DTYPE, HEAD_DIM)
    if kernel.fell_back:
        return Measurement(name, tokens, problem=kernel.why)
    try:
        return measure(name, kernel.attend, device, tokens)
    except Exception as e:  # it passed the probe and fails at this size: not usable, and the others are still to come
        return Measurement(name, tokens, problem=one_line(e))


def measure(name: str, attend: Attend, device: torch.device, tokens: int) -> Measurement:
    """Time ``attend`` at batch 1 and compare its result with float32."""
    q, k, v = joint_inputs(1, tokens, HEADS, HEAD_DIM, device, DTYPE)
    error = relative_error(attend(q, k, v, None), q, k, v)
    times = []
    for index in range(WARM_UP + REPEAT):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        attend(q, k, v, None)
        end.record()
        end.synchronize()
        if index >= WARM_UP:
            times.append(start.elapsed_time(end))
    ms = statistics.median(times)
    flop = 4 * HEADS * tokens**2 * HEAD_DIM  # two products, a multiplication and an addition each
    return Measurement(name, tokens, round(ms, 3), round(flop / ms / 1e9, 1), error)


def choose(measurements: Sequence[Measurement], table: Sequence[str], allow_8_bit: bool) -> tuple[str, str]:
    """The fastest at the first size among those that are right at every size, and why.

    What the table prefers stays unless another is faster by more than ``NOISE``. 8-bit attention takes part only if
    allowed, and as for all of them its error has to stay below its bound (``attention.BOUND_8_BIT``).
    """
    wrong = {m.attention for m in measurements if m.error is None or not m.error <= bound(m.attention, DTYPE)}
    excluded = wrong if allow_8_bit else wrong | EIGHT_BIT
    times = {
        m.attention: m.ms
        for m in measurements
        if m.tokens == TOKENS[0] and m.ms is not None and m.attention not in excluded
    }
    if not times:
        return "pytorch", "nothing else could be measured"
    fastest = min(times, key=times.__getitem__)
    usual = next((name for name in table if name in times), fastest)
    if times[fastest] < times[usual] * (1 - NOISE):
        return fastest, f"{times[fastest]:g} ms at {TOKENS[0]} tokens, {usual} {times[usual]:g} ms"
    return usual, f"{times[usual]:g} ms at {TOKENS[0]} tokens, and nothing is faster by more than {NOISE:.0%}"
