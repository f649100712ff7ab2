"""A network as a handful of stages: stretches of one resolution and one part of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rowtune.graph.bands import Banding, banding
from rowtune.graph.cuts import legal_cut
from rowtune.graph.graph import Graph, Node, Value

MOST = 24
"""Stages of a network."""


class Stage(NamedTuple):
    """Nodes [start, stop). `name` is the modules' from its first to its last with parameters, `shape` that of
    its last feature map."""

    start: int
    stop: int
    name: str
    shape: tuple[int, ...]


def stages(graph: Graph, axis: int = 2) -> tuple[Stage, ...]:
    """From the first node to the last, `MOST` at most. A stage begins where feature maps get another size, or
    where the part of the model changes, by the first word of its modules' names; never inside what no cut may
    part. Where that is too many (resolutions side by side), the smallest go with a neighbour."""
    bands = banding(graph, axis)
    begins = [0]
    size, part = 0, ""
    for position, node in enumerate(graph.nodes):
        here = _rows(bands, graph.values[node.name]) or size
        named = _has_weights(graph, node) and node.module.partition(".")[0]
        other_part = bool(named and part and named != part)
        if position and (other_part or (size and here != size)) and legal_cut(graph, position):
            begins.append(position)
            part = ""
        size, part = here, part or named or ""
    places = _merged(graph, [*begins, len(graph.nodes)])
    return tuple(_stage(graph, bands, a, b) for a, b in pairwise(places))


def _merged(graph: Graph, places: list[int]) -> list[int]:
    """Without boundaries of the stages with the fewest bytes: each is joined to its smaller neighbour."""
    sizes = [sum(graph.values[n.name].bytes for n in graph.nodes[a:b]) for a, b in pairwise(places)]
    places = list(places)
    while len(sizes) > MOST:
        least = min(range(len(sizes)), key=sizes.__getitem__)
        last = least + 1 == len(sizes)
        at = least - 1 if last or (least and sizes[least - 1] <= sizes[least + 1]) else least
        sizes[at : at + 2] = [sizes[at] + sizes[at + 1]]
        del places[at + 1]
    return places


def _rows(bands: Banding, value: Value) -> int:
    """Of a feature map; 0 where rows mean nothing."""
    return bands.height(value) if bands.dims.get(value.name) is not None else 0


def _has_weights(graph: Graph, node: Node) -> bool:
    return any(graph.values[name].kind == "parameter" for name in node.inputs)


def _stage(graph: Graph, bands: Banding, start: int, stop: int) -> Stage:
    nodes = graph.nodes[start:stop]
    named = [n.module for n in nodes if _has_weights(graph, n)] or [n.module for n in nodes if n.module]
    maps = [graph.values[n.name] for n in nodes if _rows(bands, graph.values[n.name])]
    values = maps or [graph.values[n.name] for n in nodes if graph.values[n.name].shape]
    return Stage(start, stop, _name(named), values[-1].shape if values else ())


def _name(modules: list[str]) -> str:
    if not modules:
        return ""
    first, last = (".".join(modules[i].split(".")[:2]) for i in (0, -1))
    return first if first == last else f"{first} .. {last}"


def multiply_adds(graph: Graph, nodes: Sequence[Node]) -> int:
    """Of convolutions and matrix products with a weight, forward; backward takes about twice as many."""
    total = 0
    for node in nodes:
        weights = [graph.values[n] for n in node.inputs if graph.values[n].kind == "parameter"]
        if not weights or len(weights[0].shape) < 2:
            continue
        weight, out = weights[0].shape, math.prod(graph.values[node.name].shape)
        if node.op.startswith("conv_transpose"):
            given = graph.values[node.inputs[0]].shape
            total += math.prod(given) * math.prod(weight[1:])
        elif node.op.startswith("conv") or node.op == "linear":
            total += out * math.prod(weight[1:])
    return total
