"""How a run of a manifest stands and ended, in numbers, in words and as a bar."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from comfy_host import REPO

sys.path.insert(0, str(REPO))
from qwen_edit.manifest import Refused


@dataclass
class Summary:
    """How a run ended. Times in seconds."""

    items: int
    written: int = 0
    already_there: int = 0
    failed: list[Refused] = field(default_factory=list)
    seconds: float = 0.0
    outages: int = 0

    @property
    def left(self) -> int:
        return self.items - self.written - self.already_there - len(self.failed)

    def text(self) -> str:
        parts = (
            f"{self.items} items: {self.written} written, {self.already_there} already there, {len(self.failed)} failed"
        )
        parts += f", {self.left} left" if self.left else ""
        pace = f" ({60 * self.written / self.seconds:.1f} a minute)" if self.written else ""
        away = f"; the server was away {self.outages} times" if self.outages else ""
        return f"{parts}, in {duration(self.seconds)}{pace}{away}."


def duration(seconds: float) -> str:
    """Such as "42 s", "3 min 5 s", "2 h 10 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class BatchBar:
    """One progress bar for a whole run, on a terminal one line that changes, elsewhere a line now and then."""

    WIDTH, EVERY_S = 30, 30.0

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._begin = time.monotonic()
        self._last = 0.0

    def show(self, summary: Summary, final: bool) -> None:
        now = time.monotonic()
        if not (self._live or final or now - self._last >= self.EVERY_S):
            return
        self._last = now
        line = self.line(summary, now - self._begin)
        if self._live:
            print(f"\r{line:<100}", end="\n" if final else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def line(self, summary: Summary, seconds: float) -> str:
        done = summary.items - summary.left
        bar = "#" * (self.WIDTH * done // max(summary.items, 1))
        parts = [f"[{bar:.<{self.WIDTH}}] {done}/{summary.items}"]
        if summary.written:
            pace = summary.written / seconds
            parts += [f"{60 * pace:.1f} a minute", f"{duration(summary.left / pace)} left"]
        if summary.failed:
            parts.append(f"{len(summary.failed)} failed")
        if summary.outages:
            parts.append(f"server away {summary.outages} times")
        return ", ".join(parts)
