"""A plan's step, from recordings: what segments keep, take and cost, and what is alive call by call."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rowtune.cost.compose import Peak
from rowtune.cost.predict import composed, predict
from rowtune.cost.profile import Clock, Profile
from rowtune.cost.seen import RecordedStep
from rowtune.cost.state import Stateful, brought, state_bytes
from rowtune.errors import RowtuneError, UsageError
from rowtune.graph.graph import Graph
from rowtune.plan.file import PlanFile
from rowtune.plan.lower import lower
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.report.page import Curve, Held, Memory, Saving
from rowtune.report.savings import savings
from rowtune.runtime.recorder import record
from rowtune.runtime.recording import Recording
from rowtune.tune.device import resolve_device
from rowtune.tune.profiles import known
from rowtune.tune.step import prepare

POINTS = 400
"""Of a curve, at most."""
HELD = 10
"""Groups of tensors named at a peak."""
MOST_CALLS = 60_000
"""A step of more calls is drawn segment by segment: to record it takes longer than people wait."""


@dataclass(frozen=True)
class SegmentCost:
    """See page.Stretch."""

    share: float
    kept_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class StepCost:
    """`timed`: seconds are from calls that were timed on this device."""

    segments: tuple[SegmentCost, ...]
    memory: Memory
    timed: bool
    savings: tuple[Saving, ...] = ()
    host_bytes: int = 0


@dataclass(frozen=True)
class Unknown:
    """There is no StepCost, and why."""

    why: str


def step_cost(file: PlanFile) -> StepCost | Unknown:
    """Open the plan's model (which may run its code), and record a step of the plan and of plain PyTorch on
    tensors without data: the plan's device need not be here. Unknown where the model cannot be opened, or is
    not the plan's any more."""
    try:
        work = prepare(file.problem)
    except RowtuneError as error:
        return Unknown(f"no memory over the step: {error}")
    if work.graph.fingerprint != file.fingerprint:
        return Unknown(
            f"no memory over the step: the plan was made for a model with fingerprint {file.fingerprint}, "
            f"but {file.problem.model} now has {work.graph.fingerprint}"
        )
    graph, optimizer = work.graph, work.optimizer
    profile = _profile(work.problem.device)
    costs = segment_costs(graph, file.plan, optimizer, Clock(profile or Profile()))
    memory = Memory(curve(graph, file.plan, optimizer), curve(graph, uniform_plan(graph, "keep"), optimizer))
    taken_off, host = savings(graph, file.plan, optimizer), predict(graph, file.plan, optimizer).host_bytes
    return StepCost(costs, memory, profile is not None, taken_off, host)


def segment_costs(graph: Graph, plan: Plan, optimizer: Stateful, clock: Clock) -> tuple[SegmentCost, ...]:
    """One for each of the plan's segments, which runs as several where it stores what is at its barriers."""
    step, peak = composed(graph, plan, optimizer)
    places = {node.name: i for i, node in enumerate(graph.nodes)}
    starts = [places[s.first] for s in plan.segments]
    parts: list[list[int]] = [[] for _ in starts]
    for i, segment in enumerate(lower(graph, plan).segments):
        parts[bisect_right(starts, segment.part.start) - 1].append(i)
    sizes = _sizes(graph, plan)
    return tuple(_cost(size, part, step, peak, clock) for size, part in zip(sizes, parts, strict=True))


def _cost(share: float, part: Sequence[int], step: RecordedStep, peak: Peak, clock: Clock) -> SegmentCost:
    linked = [step.segments[i] for i in part]
    return SegmentCost(
        share=share,
        kept_bytes=max(sum(peak.forward[i].after - peak.forward[i].before for i in part), 0),
        peak_bytes=max((max(peak.forward[i].peak, peak.backward[i].peak) for i in part), default=0),
        seconds=sum(clock.seconds(s.policy, s.footprint.work, s.footprint.host) for s in linked),
    )


def _profile(device: str) -> Profile | None:
    """Of a device that was calibrated, and is here."""
    try:
        return known(resolve_device(device))
    except UsageError:
        return None


def _sizes(graph: Graph, plan: Plan) -> list[float]:
    """The share of all nodes' outputs that lies in each segment."""
    places = {node.name: i for i, node in enumerate(graph.nodes)}
    bytes_of = [graph.values[node.name].bytes for node in graph.nodes]
    total = sum(bytes_of) or 1
    return [sum(bytes_of[places[s.first] : places[s.last] + 1]) / total for s in plan.segments]


def curve(graph: Graph, plan: Plan, optimizer: Stateful) -> Curve:
    """Memory over one step of a plan, the optimizer's state included."""
    step, peak = composed(graph, plan, optimizer)
    if sum(linked.footprint.host for linked in step.segments) > MOST_CALLS:
        return _by_segment(peak, sum(linked.footprint.host for linked in step.segments))
    titles = [linked.title for linked in step.segments]
    away = plan.optimizer_state == "host"
    recording = record(lower(graph, plan), brought=brought(graph, optimizer, plan.optimizer_state))
    return _by_call(recording, titles, 0 if away else state_bytes(graph, optimizer))


def _by_call(recording: Recording, titles: list[str], state: int) -> Curve:
    live, calls = recording.live_bytes, recording.calls
    total = max(len(calls), 1)
    forward = sum(call.way == "forward" for call in calls)
    at = recording.peak_call
    call = calls[at]
    where = f"forward of {titles[call.segment]}" if call.way == "forward" else "backward"
    held = [*_held(recording, at), *([Held("optimizer's state", "state", 1, state)] if state else [])]
    return Curve(
        detail="calls",
        calls=len(calls),
        points=_thinned([b + state for b in live]),
        backward_at=forward / total,
        peak_bytes=recording.peak_bytes + state,
        peak_at=(at + 0.5) / total,
        where=where,
        held=tuple(sorted(held, key=lambda h: -h.bytes)[:HELD]),
    )


def _by_segment(peak: Peak, calls: int) -> Curve:
    marks = [*peak.forward, *reversed(peak.backward)]
    live = [b for mark in marks for b in (mark.before, mark.peak, mark.after)]
    at = live.index(max(live))
    points = tuple(((i + 0.5) / len(live), b) for i, b in enumerate(live))
    return Curve("segments", calls, points, 0.5, peak.total, points[at][0], peak.at, ())


def _thinned(live: list[int]) -> tuple[tuple[float, int], ...]:
    """Where there are more calls than points, the most of each group of neighbours."""
    group = -(-len(live) // POINTS)
    return tuple(
        (round((i + min(i + group, len(live))) / 2 / len(live), 5), max(live[i : i + group]))
        for i in range(0, len(live), group)
    )


def _held(recording: Recording, at: int) -> list[Held]:
    """What is alive at the end of a call: the model's own tensors by role, others by name and shape."""
    shapes: dict[int, str] = {}
    for view in recording.views:
        shapes.setdefault(view.buffer, "x".join(map(str, view.shape)))
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for number, b in enumerate(recording.buffers):
        if b.born > at or (b.died is not None and b.died < at):
            continue
        whole = {"parameter": "parameters", "gradient": "gradients of parameters", "buffer": "buffers"}
        key = (whole.get(b.role) or f"{b.name} {shapes.get(number, '')}".strip(), b.role)
        sizes[key] += b.bytes
        counts[key] += 1
    return [Held(name, role, counts[name, role], size) for (name, role), size in sizes.items()]
