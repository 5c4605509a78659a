"""A transformer on a card that can't hold it: its blocks stay in RAM and come to the card one at a time.

This is the plain version: each copy waits for the block before it. It is exact, and slow by the time of the copies.
"""

import torch

from .quantize import StaysInRam


class BlockStream:
    """Brings one block after the other to ``device`` and puts the one before back. A context manager."""

    def __init__(self, blocks: torch.nn.ModuleList, device: torch.device):
        self.blocks, self.device = blocks, device
        self._kept: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._release()

    def before(self, index: int) -> None:
        """Put the current block back and fetch block ``index``."""
        self._release()
        for module in self.blocks[index].modules():
            if isinstance(module, StaysInRam):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device != self.device:
                    self._kept.append((module, name, parameter))
                    module._parameters[name] = torch.nn.Parameter(parameter.to(self.device), requires_grad=False)

    def _release(self) -> None:
        for module, name, parameter in self._kept:
            module._parameters[name] = parameter
        self._kept.clear()
