"""Memory over the time of a run: a point at every boundary of a node or step, few enough to be logged."""

import psutil
import torch

from .monitor import MIB

MAX_POINTS = 160


class MemoryTrace:
    """Allocated memory of the device (null without one) and of this process; looking never waits for the device.

    When `MAX_POINTS` are reached every other one is dropped, and from then on every other look is passed over.
    """

    def __init__(self, device: torch.device | None):
        self._device = device
        self._process = psutil.Process()
        self._points: list[tuple[float, float | None, float]] = []
        self._every = 1
        self._looks = 0

    def look(self, at_ms: float) -> None:
        self._looks += 1
        if self._looks % self._every:
            return
        on_device = None if self._device is None else torch.cuda.memory_allocated(self._device) / MIB
        self._points.append((at_ms, on_device, self._process.memory_info().rss / MIB))
        if len(self._points) >= MAX_POINTS:
            self._points = self._points[::2]
            self._every *= 2

    def record(self) -> dict:
        """{at_ms, device_mib, rss_mib}: lists of one length; device_mib is null without a CUDA device."""
        return {
            "at_ms": [round(at, 1) for at, _, _ in self._points],
            "device_mib": None if self._device is None else [round(used or 0.0, 1) for _, used, _ in self._points],
            "rss_mib": [round(used, 1) for _, _, used in self._points],
        }
