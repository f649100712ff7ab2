"""What each saver takes off a plan's peak: the prediction without it, less that with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rowtune.cost.predict import predict
from rowtune.cost.state import Stateful
from rowtune.errors import RowtuneError
from rowtune.graph.graph import Graph
from rowtune.plan.choices import LOSSY
from rowtune.plan.plan import Plan, Segment
from rowtune.report.page import Saving
from rowtune.tune.savers import used

Without = Callable[[Plan], Plan]


def savings(graph: Graph, plan: Plan, optimizer: Stateful) -> tuple[Saving, ...]:
    """For each saver that the plan uses, the largest first. They help each other: what they take off together
    is not the sum."""
    whole = predict(graph, plan, optimizer).peak_bytes
    found = []
    for name in sorted(used(plan) & WITHOUT.keys()):
        try:
            more = predict(graph, WITHOUT[name](plan), optimizer).peak_bytes
        except RowtuneError:  # there is no such plan
            continue
        found.append(Saving(name, more - whole))
    return tuple(sorted(found, key=lambda s: -s.bytes))


def _each(change: Callable[[Segment], Segment]) -> Without:
    def without(plan: Plan) -> Plan:
        return replace(plan, segments=tuple(_deep(s, change) for s in plan.segments))

    return without


def _deep(segment: Segment, change: Callable[[Segment], Segment]) -> Segment:
    return change(replace(segment, inside=tuple(_deep(s, change) for s in segment.inside)))


def _kept(policy: str) -> Callable[[Segment], Segment]:
    def change(s: Segment) -> Segment:
        return Segment(s.first, s.last, store=s.store) if s.policy == policy else s

    return change


def _all_images(s: Segment) -> Segment:
    if s.policy == "rows" and not s.band_rows:
        return Segment(s.first, s.last, store=s.store)
    return replace(s, images=0)


WITHOUT: dict[str, Without] = {
    "rows": _each(_kept("rows")),
    "checkpoint": _each(_kept("checkpoint")),
    "turns": _each(lambda s: replace(s, inside=())),
    "images": _each(_all_images),
    "recompute": _each(lambda s: replace(s, cheap="store")),
    "offload": _each(lambda s: replace(s, store="device") if s.store == "host" else s),
    "rounding": _each(lambda s: replace(s, store="device") if s.store in LOSSY else s),
    "bf16": lambda plan: replace(plan, dtype="as given"),
    "offload_gradients": lambda plan: replace(plan, waiting_gradients="device"),
    "offload_state": lambda plan: replace(plan, optimizer_state="device"),
    "step_in_backward": lambda plan: replace(plan, step_in_backward=False),
}
"""By name: the same plan without it. (`channels_last` and `capture` are for time.)"""
