"""One recorded run: a stack of spans per thread, and the marks of their steps.

A span is a node of ComfyUI's graph or a stage that code entered; it knows its wall time and, on a CUDA
device, two events. Time is counted where it was spent: a span's own time excludes the spans inside it, so the
shares of one run add up. Spans of nodes are kept; those inside them become sums when they are over, since a batch that
runs all night has no end of them. Only one run is active in a process, as ComfyUI executes one prompt at a time.
"""

import contextlib
import datetime
import platform
import threading
import time
from collections import deque
from collections.abc import Iterator

import torch

from .memory import MemoryTrace
from .monitor import MIB, Monitor
from .spans import Mark, OwnTimes, Span, add_inner, device_ms, rounded, steps_of, wall_ms
from .table import STAGES, stage_of

MAX_MARKS = 2000  # of a span, and of the spans inside a node
MAX_LOOSE = 1000  # stages outside of any node that are listed

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
        self._nodes: dict[str, list[Span]] = {}  # in order of their first start
        self._loose: list[Span] = []
        self._stacks: dict[int, list[Span]] = {}
        self._own: dict[int, OwnTimes] = {}  # of spans that are over, by thread
        self._unread: deque[Span] = deque()  # those whose device times are not in it yet
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
            spans = self._nodes.get(node_id)
            if spans and spans[-1].end is None:
                self._mark(spans[-1].progress, value)

    def step(self) -> None:
        """A step of the innermost open span of this thread is done."""
        with self._lock:
            stack = self._stacks.get(threading.get_ident())
            if stack:
                steps = stack[-1].steps
                self._mark(steps, steps[-1].value + 1 if steps else 1)

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
            self._read_devices()
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
                "nodes": self._node_entries(end),
                "spans": [self._entry([span], end) for span in self._loose],
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
        root = stack[0] if stack else None
        span = Span(name, node_id, class_type, thread, time.perf_counter(), self._event(), parent, root)
        stack.append(span)
        if node_id is not None:
            self._nodes.setdefault(node_id, []).append(span)
        elif root is None and len(self._loose) < MAX_LOOSE:
            self._loose.append(span)
        return span

    def _close(self, span: Span) -> None:
        stack = self._stacks.get(span.thread, [])
        if span not in stack:
            return
        index = stack.index(span)
        now, event = time.perf_counter(), self._event()
        for ended in stack[index:]:
            ended.end, ended.end_event = now, event
            self._sum_up(ended)
        del stack[index:]
        self._read_devices()
        if span.is_node:
            span.peak = self._note_peak()

    def _mark(self, marks: list[Mark], value: float) -> None:
        if len(marks) == MAX_MARKS:
            if value < marks[-1].value:
                return
            marks.pop()  # the last one goes on, so that their number is right
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

    def _sum_up(self, span: Span) -> None:
        """A span is over: add it to the sums, from which a record is made."""
        ms = wall_ms(span, span.start)
        self._own.setdefault(span.thread, OwnTimes()).add_wall(span, ms)
        self._unread.append(span)
        if span.root is None:
            return
        add_inner(span.root.inner, span, ms)
        if span.steps and sum(len(one.steps) for one in span.root.announced) < MAX_MARKS:
            span.root.announced.append(span)
        else:
            span.root.steps_beyond += round(span.steps[-1].value) if span.steps else 0

    def _read_devices(self) -> None:
        """Add the device times that the device has reached, oldest first, without waiting for any."""
        while self._unread:
            span = self._unread[0]
            try:
                if self.device is not None and span.end_event is not None and not span.end_event.query():
                    return
                ms = None if self.device is None else device_ms(span)
            except RuntimeError:  # as in _event
                self.device = None
                continue
            self._unread.popleft()
            self._own[span.thread].add_device(span, ms)

    def _open_below(self, root: Span) -> list[Span]:
        stack = self._stacks.get(root.thread, [])
        return stack[1:] if stack[:1] == [root] else []

    def _stages(self, end: float, wall: float) -> dict:
        own = self._own.get(self._thread, OwnTimes()).copy()
        for span in self._stacks.get(self._thread, []):
            own.add_wall(span, wall_ms(span, end))
            own.add_device(span, None)
        for span in self._unread:
            if span.thread == self._thread:
                own.add_device(span, None)
        times = {name: (max(0.0, ms), own.device[name]) for name, ms in own.wall.items()}
        host = wall - sum(ms for ms, _ in times.values())
        times["host"] = (times.get("host", (0.0, None))[0] + max(host, 0.0), None)
        order = sorted(times, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
        return {
            name: {
                "ms": round(times[name][0], 1),
                "share": round(times[name][0] / wall, 4),
                "device_ms": rounded(times[name][1]),
            }
            for name in order
        }

    def _node_entries(self, end: float) -> list[dict]:
        nodes = [self._entry(spans, end) for spans in self._nodes.values()]
        for node_id, class_type in self._cached.items():
            if node_id in self._nodes:
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
        inner: dict[str, float] = {}
        announced = []
        for span in spans:
            for name, ms in span.inner.items():
                inner[name] = inner.get(name, 0.0) + ms
            below = self._open_below(span)
            for one in below:
                add_inner(inner, one, wall_ms(one, end))
            announced += [one for one in [span, *span.announced, *below] if one.steps]
        if inner:
            entry["inner"] = {name: max(0.0, round(ms, 1)) for name, ms in inner.items()}
        if announced:
            entry["steps"] = steps_of([(span, span.steps) for span in announced], "engine")
            entry["steps"]["count"] += sum(span.steps_beyond for span in spans)
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
