"""Where the time of profiled steps went, from the events of a Chrome trace: shares that add up to 100 %.

In: the events of a trace that `msm_dist.profiling` recorded (or of any other with its ranges). Out: a `Summary`, and
the screen that shows it. With events of a GPU in the trace the clock is that of the device: an instant belongs to the
kernel that runs, or is idle. Without, it is the wall time of the thread that trains: an instant belongs to the
innermost op there (self time). Either way no instant counts twice and none is left over. ValueError for a trace
without a step.

An op is told by its name or by that of the nearest named op around it; a kernel by the op that launched it, or else
by its own name.
"""

import gzip
import json
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

PART = "msm_dist::"
"""Begins the name of a range that the training loop sets."""
STEP = "ProfilerStep#"
"""Begins the name of a step's range, as TensorBoard's plugin knows it."""
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")

ATTENTION, PRODUCTS, NORMALISATION = "attention", "matrix products", "normalisation"
OPTIMISER, COMMUNICATION = "optimiser", "communication"
WAITING, LOG_MEL, REST, IDLE = "waiting for data", "log-mel", "the rest", "idle"
OUTSIDE = "outside"
CLASSES = (ATTENTION, PRODUCTS, NORMALISATION, OPTIMISER, COMMUNICATION, WAITING, LOG_MEL, REST)

NAMES = (
    (COMMUNICATION, r"^c10d::|^gloo:|^nccl|^record_param_comms"),
    (
        ATTENTION,
        r"^msm_kernels::attention|^aten::(bmm|baddbmm|_?softmax(_backward_data)?)$|^aten::_?(scaled_dot_product|flash|"
        r"efficient)|^(Bmm|Softmax|ScaledDotProduct\w*)Backward|^(short|tiled)_(forward|backward)|fmha|flash",
    ),
    (
        PRODUCTS,
        r"^aten::(mm|addmm|_addmm_activation|linear|mkldnn_linear|matmul)$|^(Mm|Addmm|Linear|MkldnnLinear)Backward|"
        r"^LinearFunctionForZeroStage3|gemv|splitKreduce|^mkl(dnn)?::_|^msm_kernels::embed_visible_patches|gemm|nvjet|cutlass|^embed_(forward|backward)_kernel",
    ),
    (NORMALISATION, r"layer_norm|^NativeLayerNormBackward"),
    (OPTIMISER, r"^Optimizer\.step#"),
)
"""Classes by the names of ops, autograd's nodes and kernels; the first that matches holds."""
PARTS = {"data": WAITING, "log-mel": LOG_MEL, "outside": OUTSIDE}
"""Parts of the loop that are a class whatever runs in them."""
OP = re.compile(r"^(aten|c10d|msm_kernels|mkl|mkldnn)::")
"""Ops that keep the thread busy until they return; anything else may be waiting inside."""

Event = dict[str, Any]
Interval = tuple[float, float, str]


@dataclass(frozen=True)
class Summary:
    """Where the time of some steps went."""

    clock: Literal["device", "host"]
    first_step: int
    last_step: int
    seconds: float
    """Wall time of the steps, without validation, pictures and checkpoints."""
    outside_seconds: float
    """Those, between the first and the last step."""
    shares: dict[str, float]
    """Class to its share of `seconds`; adds up to 1."""
    idle: dict[str, float]
    """On the device's clock the part of the loop the host was in while nothing ran; adds up to the share of idle."""


@dataclass
class Span:
    """An event of one thread with its place among the others."""

    name: str
    start: float
    end: float
    event_id: int | None
    is_op: bool
    parent: "Span | None" = None
    own: str | None = None
    """The class that its name says."""
    part: str = ""
    """The part of the loop that it lies in."""
    children: "list[Span]" = field(default_factory=list)

    @property
    def kind(self) -> str | None:
        """Its class; none where neither it nor anything around it says one."""
        if self.part in PARTS:
            return PARTS[self.part]
        span: Span | None = self
        while span is not None:
            if span.own:
                return span.own
            span = span.parent
        return OPTIMISER if self.part == "update" else None


def read_trace(path: Path) -> list[Event]:
    """The events of a gzipped trace file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def summarize(events: Sequence[Event], steps: range) -> Summary:
    """The shares of `steps`, which the trace must hold."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    marks = {
        int(event["name"].removeprefix(STEP)): event
        for event in complete
        if event["name"].startswith(STEP) and event.get("cat") == "user_annotation"
    }
    marks = {number: mark for number, mark in marks.items() if number in steps}
    if not marks:
        raise ValueError(f"the trace holds none of the steps {steps.start} to {steps.stop - 1}")
    windows = [(mark["ts"], mark["ts"] + mark["dur"]) for _, mark in sorted(marks.items())]
    host = next(iter(marks.values()))["tid"]
    threads = _threads(complete)
    kernels = [event for event in complete if event.get("cat") in DEVICE_CATEGORIES]
    times = _device_times(kernels, threads, host, windows) if kernels else _host_times(complete, threads[host], windows)
    outside = times.pop(OUTSIDE, 0.0)
    total = sum(times.values())
    idle = {name.removeprefix(IDLE_IN): time / total for name, time in times.items() if name.startswith(IDLE_IN)}
    shares = {name: times.get(name, 0.0) / total for name in CLASSES} | ({IDLE: sum(idle.values())} if kernels else {})
    clock = "device" if kernels else "host"
    return Summary(clock, min(marks), max(marks), total / 1e6, outside / 1e6, shares, idle)


def report(summary: Summary) -> str:
    """One screen of text."""
    count = summary.last_step - summary.first_step + 1
    clock = {
        "device": "device time of rank 0: the kernel that runs, or idle; communication beside other kernels is theirs",
        "host": "wall time of rank 0's training thread: the innermost op, no GPU in the trace",
    }[summary.clock]
    lines = [
        f"profile    steps {summary.first_step} to {summary.last_step}: {summary.seconds / count * 1e3:.1f} ms a step",
        f"clock      {clock}",
    ]
    if summary.outside_seconds >= 0.005:
        lines.append(f"left out   {summary.outside_seconds:.2f} s of validation, pictures and checkpoints")
    lines += [f"  {name:<18}{share:7.1%}" for name, share in summary.shares.items()]
    lines += [f"    host in {name:<12}{share:5.1%}" for name, share in summary.idle.items()]
    return "\n".join([*lines, f"  {'sum':<18}{sum(summary.shares.values()):7.1%}", ""])


IDLE_IN = "idle in "


def _device_times(
    kernels: Sequence[Event], threads: Mapping[int, list[Span]], host: int, windows: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Microseconds of each class on the device, and of idleness by what the host was at."""
    launched_by = {span.event_id: span for spans in threads.values() for span in spans if span.event_id}
    intervals = []
    for kernel in kernels:
        span = launched_by.get(kernel.get("args", {}).get("External id"))
        kind = (span.kind if span else None) or _named(kernel["name"]) or REST
        intervals.append((kernel["ts"], kernel["ts"] + kernel["dur"], kind))
    for span in threads[host]:
        if span.name.startswith(PART):
            intervals.append((span.start, span.end, "host:" + span.part))
    order = [kind for kind in CLASSES if kind != COMMUNICATION] + [COMMUNICATION, OUTSIDE]
    order += ["host:" + name for name in ("data", "outside", "log-mel", "forward", "backward", "update")]
    times: dict[str, float] = {}
    for name, time in _sweep(intervals, order, windows).items():
        if name.startswith("host:") or not name:
            at = name.removeprefix("host:") or "between"
            name = {"data": WAITING, "outside": OUTSIDE}.get(at, IDLE_IN + at)
        times[name] = times.get(name, 0.0) + time
    return times


def _host_times(
    complete: Iterable[Event], spans: Sequence[Span], windows: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Microseconds of each class on the training thread.

    gloo works in threads of its own: where one is at it and the training thread in no op, it waits for that one.
    """
    intervals = [
        (event["ts"], event["ts"] + event["dur"], COMMUNICATION)
        for event in complete
        if event["name"].startswith("gloo:")
    ]
    for span in spans:
        kind = span.kind or REST
        busy = span.is_op or span.part in PARTS
        intervals += [(start, end, kind if busy else "gap:" + kind) for start, end in _self_time(span)]
    order = [WAITING, LOG_MEL, OUTSIDE, ATTENTION, PRODUCTS, NORMALISATION, OPTIMISER, REST, COMMUNICATION]
    order += ["gap:" + kind for kind in CLASSES]
    times: dict[str, float] = {}
    for name, time in _sweep(intervals, order, windows).items():
        name = name.removeprefix("gap:") or REST
        times[name] = times.get(name, 0.0) + time
    return times


def _threads(complete: Iterable[Event]) -> dict[int, list[Span]]:
    """The host's events of each thread as trees, in order of their start."""
    events: dict[int, list[Event]] = defaultdict(list)
    for event in complete:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            events[event["tid"]].append(event)
    return {thread: _tree(of_thread) for thread, of_thread in events.items()}


def _tree(events: list[Event]) -> list[Span]:
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    products_of_attention = [event["ts"] for event in events if event["name"] == "aten::bmm"]
    spans: list[Span] = []
    open_spans: list[Span] = []
    for event in events:
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_spans and open_spans[-1].end <= start:
            open_spans.pop()
        parent = open_spans[-1] if open_spans else None
        span = Span(
            event["name"], start, end, event.get("args", {}).get("External id"), bool(OP.match(event["name"])), parent
        )
        span.own = _named(span.name)
        if span.name == "aten::matmul":
            # It copies and folds its operands for the product inside it, which says whose it is.
            nearest = bisect_left(products_of_attention, start)
            if nearest < len(products_of_attention) and products_of_attention[nearest] < end:
                span.own = ATTENTION
        if span.name.startswith(PART):
            span.part = span.name.removeprefix(PART)
        elif parent is not None:
            span.part = parent.part
        if parent is not None:
            parent.children.append(span)
        spans.append(span)
        open_spans.append(span)
    return spans


def _self_time(span: Span) -> Iterator[tuple[float, float]]:
    """The pieces of a span in which none of its children runs."""
    at = span.start
    for child in span.children:
        if child.start > at:
            yield at, child.start
        at = child.end
    if at < span.end:
        yield at, span.end


@cache
def _named(name: str) -> str | None:
    name = name.removeprefix("autograd::engine::evaluate_function: ")
    return next((kind for kind, pattern in NAMES if re.search(pattern, name)), None)


def _sweep(
    intervals: Iterable[Interval], order: Sequence[str], windows: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Time in `windows` by name; where several intervals overlap the first in `order` holds, where none does, ""."""
    rank = {name: place for place, name in enumerate(order)}
    edges = [(start, 1, rank[name]) for start, _, name in intervals]
    edges += [(end, -1, rank[name]) for _, end, name in intervals]
    for start, end in windows:
        edges += [(start, 1, -1), (end, -1, -1)]
    edges.sort()
    active: Counter[int] = Counter()
    times: dict[str, float] = defaultdict(float)
    before = 0.0
    for at, change, place in edges:
        if active[-1] and at > before:
            running = next((i for i in range(len(order)) if active[i]), None)
            times["" if running is None else order[running]] += at - before
        before = at
        active[place] += change
    return dict(times)
