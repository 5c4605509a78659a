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
    root: "Span | None" = None  # the outermost span around it; None: it is that itself
    end: float | None = None
    end_event: torch.cuda.Event | None = None
    peak: int | None = None
    steps: list[Mark] = field(default_factory=list)
    progress: list[Mark] = field(default_factory=list)
    # Of what is over inside a root:
    inner: dict[str, float] = field(default_factory=dict)  # own wall time by stage, ms
    announced: list["Span"] = field(default_factory=list)  # spans with steps, as far as their steps can be listed
    steps_beyond: int = 0  # the number of the others' steps

    @property
    def is_node(self) -> bool:
        return self.class_type is not None


@dataclass
class OwnTimes:
    """ms by stage, counted where they were spent: a span's time counts for its stage, and no more for the one around it.

    Sums instead of spans, so that a run of any length takes the same memory.
    """

    wall: dict[str, float] = field(default_factory=dict)
    device: dict[str, float | None] = field(default_factory=dict)  # None: not all of it is known

    def copy(self) -> "OwnTimes":
        return OwnTimes(dict(self.wall), dict(self.device))

    def add_wall(self, span: Span, ms: float) -> None:
        _add(self.wall, span.name, ms)
        if span.parent is not None:
            _add(self.wall, span.parent.name, -ms)

    def add_device(self, span: Span, ms: float | None) -> None:
        for name, part in ((span.name, 1), *(((span.parent.name, -1),) if span.parent else ())):
            before = self.device.get(name, 0.0)
            self.device[name] = None if ms is None or before is None else before + part * ms


def add_inner(inner: dict[str, float], span: Span, ms: float) -> None:
    """Count ms of a span inside a root."""
    assert span.parent is not None
    _add(inner, span.name, ms)
    if span.parent is not span.root:
        _add(inner, span.parent.name, -ms)


def _add(sums: dict[str, float], name: str, ms: float) -> None:
    sums[name] = sums.get(name, 0.0) + ms


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
