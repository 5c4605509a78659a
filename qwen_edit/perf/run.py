"""One recorded run: a stack of spans per thread, and the marks of their steps.

A span is a node of ComfyUI's graph or a stage that code entered; it knows its wall time and, on a CUDA
device, two events. Time is counted where it was spent: a span's own time excludes the spans inside it, so the
shares of one run add up. Only one run is active in a process, as ComfyUI executes one prompt at a time.
"""

import contextlib
import datetime
import platform
import threading
import time
from collections.abc import Iterator

import torch

from .memory import MemoryTrace
from .monitor import MIB, Monitor
from .spans import Mark, Span, device_ms, is_inside, rounded, steps_of, wall_ms
from .table import STAGES, stage_of

MAX_MARKS = 2000
MAX_SPANS = 5000

_active: "Run | None" = None
_nothing = contextlib.nullcontext()


class Run:
    """Collects one run and makes its record. Every method may be called from any thread.

    `device` is where the work happens; events and peak memory need a CUDA device whose context already
    exists.
    """

    def __init__(self, device: torch.device | None = None, run_id: str | None = None):
        cuda = device is not None and device.type == "cuda" and torch.cuda.is_initialized()
        self.device = device if cuda else None
        self.run_id = run_id
        self.monitor = Monitor(device)
        self.models_loaded: list[str] = []
        self.taps: list[dict] = []
        self.text: dict[str, str] | None = None
        self.facts: dict[str, str | float | bool] = {}
        self.graph: str | None = None
        self.started_at = time.time()
        self._start = time.perf_counter()
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._spans: list[Span] = []
        self._stacks: dict[int, list[Span]] = {}
        self._children: dict[int, list[Span]] = {}
        self._cached: dict[str, str] = {}
        self._latest: dict[int, torch.cuda.Event] = {}
        self._peak = 0
        self._memory = MemoryTrace(self.device)
        self._look()
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)

    # what happens

    def node_started(self, node_id: str, class_type: str) -> None:
        """A node begins on this thread; one that is still open steps aside for it and may come back."""
        with self._lock:
            self._thread = threading.get_ident()
            for span in self._stacks.get(self._thread, [])[:1]:
                self._close(span)
            if self.device is not None:
                torch.cuda.reset_peak_memory_stats(self.device)
            self._open(stage_of(class_type), node_id, class_type)
            self._look()

    def node_finished(self, node_id: str) -> None:
        """A node is done; one that never started on this thread is passed over."""
        with self._lock:
            for span in self._stacks.get(threading.get_ident(), [])[:1]:
                if span.node_id == node_id:
                    self._close(span)
                    self._look()

    def node_cached(self, node_id: str, class_type: str) -> None:
        """The result of a node was there already; it counts unless the node ran after all."""
        with self._lock:
            self._cached[node_id] = class_type

    def progress(self, node_id: str, value: float) -> None:
        """The progress bar of a node stands at `value` steps."""
        with self._lock:
            for span in reversed(self._spans):
                if span.node_id == node_id and span.is_node:
                    if span.end is None:
                        self._mark(span.progress, value)
                    return

    def step(self) -> None:
        """A step of the innermost open span of this thread is done."""
        with self._lock:
            stack = self._stacks.get(threading.get_ident())
            if stack:
                self._mark(stack[-1].steps, len(stack[-1].steps) + 1)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time spent inside counts for the stage `name`."""
        with self._lock:
            span = self._open(name, None, None)
        try:
            yield
        finally:
            with self._lock:
                self._close(span)

    def tap(self, label: str, node_id: str | None) -> None:
        """A logger node was passed."""
        at = round((time.perf_counter() - self._start) * 1000, 1)
        with self._lock:
            self.taps.append({"label": label, "node_id": node_id, "at_ms": at})

    # what it came to

    def record(
        self,
        status: str = "success",
        total_ms: float | None = None,
        error: dict | None = None,
        wait: bool = True,
    ) -> dict:
        """The record as `qwen_edit.perf` documents it; open spans count up to now, or to `total_ms`.

        With `wait`, waits for the device as far as the recorded events need it; without, times that the
        device has not reached yet are null.
        """
        with self._lock:
            end = time.perf_counter() if total_ms is None else self._start + total_ms / 1000
            wall = max((end - self._start) * 1000, 1e-3)
            if wait:
                for event in self._latest.values():
                    event.synchronize()
            self.monitor.sample()
            self._note_peak()
            self._children = {}
            for span in self._spans:
                if span.parent is not None:
                    self._children.setdefault(id(span.parent), []).append(span)
            result = {
                "format": 2,
                "time": datetime.datetime.fromtimestamp(self.started_at, datetime.UTC).isoformat(
                    timespec="milliseconds"
                ),
                "prompt_id": self.run_id,
                "status": status,
                "wall_ms": round(wall, 1),
                "cold": bool(self.models_loaded),
                "models_loaded": self.models_loaded,
                "stages": self._stages(end, wall),
                "nodes": self._nodes(end),
                "spans": [self._entry([span], end) for span in self._spans if self._is_loose(span)],
                "taps": self.taps,
                "memory": self._memory.record(),
                "device": self.monitor.device(),
                "process": self.monitor.process(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
            }
            if self.device is not None:
                result["device"]["peak_mib"] = round(self._peak / MIB, 1)
            if self.graph is not None:
                result["graph"] = self.graph
            if self.facts:
                result["facts"] = dict(self.facts)
            if error is not None:
                result["error"] = error
            if self.text is not None:
                result["text"] = self.text
            return result

    def _open(self, name: str, node_id: str | None, class_type: str | None) -> Span:
        thread = threading.get_ident()
        stack = self._stacks.setdefault(thread, [])
        parent = stack[-1] if stack else None
        span = Span(name, node_id, class_type, thread, time.perf_counter(), self._event(), parent)
        stack.append(span)
        if len(self._spans) < MAX_SPANS:
            self._spans.append(span)
        return span

    def _close(self, span: Span) -> None:
        stack = self._stacks.get(span.thread, [])
        if span not in stack:
            return
        index = stack.index(span)
        now, event = time.perf_counter(), self._event()
        for ended in stack[index:]:
            ended.end, ended.end_event = now, event
        del stack[index:]
        if span.is_node:
            span.peak = self._note_peak()

    def _mark(self, marks: list[Mark], value: float) -> None:
        if len(marks) < MAX_MARKS:
            marks.append(Mark(value, time.perf_counter(), self._event()))
            self._look()

    def _look(self) -> None:
        self._memory.look((time.perf_counter() - self._start) * 1000)

    def _event(self) -> torch.cuda.Event | None:
        if self.device is None:
            return None
        try:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        except RuntimeError:  # the device has failed; the code being measured reports that better than this
            self.device = None
            return None
        self._latest[threading.get_ident()] = event
        return event

    def _note_peak(self) -> int | None:
        if self.device is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, peak)
        return peak

    def _is_loose(self, span: Span) -> bool:
        return not span.is_node and (span.parent is None or span.thread != self._thread)

    def _own(self, span: Span, end: float) -> tuple[float, float | None]:
        """(wall ms, device ms) spent in a span and not in the spans inside it."""
        inner = self._children.get(id(span), [])
        wall = wall_ms(span, end) - sum(wall_ms(child, end) for child in inner)
        device = device_ms(span)
        for child in inner:
            below = device_ms(child)
            device = None if device is None or below is None else device - below
        return max(wall, 0.0), device

    def _stages(self, end: float, wall: float) -> dict:
        times: dict[str, list] = {}
        for span in self._spans:
            if span.thread != self._thread:
                continue
            own, device = self._own(span, end)
            entry = times.setdefault(span.name, [0.0, 0.0])
            entry[0] += own
            entry[1] = None if entry[1] is None or device is None else entry[1] + device
        host = wall - sum(entry[0] for entry in times.values())
        times["host"] = [times.get("host", [0.0])[0] + max(host, 0.0), None]
        order = sorted(times, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
        return {
            name: {
                "ms": round(times[name][0], 1),
                "share": round(times[name][0] / wall, 4),
                "device_ms": rounded(times[name][1]),
            }
            for name in order
        }

    def _nodes(self, end: float) -> list[dict]:
        by_node: dict[str, list[Span]] = {}
        for span in self._spans:
            if span.is_node:
                by_node.setdefault(str(span.node_id), []).append(span)
        nodes = [self._entry(spans, end) for spans in by_node.values()]
        for node_id, class_type in self._cached.items():
            if node_id in by_node:
                continue
            nodes.append(
                {
                    "id": node_id,
                    "class_type": class_type,
                    "stage": stage_of(class_type),
                    "ms": 0.0,
                    "cached": True,
                }
            )
        return nodes

    def _entry(self, spans: list[Span], end: float) -> dict:
        """One node (which may have run in several pieces) or one loose stage."""
        first = spans[0]
        devices = [device_ms(span) for span in spans]
        known = [value for value in devices if value is not None]
        entry = {
            "id": first.node_id,
            "class_type": first.class_type,
            "stage": first.name,
            "at_ms": round((first.start - self._start) * 1000, 1),
            "ms": round(sum(wall_ms(span, end) for span in spans), 1),
            "device_ms": round(sum(known), 1) if len(known) == len(devices) else None,
            "cached": False,
        }
        peaks = [span.peak for span in spans if span.peak is not None]
        if peaks:
            entry["peak_mib"] = round(max(peaks) / MIB, 1)
        below = [span for span in self._spans if is_inside(span, spans)]
        inner: dict[str, float] = {}
        for span in below:
            inner[span.name] = round(inner.get(span.name, 0.0) + self._own(span, end)[0], 1)
        if inner:
            entry["inner"] = inner
        announced = [span for span in [*spans, *below] if span.steps]
        if announced:
            entry["steps"] = steps_of([(span, span.steps) for span in announced], "engine")
        elif any(span.progress for span in spans):
            entry["steps"] = steps_of([(span, span.progress) for span in spans], "progress")
        return entry


# The one active run. Reading and replacing a reference is atomic; Run locks itself.


def activate(run: Run) -> None:
    """Send the stages and steps of this process to `run` from now on."""
    global _active
    _active = run


def deactivate(run: Run) -> None:
    """Stop recording into `run`; nothing happens if another has taken its place."""
    global _active
    if _active is run:
        _active = None


def active_run() -> Run | None:
    """The run that is being recorded, if any."""
    return _active


def stage(name: str):
    """Context manager: what happens inside counts for the stage `name` (see `STAGES`) of the active run."""
    run = _active
    return _nothing if run is None else run.stage(name)


def record_step() -> None:
    """A step of the stage this thread is in is done: call it after every denoising step."""
    run = _active
    if run is not None:
        run.step()


def record_facts(**facts: str | float | bool) -> None:
    """What the work that is being measured is made of: steps, guidance, attention … See the record's `facts`."""
    run = _active
    if run is not None:
        run.facts.update(facts)


@contextlib.contextmanager
def recording(device: torch.device | None = None) -> Iterator[Run]:
    """Record what happens inside, for plain Python: `with recording(device) as run: …; run.record()`."""
    run = Run(device)
    activate(run)
    try:
        yield run
    finally:
        deactivate(run)
