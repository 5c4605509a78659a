"""The table behind the loader's profiles: equal cards choose equally, and what does not run says why."""

import pytest
import torch

from qwen_edit import quantize
from qwen_edit.precision import FLOATS, PRECISIONS, PROFILES, Precision, resolve_precision
from qwen_edit.quantize import FORMATS

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
BLOCK_BYTES = 27_200_000_000  # of the released model
BF16, FP32 = torch.bfloat16, torch.float32
# Compute capability, and the dtype that ComfyUI runs float models in.
CARDS = {
    "Pascal": ((6, 1), FP32),
    "Turing": ((7, 5), FP32),
    "Ampere": ((8, 6), BF16),
    "Ada": ((8, 9), BF16),
    "Hopper": ((9, 0), BF16),
}
EIGHT_BIT = {"Turing": "int8", "Ampere": "int8", "Ada": "fp8", "Hopper": "fp8"}


@pytest.fixture
def resolved(monkeypatch):
    monkeypatch.setattr(quantize, "fp8_problem", lambda device: None)

    def resolved(card: str, precision: str = "auto", profile: str = "auto", gib: int = 24, device=CUDA) -> Precision:
        capability, half = CARDS[card]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return resolve_precision(precision, profile, device, half, BLOCK_BYTES, gib * 2**30)

    return resolved


def test_fp8_that_this_torch_refuses_falls_back_to_int8_with_the_reason(resolved, monkeypatch):
    monkeypatch.setattr(quantize, "fp8_problem", lambda device: "torch refuses the product on this card")
    for asked in ({"precision": "fp8"}, {"profile": "fast"}, {"gib": 24}):
        assert resolved("Ada", **asked).form == "int8"
    asked = resolved("Ada", precision="fp8")
    assert asked.fell_back
    assert "refuses the product" in asked.why


@pytest.mark.parametrize("card", EIGHT_BIT)
@pytest.mark.parametrize(
    ("gib", "form", "why"),
    [
        (8, "8 bit", "no form fits on this card as a whole"),
        (12, "w4a8", "8 bit does not fit"),
        (16, "8 bit", "bf16 does not fit on this card"),
        (24, "8 bit", "bf16 does not fit on this card"),
        (32, None, "not quantized"),
        (48, None, "not quantized"),
        (80, None, "not quantized"),
    ],
)
def test_auto_is_the_first_that_fits(resolved, card, gib, form, why):
    if card == "Turing" and gib in (32, 48):  # float models run in fp32 there: twice the size
        form, why = "8 bit", "bf16 does not fit on this card"
    expected = Precision("auto", CARDS[card][1], EIGHT_BIT[card] if form == "8 bit" else form, why)
    assert resolved(card, gib=gib) == expected


@pytest.mark.parametrize("card", EIGHT_BIT)
@pytest.mark.parametrize("gib", [8, 12, 16, 24, 32, 48, 80])
def test_the_other_profiles_do_not_look_at_the_memory(resolved, card, gib):
    half = CARDS[card][1]
    assert resolved(card, profile="quality", gib=gib) == Precision("auto", half, None, "not quantized")
    fast = Precision("auto", half, EIGHT_BIT[card], "the fastest form of this card")
    assert resolved(card, profile="fast", gib=gib) == fast
    assert resolved(card, profile="small", gib=gib) == Precision("auto", half, "w4a8", "the smallest form")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("card", CARDS)
def test_what_is_asked_for_runs(resolved, card, profile):
    half = CARDS[card][1]
    for name, dtype in FLOATS.items():
        assert resolved(card, name, profile, gib=8) == Precision(name, dtype, None, "as asked")
    for form in FORMATS:
        precision = resolved(card, form, profile, gib=80)
        if (card == "Pascal" and form != "w4a8") or (form == "fp8" and EIGHT_BIT[card] != "fp8"):
            assert precision.fell_back
        else:
            assert precision == Precision(form, half, form, "as asked")


@pytest.mark.parametrize(
    ("card", "form", "runs", "why"),
    [
        ("Turing", "fp8", "int8", "fp8 does not run here: it needs compute capability 8.9, this card has 7.5"),
        ("Ampere", "fp8", "int8", "fp8 does not run here: it needs compute capability 8.9, this card has 8.6"),
        ("Pascal", "fp8", None, "fp8 does not run here: it needs compute capability 8.9, this card has 6.1"),
        ("Pascal", "int8", None, "int8 does not run here: it needs compute capability 7.5, this card has 6.1"),
        ("Pascal", "w4a4", None, "w4a4 does not run here: it needs compute capability 7.5, this card has 6.1"),
    ],
)
def test_a_form_that_the_card_lacks_falls_back_with_the_reason(resolved, card, form, runs, why):
    assert resolved(card, form) == Precision(form, CARDS[card][1], runs, why, fell_back=True)


PASCAL = "it needs compute capability 7.5, this card has 6.1"
MISSING = "the package comfy-kitchen is not installed (No module)"


@pytest.mark.parametrize(
    ("profile", "gib", "missing", "form", "why"),
    [
        ("fast", 24, None, None, f"no 8-bit form runs here: {PASCAL}"),
        ("fast", 24, MISSING, None, f"no 8-bit form runs here: {MISSING}"),
        ("small", 24, None, "w4a8", "the smallest form"),  # its products are then of floats
        ("small", 24, MISSING, None, f"4 bit does not run here: {MISSING}"),
        ("auto", 24, None, "w4a8", "8 bit does not fit"),
        ("auto", 8, None, None, f"bf16 does not fit on this card, and no 8-bit form runs here: {PASCAL}"),
        ("auto", 24, MISSING, None, f"bf16 does not fit on this card, and no 8-bit form runs here: {MISSING}"),
        ("auto", 80, None, None, None),
        ("quality", 24, MISSING, None, None),
    ],
)
def test_without_an_8_bit_form(resolved, monkeypatch, profile, gib, missing, form, why):
    monkeypatch.setattr(quantize, "MISSING", missing)
    card = "Pascal" if missing is None else "Ada"
    fell_back = why is not None and form is None
    expected = Precision("auto", CARDS[card][1], form, why or "not quantized", fell_back=fell_back)
    assert resolved(card, profile=profile, gib=gib) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_a_form_needs_comfy_kitchen(resolved, monkeypatch, form):
    monkeypatch.setattr(quantize, "MISSING", "the package comfy-kitchen is not installed (No module)")
    precision = resolved("Hopper", form)
    assert (precision.form, precision.fell_back) == (None, True)
    assert precision.why == f"{form} does not run here: the package comfy-kitchen is not installed (No module)"


def test_the_cpu_quantizes_only_when_asked(resolved):
    assert resolved("Ada", device=CPU).form is None
    assert resolved("Ada", profile="fast", device=CPU).form == "fp8"
    assert resolved("Ada", "w4a4", device=CPU).form == "w4a4"


def test_other_devices_have_no_product(resolved):
    precision = resolved("Ada", "int8", device=torch.device("mps"))
    assert (precision.form, precision.fell_back) == (None, True)
    assert precision.why == "int8 does not run here: no product of 8-bit numbers is known for mps"


def test_names_and_activations(resolved):
    named = {p: resolved("Ada", p) for p in PRECISIONS if p != "auto"}
    assert {p: precision.name for p, precision in named.items()} == {p: p for p in named}
    of = {p: dtype for p, precision in named.items() if (dtype := precision.activations(CUDA)) is not None}
    assert of == {"fp8": quantize.FP8, "int8": quantize.INT8, "w4a8": quantize.FP8}


@pytest.mark.parametrize(("card", "form"), [("Pascal", None), ("Turing", quantize.INT8), ("Hopper", quantize.FP8)])
def test_4_bit_weights_become_what_the_card_multiplies(resolved, monkeypatch, card, form):
    quantize._product.cache_clear()
    monkeypatch.setattr(quantize, "_int8_product", lambda device, dtype, with_addend: quantize._int_mm)
    assert resolved(card, "w4a8").activations(CUDA) == form
    quantize._product.cache_clear()
