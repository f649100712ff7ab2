"""A plan by hand: one policy on every stretch that can take it, keep elsewhere."""

from __future__ import annotations

from dataclasses import replace

from rowtune.graph.cuts import stretches
from rowtune.graph.graph import Graph
from rowtune.plan.choices import Barriers, Halo, Policy, Tapes
from rowtune.plan.plan import Plan, Segment, checked


def uniform_plan(
    graph: Graph,
    policy: Policy,
    band_rows: int = 16,
    halo: Halo = "sweep",
    *,
    images: int = 0,
    tapes: Tapes = "split",
    barriers: Barriers = "store",
    axis: int = 2,
) -> Plan:
    """`rows` on every stretch that can be banded along `axis`; `checkpoint` and `keep` on all nodes.

    Raises:
        PlanError: a value is out of range.
    """
    everything = graph.nodes[0].name, graph.nodes[-1].name
    all_rows = Segment(*everything, policy, band_rows, halo, images, tapes, barriers)
    checked(Plan((all_rows,), axis))  # also where there is nothing to band
    if policy != "rows":
        return Plan((Segment(*everything, policy, images=images),), axis)
    segments: list[Segment] = []
    at = 0
    for start, stop in stretches(graph, axis):
        if start > at:
            segments.append(_keep(graph, at, start))
        first, last = graph.nodes[start].name, graph.nodes[stop - 1].name
        segments.append(replace(all_rows, first=first, last=last))
        at = stop
    if at < len(graph.nodes):
        segments.append(_keep(graph, at, len(graph.nodes)))
    return Plan(tuple(segments), axis)


def _keep(graph: Graph, start: int, stop: int) -> Segment:
    return Segment(graph.nodes[start].name, graph.nodes[stop - 1].name, "keep")
