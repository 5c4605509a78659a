"""Weights that are read from their file each time they are used: those of the modulation, once for a schedule.

They are a third of the model, 12.7 GiB in bf16. As the parameters of their modules they are the file's own pages, which
the system keeps in RAM for as long as nobody else needs it, so they take no memory of this process. Copying pages that are
only mapped is slow; reading the file in large parts by several threads is as fast as the bus (see ``reading.py``).
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .host_memory import Lock, page_lock
from .linear import Resident, runs_itself
from .quantize import raw_data
from .reading import Stored, read_ahead


@dataclass(frozen=True)
class _Place:
    """Where a module's weight lies in its file, and at which address in memory; ``file`` is what it was then."""

    stored: Stored
    address: int
    file: tuple[int, ...]


class FileWeights(Resident):
    """Reads the weights that were added ahead from their file, all others where they lie."""

    def __init__(self, lock: Lock = page_lock) -> None:
        """
        Args:
            lock: see ``read_ahead``.
        """
        self._lock = lock
        self._places: weakref.WeakKeyDictionary[nn.Linear, _Place] = weakref.WeakKeyDictionary()
        self._arriving: Iterator[tuple[nn.Linear, torch.Tensor]] = iter(())
        self._ahead: dict[nn.Linear, Stored] = {}

    def add(self, module: nn.Linear, weight: torch.Tensor, raw: torch.Tensor, stored: Stored) -> None:
        """``weight`` is to be the module's; it is read from the file from then on if it still is ``raw``, the file's page."""
        data = raw_data(weight)
        if data.data_ptr() == raw.data_ptr() and data.nbytes == stored.nbytes and data.is_contiguous():
            self._places[module] = _Place(stored, raw.data_ptr(), _identity(stored))

    def forget(self, module: nn.Linear) -> None:
        """From now on the module's weight is read where it lies: somebody writes into it."""
        self._places.pop(module, None)

    @contextmanager
    def ahead(self, modules: Sequence[nn.Module], like: torch.Tensor) -> Iterator[None]:
        self._dtype = like.dtype
        self._ahead = {m: place.stored for m in modules if (place := self._place(m)) is not None}
        with closing(read_ahead(self._ahead, like.device, self._lock)) as self._arriving:
            try:
                yield
            finally:
                self._ahead, self._arriving = {}, iter(())

    def read(self, module: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if module not in self._ahead:
            return super().read(module)
        arrived, data = next(self._arriving)
        assert arrived is module, "weights are to be read in the order that was announced"
        return module.floats(data.view(raw_data(module.weight).shape), self._dtype), module.bias.to(data.device)

    def _place(self, module: Any) -> _Place | None:
        """None: somebody has given it another weight or forward, or the file is not what it was."""
        place = self._places.get(module)
        if place is None or runs_itself(module) or raw_data(module.weight).data_ptr() != place.address:
            return None
        try:
            return place if _identity(place.stored) == place.file else None
        except OSError:  # it is gone, and its pages stay for as long as they are mapped
            return None


def _identity(stored: Stored) -> tuple[int, ...]:
    found = os.stat(stored.path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
