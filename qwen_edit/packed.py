"""Linears whose weights stay in ggml's block formats and become floats for each product.

Activations stay floats, so a picture is that of the dequantized weights, each rounded once to the model's dtype (that of
the biases).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import BlockType, dequantize, packed_shape
from .quantize import StaysInRam, is_modulation

PACKED = "gguf"  # the form of a model whose weights stay as their file has them


class PackedLinear(nn.Linear):
    """``weight`` is uint8, of ``packed_shape``.

    ``patch`` changes each float copy ``[N, K]`` and returns it (a patcher's LoRAs); the bytes stay as they are.
    """

    blocks: BlockType
    patch: Callable[[torch.Tensor], torch.Tensor] | None = None

    def dequantized(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``weight``, this module's own or a copy of it elsewhere, patched, ``[N, K]``."""
        values = dequantize(weight, self.blocks, self.bias.dtype, out)
        values = values.view(self.out_features, self.in_features)
        if self.patch is None:
            return values
        patched = self.patch(values)
        return patched if out is None else out.copy_(patched)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantized(self.weight), self.bias)

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_) -> torch.Tensor:
        return patchers_copy(weight, self.blocks).view(self.out_features, self.in_features)

    def set_weight(self, weight: torch.Tensor, return_weight: bool = False, **_) -> torch.Tensor:
        """What a patcher makes of that copy, for a file; in the module only ``patch`` changes weights.

        Raises:
            NotImplementedError: it is to be put into the module.
        """
        if not return_weight:
            raise NotImplementedError("Weights in ggml's formats can't be replaced by floats.")
        return weight.to(self.bias.dtype)


def patchers_copy(weight: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """The values of a packed weight for a patcher, which has cast the bytes to a float dtype before; that holds 0 to 255
    exactly."""
    return dequantize(weight.to(torch.uint8), kind, torch.float32)


class PackedInRam(PackedLinear, StaysInRam):
    """One that stays in RAM; its bytes go to the card for each product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return StaysInRam.forward(self, x)

    def floats(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.dequantized(data)


def keep_packed(model: nn.Module, blocks: Mapping[str, BlockType], form: str | None) -> None:
    """Replace linears of a transformer without weights, after ``quantize.prepare``, by ones that keep their blocks.

    Args:
        blocks: the format of each tensor that a file has in blocks, by its name.
        form: of the model. ``PACKED``: all linears stay packed. Another one: those of the modulation do, which no form
            quantizes. None: none does.
    """
    for name, kind in blocks.items():
        path, _, parameter = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if not isinstance(module, nn.Linear) or parameter != "weight" or module.bias is None:
            continue
        if form == PACKED or (form is not None and is_modulation(name)):
            cls = PackedInRam if isinstance(module, StaysInRam) else PackedLinear
            linear = cls(module.in_features, module.out_features, device="meta", dtype=module.bias.dtype)
            shape = packed_shape(module.weight.shape, kind)
            linear.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
            linear.blocks = kind
            model.set_submodule(path, linear.requires_grad_(False))


def unpatch(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.patch = None


def unpacked(linears: Sequence[PackedLinear]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[sum of N, K]`` and biases of linears over the same input, side by side."""
    if len(linears) == 1:
        return linears[0].dequantized(linears[0].weight), linears[0].bias
    rows, bias = [linear.out_features for linear in linears], torch.cat([linear.bias for linear in linears])
    weight = bias.new_empty((sum(rows), linears[0].in_features))
    for linear, part in zip(linears, weight.split(rows), strict=True):
        linear.dequantized(linear.weight, part)
    return weight, bias
