"""Modulation of all blocks, computed ahead for a whole schedule.

A third of the parameters (``img_mod``, ``txt_mod``: 6.8 B of 20.4 B) see only the timestep. They are run once for all
timesteps of a schedule; the blocks then look their shift, scale and gate up in a table of 4.4 MB a timestep (at full
size, bf16). Where the linears' weights lie does not matter, so they need not stay on the GPU.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from .kernels import Modulation
from .linear import Adapters, WeightReader, low_rank
from .quantize import QuantizedTensor

ROWS_KEPT = 128  # 560 MB at full size; the table in use is kept whatever its size


@dataclass(frozen=True)
class ModulationTable:
    """``blocks`` is ``[T, blocks, 2, 6C]`` (image, text; two halves of shift, scale, gate), ``final`` ``[T, 2C]`` (shift,
    scale); ``row_of`` says which timestep each of the T rows is."""

    blocks: torch.Tensor
    final: torch.Tensor
    row_of: dict[float, int]
    _halves: list[list[tuple[torch.Tensor, ...]]] = field(init=False)

    def __post_init__(self):
        streams = [[part.chunk(2, dim=-1) for part in block.unbind(1)] for block in self.blocks.unbind(1)]
        object.__setattr__(self, "_halves", streams)

    def rows(self, timesteps: Sequence[float], reference_timesteps: Sequence[float]) -> torch.Tensor:
        """Row numbers ``[2, B]`` of output and reference tokens of each item."""
        rows = [[self.row_of[t] for t in item] for item in (timesteps, reference_timesteps)]
        return torch.tensor(rows, device=self.blocks.device)

    def halves(self, block: int, stream: int, rows: torch.Tensor, split: int) -> tuple[Modulation, Modulation]:
        """What a block (stream 0: image, 1: text) applies around its attention and around its MLP."""
        first, second = self._halves[block][stream]
        return Modulation(first, rows, split), Modulation(second, rows, split)


class ModulationCache:
    """The tables of the last schedules; ``key`` names what they depend on besides the timesteps (weights, LoRAs)."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Hashable, list[ModulationTable]] = OrderedDict()

    def table(
        self,
        key: Hashable,
        needed: Sequence[float],
        schedule: Sequence[float],
        compute: Callable[[Sequence[float]], ModulationTable],
    ) -> ModulationTable:
        """A table with all ``needed`` timesteps; if there is none, one of the whole schedule is made.

        Another schedule's table is not used, even if it has them: the product of other timesteps together may round
        differently, and a picture must not depend on what was made before it.
        """
        wanted = set(needed)
        key = (key, tuple(schedule))
        for table in self._tables.get(key, ()):
            if wanted <= table.row_of.keys():
                self._tables.move_to_end(key)
                return table
        table = compute(sorted({*needed, *schedule}) if wanted <= {*schedule, 0.0} else sorted(wanted))
        self._tables.setdefault(key, []).append(table)
        self._tables.move_to_end(key)
        while sum(len(t.row_of) for kept in self._tables.values() for t in kept) > ROWS_KEPT:
            oldest_key, oldest = next(iter(self._tables.items()))
            if oldest[0] is table:
                break
            oldest.pop(0)
            if not oldest:
                del self._tables[oldest_key]
        return table

    def clear(self) -> None:
        self._tables.clear()


def modulation_linears(model) -> list[tuple[Any, Any]]:
    """Of each block the linear for image tokens and that for text tokens."""
    return [(block.img_mod[1], block.txt_mod[1]) for block in model.transformer_blocks]


def makes_tables(model) -> Iterator[Any]:
    """The modules whose results a table holds."""
    yield from model.time_text_embed.modules()
    yield model.norm_out.linear
    yield from chain.from_iterable(modulation_linears(model))


def compute_table(
    model, timesteps: Sequence[float], like: torch.Tensor, weights: WeightReader, adapters: Adapters
) -> ModulationTable:
    """One pass of all modulation linears over ``timesteps``.

    Args:
        model: the transformer, diffusers' or ComfyUI's.
        like: a tensor with the compute dtype and device.
    """
    t = torch.tensor(timesteps, device=like.device, dtype=torch.float32)
    activated = F.silu(model.time_text_embed(t, like))

    def project(linear) -> torch.Tensor:
        read = weights.read(linear)
        if read is None:
            y = linear(activated)
        else:
            weight, bias = read
            weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            y = F.linear(activated, weight, bias)
        return low_rank(y, activated, adapters.get(linear, ()))

    pairs = modulation_linears(model)
    blocks = []
    with weights.ahead(list(chain.from_iterable(pairs)), like):
        for pair in pairs:
            blocks.append(torch.stack([project(linear) for linear in pair], dim=1))
            weights.release()
    scale, shift = project(model.norm_out.linear).chunk(2, dim=-1)
    weights.release()
    row_of = {float(value): row for row, value in enumerate(timesteps)}
    return ModulationTable(torch.stack(blocks, dim=1), torch.cat([shift, scale], dim=-1), row_of)
