"""Which gradients wait for segments in which nobody wants them."""

from __future__ import annotations

from dataclasses import replace

from rowtune.graph.graph import Graph
from rowtune.plan.program import SegmentProgram

LEAST_BYTES = 1 << 14
"""Smaller ones stay: there are many, and they take nothing."""


def with_waits(graph: Graph, segments: tuple[SegmentProgram, ...]) -> tuple[SegmentProgram, ...]:
    """The same segments; what one makes and another reads than the next leaves there and returns here."""
    maker = {name: i for i, s in enumerate(segments) for name in s.part.outputs}
    leaves: list[list[str]] = [[] for _ in segments]
    returns: list[dict[str, int]] = [{} for _ in segments]
    for i, segment in enumerate(segments):
        for name in segment.part.inputs:
            made, value = maker.get(name, i), graph.values[name]
            if made + 1 < i and value.bytes >= LEAST_BYTES and value.dtype.is_floating_point:
                leaves[i].append(name)
                returns[made][name] = returns[made].get(name, 0) + 1
    return tuple(
        replace(s, leaves=tuple(away), returns=tuple(back.items())) if away or back else s
        for s, away, back in zip(segments, leaves, returns, strict=True)
    )
