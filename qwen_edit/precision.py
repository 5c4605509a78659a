"""In what precision the transformer runs: what was asked for, what the card can do, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import quantize
from .quantize import FORMATS, SHARE
from .stored_weights import OURS, product_problem

# Append only: saved workflows hold these names.
PRECISIONS = ("auto", "bf16", "fp16", "fp32", *FORMATS)
PROFILES = ("auto", "quality", "fast", "small")
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ROOM_FOR_ACTIVATIONS = 3 * 2**30  # bytes; 1024² with two references and guidance stays below


@dataclass(frozen=True)
class Precision:
    """``dtype`` is that of activations and of what is not quantized; ``form`` one of ``quantize.FORMATS`` or None, or
    with ``stored``, which keeps a file's own quantized weights, the family of most of them (``stored_formats``).
    ``products`` is then which of fp8 and int8 our kernels multiply."""

    wanted: str
    dtype: torch.dtype
    form: str | None
    why: str
    fell_back: bool = False
    stored: bool = False
    products: str | None = None

    @property
    def name(self) -> str:
        return self.form or str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")

    def activations(self, device: torch.device) -> torch.dtype | None:
        """What activations are quantized to before our own products."""
        return quantize.activations(self.products if self.stored else self.form, device, self.dtype)


def resolve_precision(
    precision: str, profile: str, device: torch.device, half: torch.dtype, block_bytes: int, memory: int
) -> Precision:
    """What to run; a table, so that equal machines choose equally.

    Args:
        precision: one of ``PRECISIONS``; auto leaves it to the profile.
        profile: one of ``PROFILES``. quality: not quantized. fast: fp8, on cards without it int8. small: 4-bit. auto: the
            first of quality, fast and small that fits on the card; quality on the CPU.
        half: the dtype that the device runs float models in (bf16; fp32 where that is not possible).
        block_bytes: size of the blocks' linears in bf16.
        memory: of the device, in bytes.
    """
    if precision in FLOATS:
        return Precision(precision, FLOATS[precision], None, "as asked")
    if precision in FORMATS:
        problem = product_problem(precision, device)
        if problem is None:
            return Precision(precision, half, precision, "as asked")
        form = "int8" if precision == "fp8" and product_problem("int8", device) is None else None
        return Precision(precision, half, form, f"{precision} does not run here: {problem}", fell_back=True)
    if profile == "quality" or (profile == "auto" and device.type == "cpu"):
        return Precision("auto", half, None, "not quantized")
    fast = next((form for form in ("fp8", "int8") if product_problem(form, device) is None), None)
    if profile == "fast":
        if fast is None:
            return Precision(
                "auto", half, None, f"no 8-bit form runs here: {product_problem('int8', device)}", fell_back=True
            )
        return Precision("auto", half, fast, "the fastest form of this card")
    if profile == "small":
        problem = product_problem("w4a8", device)
        if problem is None:
            return Precision("auto", half, "w4a8", "the smallest form")
        return Precision("auto", half, fast, f"4 bit does not run here: {problem}", fell_back=True)
    for form, what in (
        (None, "not quantized"),
        (fast, "bf16 does not fit on this card"),
        ("w4a8", "8 bit does not fit"),
    ):
        if form is not None and product_problem(form, device) is not None:
            continue
        share = half.itemsize / 2 if form is None else SHARE[form]  # of bf16
        if block_bytes * share + ROOM_FOR_ACTIVATIONS <= memory:
            return Precision("auto", half, form, what)
    if fast is None:
        why = f"bf16 does not fit on this card, and no 8-bit form runs here: {product_problem('int8', device)}"
        return Precision("auto", half, None, why, fell_back=True)
    return Precision("auto", half, fast, "no form fits on this card as a whole")


def keep_stored_form(
    precision: str, device: torch.device, half: torch.dtype, families: Mapping[str, int]
) -> Precision | None:
    """How to run a file that is quantized already: as it is stored, if nothing else is asked for; None: something is.

    Args:
        families: how many of the blocks' linears the file has in each family.
    """
    if not families:
        return None
    main = max(families, key=lambda family: families[family])
    if precision not in ("auto", main.removesuffix("_convrot")):
        return None
    problems = {family: problem for family in families if (problem := product_problem(family, device)) is not None}
    ours = [family for family in families if family in OURS and family not in problems]
    products = max(ours, key=lambda family: families[family], default=None)
    why = "; ".join(
        f"{family} weights are made float for each product, which is slow: {p}" for family, p in problems.items()
    )
    return Precision(precision, half, main, why, bool(problems), stored=True, products=products)
