"""Spans of time, the marks inside them, and the durations that follow from both."""

from dataclasses import dataclass, field

import torch

MAX_STEPS_LISTED = 200


@dataclass
class Mark:
    """The end of a step, or of several when a progress bar skipped some."""

    value: float
    time: float
    event: torch.cuda.Event | None


@dataclass(eq=False)
class Span:
    name: str
    node_id: str | None
    class_type: str | None
    thread: int
    start: float
    start_event: torch.cuda.Event | None
    parent: "Span | None" = None
    end: float | None = None
    end_event: torch.cuda.Event | None = None
    peak: int | None = None
    steps: list[Mark] = field(default_factory=list)
    progress: list[Mark] = field(default_factory=list)

    @property
    def is_node(self) -> bool:
        return self.class_type is not None


def is_inside(span: Span, outer: list[Span]) -> bool:
    parent = span.parent
    while parent is not None:
        if parent in outer:
            return True
        parent = parent.parent
    return False


def wall_ms(span: Span, end: float) -> float:
    return max(((end if span.end is None else span.end) - span.start) * 1000, 0.0)


def device_ms(span: Span) -> float | None:
    return between(span.start_event, span.end_event)


def between(start: torch.cuda.Event | None, end: torch.cuda.Event | None) -> float | None:
    if start is None or end is None or not (start.query() and end.query()):
        return None
    return start.elapsed_time(end)


def steps_of(series: list[tuple[Span, list[Mark]]], source: str) -> dict:
    """Durations between marks. A bar that jumps n steps gives n equal ones; a restarted bar starts anew."""
    count, first, wall, device = 0, None, [], []
    for span, marks in series:
        last = None
        for mark in marks:
            steps = round(mark.value - (last.value if last is not None else 0))
            if steps <= 0:
                last = mark
                continue
            count += steps
            since, event = (span.start, span.start_event) if last is None else (last.time, last.event)
            elapsed = (mark.time - since) * 1000
            on_device = between(event, mark.event)
            if first is None:
                first = elapsed
            elif last is not None or source == "engine":
                wall += [elapsed / steps] * steps
                device += [on_device / steps] * steps if on_device is not None else []
            last = mark
    return {
        "count": count,
        "source": source,
        "first_ms": rounded(first),
        "ms": [round(value, 2) for value in wall[:MAX_STEPS_LISTED]],
        "device_ms": [round(value, 2) for value in device[:MAX_STEPS_LISTED]],
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
