"""What ``auto`` means for the attention: a tuned file of this very environment, else a table.

The table goes by compute capability and library versions, read without importing a library. Only what was measured is
in it; everything else is left to PyTorch, whose choice is right everywhere and on many cards the fastest too.
``tune`` measures and its script writes the file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import InvalidVersion, parse

PACKAGES = {
    "xformers": "xformers",
    "sage": "sageattention",
    "flash": "flash-attn",
    "flash3": "flash-attn-3",
    "flash4": "flash-attn-4",
}
MEASURED_HEAD_DIM = 128
TUNED_FILE = Path("qwen_edit_fast") / "attention.json"  # below the user folder of ComfyUI
FORMAT = 1


@dataclass(frozen=True)
class Environment:
    """A card and the versions of what computes attention on it."""

    card: str
    capability: tuple[int, int]
    versions: Mapping[str, str]

    def flat(self) -> dict[str, str]:
        major, minor = self.capability
        return {"card": self.card, "capability": f"{major}.{minor}", **self.versions}


@dataclass(frozen=True)
class Rule:
    """``attention`` for cards of compute capability ``major`` with at least these versions."""

    major: int
    attention: str
    needs: Mapping[str, str]
    why: str


# In order of preference. "cuda" excludes ROCm, which counts its cards in the same numbers.
# TFLOP/s are from one H100, 24 heads of 128 and 8472 tokens in bf16, torch 2.11 and CUDA 13. The same run gave
# PyTorch's FlashAttention 2 321, memory-efficient 171 and sageattention 1.0.6 368.
TABLE = (
    # torch 2.11 is the oldest that flash-attn-4, itself a pre-release, was run with.
    Rule(
        9,
        "flash4",
        {"cuda": "12", "torch": "2.11", "flash-attn-4": "4.0.0b36"},
        "603 TFLOP/s on an H100, where cuDNN gave 561",
    ),
    Rule(9, "cudnn", {"cuda": "12"}, "561 TFLOP/s on an H100, where PyTorch's FlashAttention 2 gave 321"),
    Rule(10, "cudnn", {"cuda": "12"}, "PyTorch prefers it there too; not measured"),
)


def environment(device: torch.device) -> Environment:
    """What runs on a CUDA device."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    versions |= {package: installed(package) for package in PACKAGES.values()}
    return Environment(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        {name: str(found) for name, found in versions.items() if found is not None},
    )


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None. Nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def candidates(here: Environment, head_dim: int) -> list[tuple[str, str]]:
    """What to try for 16-bit attention, best first, each with its reason; PyTorch's choice is always the last."""
    if head_dim != MEASURED_HEAD_DIM:
        return [("pytorch", f"PyTorch's choice: measured was {MEASURED_HEAD_DIM} channels per head, not {head_dim}")]
    rules = [rule for rule in TABLE if rule.major == here.capability[0] and _has(here.versions, rule.needs)]
    last = "PyTorch's choice" if rules else f"PyTorch's choice: nothing was measured on a {here.card}"
    return [(rule.attention, rule.why) for rule in rules] + [("pytorch", last)]


def _has(versions: Mapping[str, str], needs: Mapping[str, str]) -> bool:
    try:
        return all(name in versions and parse(versions[name]) >= parse(least) for name, least in needs.items())
    except InvalidVersion:  # somebody's own build: nothing was measured with it
        return False


def read_tuned(path: Path, here: Environment, offered: Sequence[str]) -> tuple[str | None, str | None]:
    """The choice in a tuned file, and why it is not followed; both None where there is no file."""
    again = "run scripts/tune_attention.py again or delete it"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as e:
        return None, f"the tuned file {path} can't be read ({e}): {again}"
    try:
        form, choice, made = found["format"], found["attention"], dict(found["environment"])
    except (LookupError, TypeError, ValueError) as e:
        return None, f"the tuned file {path} is damaged ({type(e).__name__}: {e}): {again}"
    if form != FORMAT or choice not in offered:
        return None, f"the tuned file {path} says format {form!r}, attention {choice!r}: {again}"
    now = here.flat()
    changed = [
        f"{name} was {made.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in sorted(made.keys() | now.keys(), key=str)
        if made.get(name) != now.get(name)
    ]
    if changed:
        return None, f"the tuned file {path} is of another environment ({', '.join(changed)}): {again}"
    return choice, None


def tuned_text(here: Environment, attention: str, measurements: Sequence[Mapping]) -> str:
    """The tuned file that ``read_tuned`` reads; the measurements are for people."""
    content = {
        "format": FORMAT,
        "attention": attention,
        "environment": here.flat(),
        "measurements": [dict(m) for m in measurements],
    }
    return json.dumps(content, indent=1) + "\n"
