"""Weights of ComfyUI's modules as its own linears get them: through its casting, and directly where DynamicVRAM has them on
the card as they are needed.

DynamicVRAM maps a weight's pages while they are in use (``vbar_fault``, ``vbar_unpin``) and may take them in between; its
signature then changes, and the weight is written anew, into another tensor.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import comfy.ops
import torch
from comfy_aimdo import model_vbar

from ...qwen_edit.linear import Operand, runs_itself
from ...qwen_edit.quantize import QuantizedTensor, with_row_scales


@dataclass
class KnownWeights:
    """What the forwards over one transformer know of weights that DynamicVRAM has on the card.

    ``row_scales``: by module, its weight there and the same with a scale for each row. ``operands``: by dtype and modules, the
    weight and the bias of each that they were made of, and the operands.
    """

    row_scales: dict[torch.nn.Module, tuple[Any, Any]] = field(default_factory=dict)
    operands: dict[tuple, tuple[list[tuple[Any, Any]], list[Operand]]] = field(default_factory=dict)


class CastWeights:
    """What the forward reads; held until ``release``."""

    def __init__(self, device: torch.device, dtype: torch.dtype, known: KnownWeights):
        self.device, self.dtype, self.known = device, dtype, known
        self._held: list[tuple] = []
        self._paged: list[tuple] = []

    def read(self, module):
        weight = module.weight
        quantized = isinstance(weight, QuantizedTensor)
        # a tensor of another kind (GGUF), a smoothed input or a LoRA that bypasses the weight: the module's own business
        known = quantized or type(weight) in (torch.Tensor, torch.nn.Parameter)
        if not known or not hasattr(module, "comfy_cast_weights") or runs_itself(module) or asks_for_more(module):
            return None
        dtype = weight.dtype if quantized else self.dtype
        if (resident := self._resident(module, dtype)) is not None:
            return resident
        cast, bias, stream = comfy.ops.cast_bias_weight(
            module,
            dtype=dtype,
            device=self.device,
            bias_dtype=self.dtype,
            offloadable=True,
            compute_dtype=self.dtype,
            want_requant=quantized,
        )
        if stream[0] is not None:  # came over the bus into a buffer that the next one will overwrite
            copies = cast.clone(), None if bias is None else bias.clone()
            comfy.ops.uncast_bias_weight(module, cast, bias, stream)
            return copies
        self._held.append((module, cast, bias, stream))
        return cast, bias

    def ahead(self, modules, like: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def _resident(self, module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias of a module that DynamicVRAM has on the card as they are needed; None: ComfyUI has to bring or
        change them. Its own way to the same tensors takes ten times as long, and there are 840 of them in a forward."""
        weight, bias = _last_written(module)
        if weight is None or weight.dtype != dtype or not (bias is None or bias.dtype == self.dtype):
            return None
        if not self.hold(module, weight, bias):
            return None
        return self._with_row_scales(module, weight) if isinstance(weight, QuantizedTensor) else weight, bias

    def hold(self, module, weight, bias) -> bool:
        """Keep a module's pages on the card until ``release``, if they hold this weight and this bias, unchanged."""
        state = vars(module)
        pages = state.get("_v")
        if (
            pages is None
            or state.get("_v_weight") is not weight
            or state.get("_v_bias") is not bias
            or "_prefetch" in state
            or module.weight_function
            or module.bias_function
            or self.device.type == "cpu"
        ):
            return False
        signature = model_vbar.vbar_fault(pages)
        if signature is None:
            return False
        if model_vbar.vbar_signature_compare(signature, module._v_signature):
            self._paged.append(pages)
            return True
        model_vbar.vbar_unpin(pages)
        return False

    def _with_row_scales(self, module, weight):
        """Made once for as long as DynamicVRAM keeps this very tensor: it makes another whenever it writes the weight."""
        before, made = self.known.row_scales.get(module, (None, None))
        if before is not weight:
            made = with_row_scales(weight)
            self.known.row_scales[module] = weight, made
        return made

    def release(self) -> None:
        for held in self._held:
            comfy.ops.uncast_bias_weight(*held)
        for pages in self._paged:
            model_vbar.vbar_unpin(pages)
        self._held.clear()
        self._paged.clear()


class PagedOperands:
    """Operands that are what they were in the forward before: their weights are where DynamicVRAM had them (see
    ``known_operands.KnownOperands``, which is for weights that lie in their modules)."""

    def __init__(self, weights: CastWeights):
        self._weights, self._known = weights, weights.known.operands

    def operands(self, modules: tuple[Any, ...]) -> list[Operand] | None:
        known = self._known.get((self._weights.dtype, modules))
        if known is None:
            return None
        made_of, operands = known
        for module, (weight, bias) in zip(modules, made_of, strict=True):
            if runs_itself(module) or asks_for_more(module) or not self._weights.hold(module, weight, bias):
                return None
        return operands

    def learn(self, modules: tuple[Any, ...], operands: list[Operand]) -> None:
        made_of = [_last_written(module) for module in modules]
        if len(operands) == len(modules) and all(map(_is_made_of, operands, made_of)):
            self._known[self._weights.dtype, modules] = made_of, operands


def _last_written(module) -> tuple[Any, Any]:
    """Weight and bias that DynamicVRAM last wrote for a module; they may have left the card since."""
    state = vars(module)
    return state.get("_v_weight"), state.get("_v_bias")


def _is_made_of(operand: Operand, tensors: tuple[Any, Any]) -> bool:
    weight, bias = tensors
    data = weight._qdata if isinstance(weight, QuantizedTensor) else weight
    return (
        operand.weight is not None
        and data is not None
        and operand.weight.data_ptr() == data.data_ptr()
        and operand.weight.dtype == data.dtype
        and operand.bias is bias
    )


def asks_for_more(module) -> bool:
    """What ComfyUI's quantized linears do besides multiplying."""
    state = vars(module)
    return bool(state.get("_full_precision_mm")) or state.get("pre_quant_scale") is not None
