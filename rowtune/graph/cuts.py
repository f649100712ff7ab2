"""Cuts between segments: what a stretch of nodes reads and makes, and where banding stops."""

from __future__ import annotations

from dataclasses import dataclass

from rowtune.graph.bands import banding
from rowtune.graph.graph import Graph, Node
from rowtune.graph.rules import Opaque


@dataclass(frozen=True)
class Stretch:
    """Nodes [start, stop) of a graph. `inputs` are activations (or inputs, targets) made before, `weights`
    parameters, buffers and constants, `outputs` what later nodes or the caller read."""

    start: int
    stop: int
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


def stretch(graph: Graph, start: int, stop: int) -> Stretch:
    nodes = graph.nodes[start:stop]
    made = {node.name for node in nodes}
    read = dict.fromkeys(name for node in nodes for name in node.inputs if name not in made)
    fixed = ("parameter", "buffer", "constant")
    return Stretch(
        start,
        stop,
        nodes,
        tuple(n for n in read if graph.values[n].kind not in fixed),
        tuple(n for n in read if graph.values[n].kind in fixed),
        tuple(node.name for node in nodes if any(c >= stop for c in graph.consumers[node.name])),
    )


def legal_cut(graph: Graph, position: int) -> bool:
    """Whether a segment may end before node `position`: no tuple value may cross."""
    return not any(
        graph.values[node.name].parts and any(c >= position for c in graph.consumers[node.name])
        for node in graph.nodes[max(0, position - 64) : position]
    )


def cut_bytes(graph: Graph, position: int) -> int:
    """Bytes of the activations alive between node position-1 and node position."""
    total = 0
    for i, node in enumerate(graph.nodes[:position]):
        if any(c >= position for c in graph.consumers[node.name]) and i < position:
            total += graph.values[node.name].bytes
    return total


def why_not(graph: Graph, start: int, stop: int, axis: int) -> str:
    """Why nodes [start, stop) cannot be a rows segment along `axis`; empty if they can."""
    bands = banding(graph, axis)
    reduced: set[str] = set()
    any_banded = False
    for node in graph.nodes[start:stop]:
        rule = bands.rules[node.name]
        if isinstance(rule, Opaque):
            return f"{node.name}: {rule.reason}"
        after = any(name in reduced for name in node.inputs)
        if after and rule.dim is not None:
            return f"{node.name} needs the finished sums of {node.inputs[0]} (a barrier)"
        if rule.reduces or after:
            reduced.add(node.name)
        any_banded |= rule.dim is not None or rule.reduces
    return "" if any_banded else "nothing in it has rows"


def stretches(graph: Graph, axis: int) -> list[tuple[int, int]]:
    """The longest runs of nodes that can be a rows segment, as [start, stop) positions."""
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(graph.nodes):
        stop = start
        seen_reduction: set[str] = set()
        while stop < len(graph.nodes) and _extends(graph, stop, axis, seen_reduction):
            stop += 1
        while stop > start and not legal_cut(graph, stop):
            stop -= 1
        if stop > start and legal_cut(graph, start) and not why_not(graph, start, stop, axis):
            found.append((start, stop))
        start = max(stop, start + 1)
    return found


def _extends(graph: Graph, position: int, axis: int, reduced: set[str]) -> bool:
    bands, node = banding(graph, axis), graph.nodes[position]
    rule = bands.rules[node.name]
    if isinstance(rule, Opaque):
        return False
    after = any(name in reduced for name in node.inputs)
    if rule.reduces or after:
        reduced.add(node.name)
    return not (after and rule.dim is not None)


def opaque_nodes(graph: Graph, axis: int = 2) -> list[tuple[str, str, str]]:
    """(node, operator, reason) of every node that bounds a rows segment."""
    found = []
    for node in graph.nodes:
        rule = banding(graph, axis).rules[node.name]
        if isinstance(rule, Opaque) and not (node.effect and node.op != "batch_norm"):
            found.append((node.name, node.op, rule.reason))
    return found
