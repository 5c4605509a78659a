"""Which attention is chosen: the table, the tuned file, what falls back and why, what tuning makes of its times."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch
import tune_attention

from qwen_edit import attention, tune
from qwen_edit.attention import BOUND_8_BIT, CHOICES, EIGHT_BIT, joint_inputs, resolve
from qwen_edit.attention_auto import TUNED_FILE, Environment, candidates, read_tuned, tuned_text
from qwen_edit.tune import Measurement, choose

CPU = torch.device("cpu")

H100 = Environment("NVIDIA H100", (9, 0), {"torch": "2.11.0+cu130", "cuda": "13.0", "flash-attn-4": "4.0.0b36"})


def with_versions(**changes: str | None) -> Environment:
    """The H100 with other versions; None: not installed. Underscores stand for dashes."""
    versions = dict(H100.versions) | {name.replace("_", "-"): found for name, found in changes.items()}
    return dataclasses.replace(H100, versions={name: found for name, found in versions.items() if found})


def names(here: Environment, head_dim: int = 128) -> list[str]:
    return [name for name, _ in candidates(here, head_dim)]


# The table


def test_saved_workflows_keep_their_choices():
    assert CHOICES[:6] == ("auto", "pytorch", "cudnn", "xformers", "sage", "flash")
    assert len(set(CHOICES)) == len(CHOICES)
    assert set(CHOICES[1:]) == set(attention._LOADERS)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (H100, ["flash4", "cudnn", "pytorch"]),
        (with_versions(flash_attn_4="4.0.1"), ["flash4", "cudnn", "pytorch"]),
        (with_versions(torch="2.12.0"), ["flash4", "cudnn", "pytorch"]),
        (with_versions(flash_attn_4=None), ["cudnn", "pytorch"]),
        (with_versions(flash_attn_4="4.0.0b9"), ["cudnn", "pytorch"]),  # older, though "b9" sorts after "b36"
        (with_versions(torch="2.9.1"), ["cudnn", "pytorch"]),  # older, though "2.9" sorts after "2.11"
        (with_versions(torch="2.11.0-own build"), ["cudnn", "pytorch"]),
        (with_versions(cuda=None), ["pytorch"]),  # ROCm: gfx9
        (with_versions(cuda="11.8"), ["pytorch"]),
        (dataclasses.replace(H100, capability=(10, 0)), ["cudnn", "pytorch"]),
        *[
            (dataclasses.replace(H100, capability=capability), ["pytorch"])
            for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (11, 0), (12, 0))
        ],
    ],
    ids=lambda value: "" if isinstance(value, list) else f"{value.capability} {sorted(value.versions.items())}",
)
def test_the_table(here, expected):
    assert names(here) == expected
    assert not EIGHT_BIT & set(names(here))


def test_the_table_is_for_heads_of_128_only():
    assert names(H100, head_dim=32) == ["pytorch"]


def test_an_unmeasured_card_is_named():
    (_, why), *rest = candidates(Environment("NVIDIA L4", (8, 9), H100.versions), 128)
    assert rest == []
    assert "nothing was measured on a NVIDIA L4" in why


# What does not run


def test_an_unknown_attention_is_an_error():
    with pytest.raises(ValueError, match="must be one of auto"):
        resolve("fastest", CPU, torch.float32, 32)


@pytest.mark.parametrize("wanted", [c for c in CHOICES if c not in ("auto", "pytorch", "math")])
def test_without_a_card_it_falls_back_with_a_reason(wanted):
    choice = resolve(wanted, CPU, torch.float32, 32)
    assert (choice.wanted, choice.name, choice.fell_back) == (wanted, "pytorch", True)
    assert choice.why == f"{wanted} does not run here: it needs a CUDA card, the model runs on cpu"


@pytest.mark.parametrize("wanted", ["pytorch", "math"])
def test_what_runs_everywhere_is_taken_as_asked(wanted):
    choice = resolve(wanted, CPU, torch.float32, 32)
    assert (choice.name, choice.fell_back) == (wanted, False)
    assert choice.why == f"as asked (torch {importlib.metadata.version('torch')})"


def test_automatic_without_a_card_is_pytorch():
    choice = resolve("auto", CPU, torch.float32, 32)
    assert (choice.name, choice.fell_back, choice.why) == ("pytorch", False, "PyTorch's choice on cpu")


@pytest.fixture
def card(monkeypatch):
    """A pretended H100 whose kernels compute on the CPU: implementations by name, replaced by the test."""
    attention._try.cache_clear()
    monkeypatch.setattr(attention, "environment", lambda device: H100)
    monkeypatch.setattr(attention, "joint_inputs", lambda *shape: joint_inputs(*shape[:4], CPU, shape[5]))
    kernels = {name: (lambda: attention._pytorch) for name in CHOICES[1:]}
    monkeypatch.setattr(attention, "_LOADERS", kernels)
    yield kernels
    attention._try.cache_clear()


def resolved(wanted: str, tuned=None, dtype=torch.bfloat16):
    return resolve(wanted, torch.device("cuda", 0), dtype, 128, tuned)


def fails():
    raise ImportError("libcudart.so.99: cannot open shared object file\nand more")


def test_automatic_goes_down_the_table_and_says_why(card):
    assert resolved("auto").name == "flash4"
    attention._try.cache_clear()
    card["flash4"] = fails
    choice = resolved("auto")
    assert (choice.name, choice.fell_back) == ("cudnn", True)
    assert "561 TFLOP/s" in choice.why
    assert choice.why.endswith("flash4 does not run here: ImportError: libcudart.so.99: cannot open shared object file")


@pytest.mark.parametrize("wanted", ["cudnn", "flash", "flash3", "flash4"])
def test_kernels_for_16_bit_are_not_called_in_fp32(card, wanted):
    choice = resolved(wanted, dtype=torch.float32)
    assert choice.name == "pytorch"
    assert choice.why == f"{wanted} does not run here: it needs bf16 or fp16, the model runs in float32"
    assert resolved("efficient", dtype=torch.float32).name == "efficient"
    assert resolved("auto", dtype=torch.float32).why == "PyTorch's choice in float32"


def off_by(relative: float):
    return lambda: lambda q, k, v, mask=None: attention._math(q.float(), k.float(), v.float()) * (1 + relative)


@pytest.mark.parametrize(
    ("name", "kernel", "said"),
    [
        ("flash3", off_by(0.02), "its result is off by 0.02 on the probe, more than 0.006"),
        ("sage", off_by(0.08), "its result is off by 0.08 on the probe, more than 0.055"),
        ("flash", off_by(float("nan")), "its result is off by nan on the probe"),
        ("flash4", lambda: lambda q, k, v, mask: attention._pytorch(q, k, v)[:, :-1], "the result is [2, 336, 2, 128]"),
        ("cudnn", lambda: lambda q, k, v, mask: attention._pytorch(q, v, k), "its result is off by"),
    ],
    ids=["16 bit", "8 bit", "NaN", "shape", "arguments swapped"],
)
def test_a_wrong_result_is_not_used(card, name, kernel, said):
    card[name] = kernel
    choice = resolved(name)
    assert (choice.name, choice.fell_back) == ("pytorch", True)
    assert said in choice.why


def test_the_looser_bound_is_for_8_bit_only(card):
    card["sage"] = card["flash"] = off_by(0.04)
    assert resolved("sage").name == "sage"
    assert resolved("flash").name == "pytorch"


def test_too_little_memory_is_no_verdict_on_a_kernel(card):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory")

    card["cudnn"] = exhausted
    with pytest.raises(torch.OutOfMemoryError):
        resolved("cudnn")
    card["cudnn"] = lambda: attention._pytorch
    assert resolved("cudnn").name == "cudnn"


# The tuned file


def test_the_tuned_file_is_followed(card, tmp_path):
    path = tmp_path / "attention.json"
    assert resolved("auto", path).name == "flash4"  # not there: the table
    path.write_text(tuned_text(H100, "flash3", [dataclasses.asdict(Measurement("flash3", 8472, 1.0))]))
    choice = resolved("auto", path)
    assert (choice.name, choice.fell_back) == ("flash3", False)
    assert "measured as the fastest on this card" in choice.why
    assert resolved("pytorch", path).name == "pytorch"


def test_a_tuned_choice_that_does_not_run_leads_to_the_table(card, tmp_path):
    card["flash3"] = fails
    path = tmp_path / "attention.json"
    path.write_text(tuned_text(H100, "flash3", []))
    choice = resolved("auto", path)
    assert (choice.name, choice.fell_back) == ("flash4", True)
    assert "flash3 does not run here: ImportError" in choice.why


@pytest.mark.parametrize(
    ("made_on", "said"),
    [
        (dataclasses.replace(H100, card="NVIDIA L4"), "card was NVIDIA L4 and is NVIDIA H100"),
        (with_versions(torch="2.10.0"), "torch was 2.10.0 and is 2.11.0+cu130"),
        (with_versions(flash_attn_4="4.0.0b35"), "flash-attn-4 was 4.0.0b35 and is 4.0.0b36"),
        (with_versions(xformers="0.0.35"), "xformers was 0.0.35 and is absent"),
        (with_versions(flash_attn_4=None), "flash-attn-4 was absent and is 4.0.0b36"),
    ],
    ids=["card", "torch", "library", "removed", "added"],
)
def test_a_tuned_file_of_another_environment_is_ignored_visibly(card, tmp_path, made_on, said):
    path = tmp_path / "attention.json"
    path.write_text(tuned_text(made_on, "efficient", []))
    choice = resolved("auto", path)
    assert (choice.name, choice.fell_back) == ("flash4", True)
    assert f"of another environment ({said}): run scripts/tune_attention.py again" in choice.why


GOOD = json.loads(tuned_text(H100, "efficient", []))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "can't be read"),
        (b"\xff\xfe\x00", "can't be read"),
        (json.dumps(GOOD).encode()[:-9], "can't be read"),
        (b"[]", "is damaged"),
        (b"null", "is damaged"),
        (json.dumps({"format": 1, "attention": "efficient"}).encode(), "is damaged (KeyError: 'environment')"),
        (json.dumps(GOOD | {"environment": 7}).encode(), "is damaged"),
        (json.dumps(GOOD | {"format": 2}).encode(), "says format 2"),
        (json.dumps(GOOD | {"attention": "auto"}).encode(), "attention 'auto'"),
        (json.dumps(GOOD | {"attention": ["efficient"]}).encode(), "attention ['efficient']"),
    ],
)
def test_a_damaged_tuned_file_is_ignored_visibly(card, tmp_path, content, said):
    path = tmp_path / "attention.json"
    path.write_bytes(content)
    choice = resolved("auto", path)
    assert (choice.name, choice.fell_back) == ("flash4", True)
    assert said in choice.why
    assert str(path) in choice.why


def test_a_tuned_file_that_is_a_folder_is_ignored_visibly(tmp_path):
    assert "can't be read" in read_tuned(tmp_path, H100, CHOICES)[1]


# What tuning chooses


def measured(**ms: float) -> list[Measurement]:
    errors = {name: 0.02 if name in EIGHT_BIT else 0.002 for name in ms}
    return [Measurement(name, tokens, ms[name], 1.0, errors[name]) for tokens in tune.TOKENS for name in ms]


@pytest.mark.parametrize(
    ("measurements", "allow_8_bit", "expected"),
    [
        (measured(pytorch=2.0, flash4=1.0), False, "flash4"),
        (measured(pytorch=1.0, flash4=2.0), False, "pytorch"),
        (measured(pytorch=1.0, flash4=0.99), False, "pytorch"),  # within the noise: the table's
        (measured(pytorch=2.0, sage=1.0), False, "pytorch"),
        (measured(pytorch=2.0, sage=1.0), True, "sage"),
        ([*measured(pytorch=2.0), Measurement("sage", tune.TOKENS[0], 1.0, 1.0, BOUND_8_BIT * 1.1)], True, "pytorch"),
        ([*measured(pytorch=2.0), Measurement("flash4", tune.TOKENS[0], 1.0, 1.0, 0.02)], True, "pytorch"),
        ([*measured(pytorch=2.0), Measurement("flash4", tune.TOKENS[0], 1.0, 1.0, float("nan"))], True, "pytorch"),
        (
            [
                *measured(pytorch=2.0),
                Measurement("cudnn", tune.TOKENS[0], 1.0, 1.0, 0.002),
                Measurement("cudnn", tune.TOKENS[1], problem="no kernel"),
            ],
            False,
            "pytorch",
        ),
        ([Measurement("cudnn", tune.TOKENS[0], problem="no kernel")], False, "pytorch"),
    ],
)
def test_the_fastest_that_is_right_is_chosen(measurements, allow_8_bit, expected):
    assert choose(measurements, ["pytorch"], allow_8_bit)[0] == expected


class InstantEvent:
    """A CUDA event on a machine without one: everything takes 2 ms."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _):
        return 2.0


def test_tuning_goes_on_when_a_kernel_fails_at_full_size(card, monkeypatch):
    def too_long(q, k, v, mask):
        if q.shape[1] == 600:
            raise RuntimeError("no kernel for 600 tokens")
        return attention._pytorch(q, k, v)

    card["flash4"] = lambda: too_long
    card["flash3"] = fails
    monkeypatch.setattr(torch.cuda, "Event", InstantEvent)
    monkeypatch.setattr(tune, "environment", attention.environment)
    monkeypatch.setattr(tune, "joint_inputs", attention.joint_inputs)
    monkeypatch.setattr(tune, "TOKENS", (600, 40))
    monkeypatch.setattr(tune, "HEADS", 2)
    seen = []
    tuning = tune.tune(torch.device("cuda", 0), False, seen.append)
    assert tuple(seen) == tuning.measurements
    found = {(m.attention, m.tokens): m for m in seen}
    assert len(found) == 2 * len(CHOICES[1:])
    assert found["flash4", 600].problem == "RuntimeError: no kernel for 600 tokens"
    assert found["flash4", 40].problem is None
    assert "flash3 does not run here: ImportError" in found["flash3", 40].problem
    assert (found["cudnn", 600].ms, found["cudnn", 600].tflops) == (2.0, round(4 * 2 * 600**2 * 128 / 0.002 / 1e12, 1))
    assert tuning.attention == "cudnn"  # the table's second, as the first fails and all are equally fast


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(tune_attention.REPO / "scripts" / "tune_attention.py"), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_writes_nothing_without_a_card(tmp_path):
    ended = run_script("--output", str(tmp_path / "attention.json"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "There is no CUDA card here, so there is nothing to measure.\n"
    assert list(tmp_path.iterdir()) == []


def test_the_script_finds_the_user_folder_of_its_comfyui(tmp_path):
    pack = tmp_path / "custom_nodes" / "qwen-edit-fast"
    assert tune_attention.default_output(pack, TUNED_FILE) == tmp_path / "user" / "qwen_edit_fast" / "attention.json"
    assert tune_attention.default_output(tmp_path / "elsewhere" / "qwen-edit-fast", TUNED_FILE) is None


# On a card


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@torch.inference_mode()
def test_on_a_card_tuning_measures_and_its_file_is_followed(tmp_path):
    device, seen = torch.device("cuda", torch.cuda.current_device()), []
    tuning = tune.tune(device, False, seen.append)
    assert [(m.attention, m.tokens) for m in seen] == [(name, n) for n in tune.TOKENS for name in CHOICES[1:]]
    assert tuning.attention not in EIGHT_BIT
    assert all(m.tflops > 0 for m in seen if m.attention in ("pytorch", "math", tuning.attention))
    path = tmp_path / "attention.json"
    path.write_text(tuned_text(tuning.environment, tuning.attention, [dataclasses.asdict(m) for m in seen]))
    choice = resolve("auto", device, torch.bfloat16, 128, path)
    assert (choice.name, choice.fell_back) == (tuning.attention, False)
    assert str(path) in choice.why
