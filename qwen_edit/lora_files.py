"""The formats of LoRA files: which tensors belong to which module, and the low-rank term that they make.

- LoRA in the key styles in use (diffusers/peft, ``lora_down``/``lora_up`` with alpha, kohya). diffusers converts the keys;
  it is given stand-ins for the tensors and multiplies none of them: its factor goes into the term's scale.
- LoHa and LoKr of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS), whose products are low-rank terms too.

Where diffusers stores peft's configuration with the file, its alpha, rank, patterns and rank stabilization hold as in peft
(``tuners/lora/model.py``, ``_create_and_replace``).
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .errors import LORA
from .finite import all_finite
from .linear import Adapter, HighRank, LowRank

# Of the term that a LoHa or LoKr becomes: at 256 it has a sixth (attention) to a tenth (MLP) of the numbers of the weights
# themselves; beyond that its factors are kept, and adding their product to the weight is the better way.
MAX_RANK = 256
PRODUCTS = ("hada_", "lokr_")
OTHER_KINDS = (".dora_scale", ".lora_magnitude_vector", ".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm")
ELSEWHERE = "Use ComfyUI's own LoRA loader for it, which patches the weights."
DAMAGED = "The file is damaged or incomplete: get it again."


@dataclass(frozen=True)
class Stored:
    """A tensor of the file and what it is to be multiplied by; stands for the tensor while diffusers converts the keys."""

    key: str
    tensor: torch.Tensor
    factor: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def item(self) -> float:
        return self.tensor.item()

    def __mul__(self, factor: float) -> "Stored":
        return replace(self, factor=self.factor * factor)


# What the file has for one module: "A.weight", "hada_w1_a", "alpha", ….
Parts = Mapping[str, Stored]


def check_numbers(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError, which names the key, for other kinds of adapters and for tensors that no adapter can have."""
    for key, tensor in state.items():
        if key.endswith(OTHER_KINDS):
            raise ValueError(f"{LORA} {path.name}: {_no_such_kind(key)}")
        if 0 in tensor.shape:
            raise ValueError(f"{LORA} {path.name}: {key} has rank zero ({list(tensor.shape)}). {DAMAGED}")
        if key.endswith(".alpha") and tensor.numel() != 1:
            raise ValueError(f"{LORA} {path.name}: {key} is {list(tensor.shape)}, it must be one number. {DAMAGED}")
        if not all_finite(tensor):
            raise ValueError(f"{LORA} {path.name}: {key} holds NaN or infinity. {DAMAGED}")


def _no_such_kind(key: str) -> str:
    return f"{key} is of a kind that this node does not apply (it knows LoRA, LoHa and LoKr). {ELSEWHERE}"


def parts_by_module(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Stored]]:
    """The file's tensors by the module's name in the file (``transformer.…``, ``lora_unet_…``, ``…``) and their part.

    Keys that are of no known form are a module of their own with the part "".

    Raises:
        ValueError: keys that diffusers can't convert.
    """
    products = {m for m, _, part in (key.rpartition(".") for key in state) if part.startswith(PRODUCTS)}
    modules: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    rest = {}
    for key, tensor in state.items():
        module, _, part = key.rpartition(".")
        if module in products:
            modules[module][part] = Stored(key, tensor)
        else:
            rest[key] = Stored(key, tensor)
    for key, stored in _converted(path, rest).items():
        module, _, part = key.rpartition(".lora_")
        modules[module or key][part if module else ""] = stored
    return dict(modules)


def _converted(path: Path, state: Any) -> dict[str, Stored]:
    if not state:
        return {}
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    try:
        converted: Any = QwenImageLoraLoaderMixin.lora_state_dict(state)
    except (KeyError, ValueError, IndexError) as e:
        raise ValueError(
            f"{LORA} {path.name}: its keys are not those of a LoRA for this model ({e}). It is of another model, or incomplete."
        ) from e
    return converted


class PeftScales:
    """How peft scales the adapter on each module, from the configuration that diffusers stores with the file."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a configuration that can't be read or is one of DoRA."""
        self._path = path
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("lora_adapter_metadata")
        try:
            config = {} if stored is None else json.loads(stored)
            self._config = {k.removeprefix("transformer."): v for k, v in config.items()}
            self._ranks, self._alphas = (self._patterns(f"{name}_pattern") for name in ("rank", "alpha"))
        except (ValueError, AttributeError, re.error) as e:
            raise ValueError(f"{LORA} {path.name}: its lora_adapter_metadata can't be read ({e}). {DAMAGED}") from e
        if self._config.get("use_dora"):
            raise ValueError(
                f"{LORA} {path.name}: use_dora in its lora_adapter_metadata: a DoRA is not applied. {ELSEWHERE}"
            )

    def _patterns(self, name: str) -> list[tuple[re.Pattern, float]]:
        # as peft's get_pattern_key; compiled once, because there may be one for each module
        return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in (self._config.get(name) or {}).items()]

    def of(self, module: str, first: Stored, rank: int | None) -> float:
        """The scale, 1 where nothing is stored.

        Args:
            first: a tensor of the module's adapter, for the message.
            rank: of the tensors, which has to be the configured one; None: the configured one counts.
        """
        if not self._config:
            return 1.0
        r = _first_match(self._ranks, module, self._config.get("r", 8))
        alpha = _first_match(self._alphas, module, self._config.get("lora_alpha", self._config.get("alpha", 8)))
        numbers = all(isinstance(n, int | float) and math.isfinite(n) for n in (r, alpha))
        if not numbers or r <= 0 or rank not in (None, r):
            raise ValueError(
                f"{LORA} {self._path.name}: {first.key} has rank {rank}, but lora_adapter_metadata says rank {r}, alpha {alpha}."
                f" {DAMAGED}"
            )
        return alpha / (math.sqrt(r) if self._config.get("use_rslora") else r)


def _first_match(patterns: list[tuple[re.Pattern, float]], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def adapter(
    path: Path, module: str, parts: Parts, shape: tuple[int, int], scales: PeftScales, dtype: torch.dtype
) -> Adapter:
    """One module's adapter for a linear ``[out, in]`` of this shape; a LoHa or LoKr of more than ``MAX_RANK`` as its factors.

    Args:
        dtype: what products of the file's factors (LoHa, LoKr) are kept in; they are made in float32.

    Raises:
        ValueError: naming the key: factors are missing or don't fit each other or the linear.
    """
    kind = next((k for k in PRODUCTS if any(part.startswith(k) for part in parts)), None)
    make = {"hada_": _loha, "lokr_": _lokr, None: _lora}[kind]
    return make(_Adapter(path, module, parts, shape, scales, dtype))


@dataclass(frozen=True)
class _Adapter:
    """One module's tensors with the checks that all formats share."""

    path: Path
    module: str
    parts: Parts
    shape: tuple[int, int]
    scales: PeftScales
    dtype: torch.dtype

    @property
    def first(self) -> Stored:
        return next(iter(self.parts.values()))

    def error(self, key: str, message: str) -> ValueError:
        return ValueError(f"{LORA} {self.path.name}: {key} {message}")

    def only(self, *known: str) -> None:
        for part, stored in self.parts.items():
            if part not in known:
                raise ValueError(f"{LORA} {self.path.name}: {_no_such_kind(stored.key)}")

    def matrix(self, part: str) -> torch.Tensor:
        stored = self.parts.get(part)
        if stored is None:
            raise self.error(self.first.key, f"has no counterpart {self._spelt(part)}. {DAMAGED}")
        if stored.tensor.ndim != 2:
            raise self.error(
                stored.key, f"is {list(stored.shape)}, a matrix was expected. It is a LoRA of another model."
            )
        return stored.tensor

    def pair(self, left: str, right: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors ``[m, r]`` and ``[r, n]``."""
        a, b = self.matrix(left), self.matrix(right)
        if a.shape[1] != b.shape[0]:
            key, other = self.parts[right].key, self.parts[left].key
            raise self.error(key, f"has rank {b.shape[0]}, its counterpart {other} {a.shape[1]}. {DAMAGED}")
        return a, b

    def fits(self, out_features: int, in_features: int) -> None:
        if (out_features, in_features) != self.shape:
            raise self.error(
                self.first.key,
                f"and its counterparts make [{out_features}, {in_features}], the model's layer needs {list(self.shape)}."
                " It is a LoRA of another model of the same family.",
            )

    def alpha_over(self, rank: int | None) -> float:
        """The scale of a product: the file's alpha counts for factored matrices, else what peft's configuration says."""
        alpha = self.parts.get("alpha")
        if alpha is None:
            return self.scales.of(self.module, self.first, None)
        return 1.0 if rank is None else alpha.item() / rank

    @staticmethod
    def _spelt(part: str) -> str:
        return f"lora_{part}" if part[0] in "AB" else part


def _lora(adapter: _Adapter) -> LowRank:
    adapter.only("A.weight", "B.weight")
    b, a = adapter.pair("B.weight", "A.weight")
    adapter.fits(b.shape[0], a.shape[1])
    factor = adapter.parts["A.weight"].factor * adapter.parts["B.weight"].factor
    return LowRank(a, b, factor * adapter.scales.of(adapter.module, adapter.parts["A.weight"], len(a)))


def _loha(adapter: _Adapter) -> Adapter:
    """``(W1a W1b) ∘ (W2a W2b)``: the rows of the left factors and the columns of the right ones are multiplied each with each,
    which gives ``[out, r1 r2]`` and ``[r1 r2, in]`` (the face-splitting and the Khatri-Rao product)."""
    adapter.only("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")  # t1 and t2 belong to convolutions
    pairs = [adapter.pair(f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2)]
    for left, right in pairs:
        adapter.fits(left.shape[0], right.shape[1])
    (left1, right1), (left2, right2) = ((left.float(), right.float()) for left, right in pairs)
    if len(right1) * len(right2) > MAX_RANK:
        factors = (tensor.to(adapter.dtype) for pair in pairs for tensor in pair)
        return HighRank(tuple(factors), adapter.alpha_over(len(right1)))
    b = (left1[:, :, None] * left2[:, None, :]).flatten(1)
    a = (right1[:, None, :] * right2[None, :, :]).flatten(0, 1)
    return LowRank(a.to(adapter.dtype), b.to(adapter.dtype), adapter.alpha_over(len(right1)))


def _lokr(adapter: _Adapter) -> Adapter:
    """``W1 ⊗ W2`` with ``Wi = Li Ri`` is ``(L1 ⊗ L2) (R1 ⊗ R2)``, of the product of their ranks."""
    adapter.only(
        *(f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")), "alpha"
    )  # t2 belongs to convolutions
    (left1, right1), (left2, right2) = (_kronecker_factor(adapter, i) for i in (1, 2))
    adapter.fits(left1.shape[0] * left2.shape[0], right1.shape[1] * right2.shape[1])
    # LyCORIS counts the rank of W2 if that is factored, else that of W1; matrices that are not factored take no alpha.
    counted = next((adapter.parts[f"lokr_w{i}_b"] for i in (2, 1) if f"lokr_w{i}" not in adapter.parts), None)
    scale = adapter.alpha_over(None if counted is None else len(counted.tensor))
    if len(right1) * len(right2) > MAX_RANK:
        return HighRank(
            tuple((left @ right).to(adapter.dtype) for left, right in ((left1, right1), (left2, right2))), scale
        )
    b = torch.kron(left1.contiguous(), left2.contiguous())
    a = torch.kron(right1.contiguous(), right2.contiguous())
    return LowRank(a.to(adapter.dtype), b.to(adapter.dtype), scale)


def _kronecker_factor(adapter: _Adapter, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``W1`` or ``W2`` ``[m, n]`` as ``[m, r]`` and ``[r, n]``; one that is not factored has its smaller side for r."""
    if f"lokr_w{i}" not in adapter.parts and f"lokr_w{i}_a" in adapter.parts:
        left, right = adapter.pair(f"lokr_w{i}_a", f"lokr_w{i}_b")
        return left.float(), right.float()
    whole = adapter.matrix(f"lokr_w{i}").float()
    rows, columns = whole.shape
    return (whole, torch.eye(columns)) if columns <= rows else (torch.eye(rows), whole)
