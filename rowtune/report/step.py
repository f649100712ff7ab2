"""A plan's step, from recordings: what segments keep, take and cost, and what is alive call by call."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from rowtune.cost.compose import Peak
from rowtune.cost.predict import composed
from rowtune.cost.profile import Clock, Profile
from rowtune.cost.state import state_bytes
from rowtune.errors import RowtuneError
from rowtune.graph.graph import Graph
from rowtune.plan.file import PlanFile
from rowtune.plan.lower import lower
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.report.page import Curve, Held, Memory
from rowtune.runtime.recorder import record
from rowtune.runtime.recording import Recording
from rowtune.train.opened import open_plan
from rowtune.tune.profiles import known

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


@dataclass(frozen=True)
class Unknown:
    """There is no StepCost, and why."""

    why: str


def step_cost(file: PlanFile) -> StepCost | Unknown:
    """Open the plan's model (which may run its code), and record a step of the plan and of plain PyTorch on
    tensors without data. Unknown where the model cannot be opened here, or is not the plan's any more."""
    try:
        work, _ = open_plan(file)
    except RowtuneError as error:
        return Unknown(f"no memory over the step: {error}")
    graph, slots = work.graph, work.optimizer.slots
    profile = known(work.problem.device)
    step, peak = composed(graph, file.plan, slots)
    clock = Clock(profile or Profile())
    sizes = _sizes(graph, file.plan)
    costs = tuple(
        SegmentCost(
            share=size,
            kept_bytes=max(ahead.after - ahead.before, 0),
            peak_bytes=max(ahead.peak, back.peak),
            seconds=clock.seconds(linked.policy, linked.footprint.work, linked.footprint.host),
        )
        for size, ahead, back, linked in zip(sizes, peak.forward, peak.backward, step.segments, strict=True)
    )
    memory = Memory(curve(graph, file.plan, slots), curve(graph, uniform_plan(graph, "keep"), slots))
    return StepCost(costs, memory, profile is not None)


def _sizes(graph: Graph, plan: Plan) -> list[float]:
    """The share of all nodes' outputs that lies in each segment."""
    places = {node.name: i for i, node in enumerate(graph.nodes)}
    bytes_of = [graph.values[node.name].bytes for node in graph.nodes]
    total = sum(bytes_of) or 1
    return [sum(bytes_of[places[s.first] : places[s.last] + 1]) / total for s in plan.segments]


def curve(graph: Graph, plan: Plan, optimizer: torch.optim.Optimizer | int | None) -> Curve:
    """Memory over one step of a plan, the optimizer's state included."""
    step, peak = composed(graph, plan, optimizer)
    if sum(linked.footprint.host for linked in step.segments) > MOST_CALLS:
        return _by_segment(peak, sum(linked.footprint.host for linked in step.segments))
    titles = [linked.title for linked in step.segments]
    return _by_call(record(lower(graph, plan)), titles, state_bytes(graph, optimizer))


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
