"""Which implementation of the fused operations runs, and which compiled kernel a launch takes."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from qwen_edit.kernels import REFERENCE, reference, resolve_kernels
from qwen_edit.kernels.contract import Rows
from qwen_edit.quantize import FP8, INT8

pytest.importorskip("triton")
from qwen_edit.kernels import fused, launch

pytestmark = pytest.mark.usefixtures("interpreter")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


# Which implementation


def test_plain_pytorch_runs_off_the_card():
    kernels = resolve_kernels(torch.device("cpu"), FP32)
    assert (kernels.name, kernels.fell_back) == ("pytorch", False)
    assert "cpu" in kernels.why
    assert kernels.gelu is REFERENCE.gelu is reference.gelu


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")), "RuntimeError: no compiler"),
        (lambda *a, **k: Rows(2 * reference.norm_modulate(*a, **k).data), "off by 1 on the probe"),
    ],
    ids=["fails", "is wrong"],
)
def test_kernels_that_do_not_run_are_replaced_with_the_reason(monkeypatch, broken, why):
    monkeypatch.setattr(fused, "norm_modulate", broken)
    monkeypatch.setattr("qwen_edit.kernels._probe", probe_on_the_cpu)
    kernels = resolve_kernels.__wrapped__(torch.device("cuda", 0), FP32)
    assert (kernels.name, kernels.fell_back, kernels.gelu) == ("pytorch", True, reference.gelu)
    assert kernels.why == f"Triton kernels do not run here: {kernels.why.split(': ', 1)[1]}"
    assert why in kernels.why
    assert "at all" not in kernels.why


def test_out_of_memory_says_nothing_about_the_kernels(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("qwen_edit.kernels._probe", full)
    with pytest.raises(torch.OutOfMemoryError):
        resolve_kernels.__wrapped__(torch.device("cuda", 0), FP32)


def test_kernels_that_run_are_chosen(monkeypatch):
    monkeypatch.setattr("qwen_edit.kernels._probe", probe_on_the_cpu)
    for quantize in (None, FP8, INT8):
        kernels = resolve_kernels.__wrapped__(torch.device("cuda", 0), FP32, quantize)
        assert (kernels.name, kernels.fell_back, kernels.gelu) == ("triton", False, fused.gelu)


def probe_on_the_cpu(module, device, dtype, quantize, probe=resolve_kernels.__wrapped__.__globals__["_probe"]):
    return probe(module, DEVICE, dtype, quantize)


# Launching again


class Kernel:
    """Counts what is compiled; what it compiles remembers how it was run."""

    def __init__(self):
        self.compiled, self.runs = 0, []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, num_warps, num_stages, **constants):
            self.compiled += 1
            return self

        return compile_and_run if len(grid) == 1 else lambda *arguments: self.runs.append((grid, arguments))


@pytest.fixture
def relaunch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE.index)
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, memory = Kernel(), torch.zeros(64, device=DEVICE)

    def relaunch(tensor=memory, number=3, constant=8, warps=4, stages=3, programs=5):
        launch.launch(kernel, programs, (tensor,), (number,), {"C": constant}, warps, stages)

    relaunch()
    return kernel, memory, relaunch


def test_a_like_call_goes_to_the_compiled_kernel(relaunch):
    kernel, memory, again = relaunch
    again(memory[16:], programs=7)
    assert kernel.compiled == 1
    ((grid, (tensor, number, constant)),) = kernel.runs
    assert (grid, number, constant) == ((7, 1, 1), 3, 8)
    assert tensor.data_ptr() == memory[16:].data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        {"number": 4},
        {"constant": 16},
        {"warps": 8},
        {"stages": 2},
        {"tensor": torch.zeros(64, device=DEVICE, dtype=BF16)},
        {"tensor": torch.zeros(64, device=DEVICE)[1:]},
    ],
    ids=["numbers", "constants", "warps", "stages", "dtype", "alignment"],
)
def test_an_unlike_call_is_compiled_anew(relaunch, change):
    kernel, _, again = relaunch
    again(**change)
    assert (kernel.compiled, kernel.runs) == (2, [])
    again(**change)
    assert (kernel.compiled, len(kernel.runs)) == (2, 1)


def test_a_kernel_runs_on_its_tensors_card(monkeypatch):
    current, ran_on = [0], []

    @contextmanager
    def on_card(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on_card)
    monkeypatch.setattr(launch, "_compiled", {})

    class Seen:
        def __getitem__(self, grid):
            return lambda *_, **__: ran_on.append(current[0])

    tensor = SimpleNamespace(dtype=BF16, data_ptr=lambda: 0, device=torch.device("cuda", 1))
    launch.launch(Seen(), 5, (tensor,), (3,), {"C": 8}, 4)
    assert (ran_on, current) == ([1], [0])
