"""Segments that are alike but for their names and their place: the blocks of a stage, say. One of them is
recorded, and stands for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from rowtune.graph.graph import Graph, Node, Value, replace
from rowtune.plan.program import Banded, Passes, SegmentProgram, steps_of


class Alike(NamedTuple):
    """What alike segments have in common, and what each of this one's values is called in all of them."""

    digest: str
    names: dict[str, str]


def alike(graph: Graph, segment: SegmentProgram) -> Alike:
    """Values are numbered in the order in which they are come across."""
    names: dict[str, str] = {}

    def called(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    for name in segment.part.inputs:
        called(name)
    parts = [*_parts(segment)]
    nodes = [[_operator(node, called) for node in part.part.nodes] for part in parts]
    steps = steps_of(segment, called)
    values = [_value(graph, parts, name) for name in names]
    return Alike(digest([segment.decision.policy, nodes, steps, values]), names)


def digest(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _parts(segment: SegmentProgram) -> Iterator[SegmentProgram]:
    """The segment and all that it is made of."""
    yield segment
    for part in segment.parts:
        yield from _parts(part)


def _operator(node: Node, called: Any) -> Any:
    arguments = replace((node.args, node.kwargs), called)
    effect = node.effect and called(node.effect)
    return node.op, node.target, arguments, called(node.name), effect, node.random, node.region


def _value(graph: Graph, parts: list[SegmentProgram], name: str) -> Any:
    """What of a value decides how operators run on it: also which axes it has rows and images along."""
    graphs = [graph, *(part.how.twin_graph for part in parts if isinstance(part.how, Passes))]
    value: Value = next(g.values[name] for g in graphs if name in g.values)
    runs = [part.how for part in parts if isinstance(part.how, Banded)]
    dims = [(run.bands.dims.get(name), run.images.dims.get(name)) for run in runs]
    kind = value.kind if value.kind != "target" else "input"
    return value.shape, value.dtype, kind, value.requires_grad, [p.shape for p in value.parts], dims
