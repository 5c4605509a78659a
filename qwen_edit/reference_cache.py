"""Keys and values of reference tokens, kept from one step for the next ones.

Reference tokens see the noise only through attention, and with ``zero_cond_t`` (2511) not even the timestep changes their
modulation, so from step to step their keys and values change little. A forward that takes them from here computes
the output's and the text's tokens alone, which is half of the work with one reference of the output's size and less than a third
with three. It is a shortcut, not the same arithmetic: ``benchmarks/reference_cache.py`` measures what it costs.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class ReferenceCache:
    """Of one conditioning: of each block the keys and values ``[B, reference tokens, 2, heads, D]``, rotated."""

    blocks: list[torch.Tensor] = field(default_factory=list)
    complete: bool = False  # a forward that was interrupted leaves some blocks only
    made_at: float = 0.0  # sigma of the forward that left them

    def begin(self) -> None:
        """The next forward leaves its references here."""
        self.complete = False
        self.blocks.clear()

    def renew(self, sigma: float, tolerance: float) -> None:
        """Begin anew if the noise has fallen (or risen) by more than ``tolerance`` since these were made.

        Args:
            sigma: of the forward that comes, in [0, 1].
        """
        if not self.complete or abs(self.made_at - sigma) > tolerance:
            self.begin()
            self.made_at = sigma

    def keep(self, keys_and_values: torch.Tensor, blocks: int) -> None:
        """Copy the next block's; ``blocks`` is how many there are."""
        self.blocks.append(keys_and_values.clone())
        self.complete = len(self.blocks) == blocks


def forward_bytes(width: int, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """What a forward takes beside its weights: queries, keys, values, and an MLP of four times the width with its input."""
    return 16 * batch * tokens * width * dtype.itemsize


def cached_bytes(blocks: int, width: int, batch: int, reference_tokens: int, dtype: torch.dtype) -> int:
    """What a complete cache takes; ``width`` is heads x channels of a head."""
    return blocks * batch * reference_tokens * 2 * width * dtype.itemsize
