"""Cuts between segments: what a stretch of nodes reads and makes, and where banding stops."""

from __future__ import annotations

from dataclasses import dataclass

from rowtune.graph.bands import banding
from rowtune.graph.graph import Graph, Node
from rowtune.graph.rules import Opaque, RowRule


@dataclass(frozen=True)
class Stretch:
    """Nodes [start, stop) of a graph, without those that nobody reads. `inputs` are activations (or inputs,
    targets) made before, `weights` parameters, buffers and constants, `outputs` what later nodes or the
    caller read."""

    start: int
    stop: int
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


def stretch(graph: Graph, start: int, stop: int) -> Stretch:
    span = graph.nodes[start:stop]
    outputs = tuple(node.name for node in span if any(c >= stop for c in graph.consumers[node.name]))
    nodes = tuple(node for node in span if node.name in graph.live)
    made = {node.name for node in nodes}
    read = dict.fromkeys(name for node in nodes for name in node.inputs if name not in made)
    fixed = ("parameter", "buffer", "constant")
    return Stretch(
        start,
        stop,
        nodes,
        tuple(n for n in read if graph.values[n].kind not in fixed),
        tuple(n for n in read if graph.values[n].kind in fixed),
        outputs,
    )


def legal_cut(graph: Graph, position: int) -> bool:
    """Whether a segment may end before node `position`: no tuple value may cross."""
    return not any(
        graph.values[node.name].parts and any(c >= position for c in graph.consumers[node.name])
        for node in graph.nodes[max(0, position - 64) : position]
    )


def reduces(rule: RowRule | Opaque) -> bool:
    return isinstance(rule, RowRule) and rule.reduces is not None


def why_not(graph: Graph, start: int, stop: int, axis: int) -> str:
    """Why nodes [start, stop) cannot be a rows segment along `axis`; empty if they can."""
    bands = banding(graph, axis)
    any_banded = False
    for node in graph.nodes[start:stop]:
        rule = bands.rules[node.name]
        if isinstance(rule, Opaque):
            return f"{node.name}: {rule.reason}"
        any_banded |= rule.dim is not None or reduces(rule)
    return "" if any_banded else "nothing in it has rows"


def barrier_parts(graph: Graph, start: int, stop: int, axis: int) -> list[tuple[int, int]]:
    """Nodes [start, stop) divided where a reduction must be finished before rows can go on (a barrier):
    within a part, what reads a reduction of the same part has no rows."""
    rules = banding(graph, axis).rules
    parts = []
    at = start
    finished: set[str] = set()
    for i in range(start, stop):
        node = graph.nodes[i]
        rule = rules[node.name]
        after = any(name in finished for name in node.inputs)
        if after and (rule.dim is not None or reduces(rule)):
            parts.append((at, i))
            at, finished, after = i, set(), False
        if after or reduces(rule):
            finished.add(node.name)
    return [*parts, (at, stop)]


def is_local(graph: Graph, start: int, stop: int, axis: int) -> bool:
    """Whether nodes [start, stop) can be banded along `axis` with no barrier inside."""
    return not why_not(graph, start, stop, axis) and len(barrier_parts(graph, start, stop, axis)) == 1


def stretches(graph: Graph, axis: int) -> list[tuple[int, int]]:
    """The longest runs of nodes that can be a rows segment, as [start, stop) positions."""
    rules = banding(graph, axis).rules
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(graph.nodes):
        stop = start
        while stop < len(graph.nodes) and not isinstance(rules[graph.nodes[stop].name], Opaque):
            stop += 1
        while stop > start and not legal_cut(graph, stop):
            stop -= 1
        if stop > start and legal_cut(graph, start) and not why_not(graph, start, stop, axis):
            found.append((start, stop))
        start = max(stop, start + 1)
    return found


def opaque_nodes(graph: Graph, axis: int = 2) -> list[tuple[str, str, str]]:
    """(node, operator, reason) of every node that bounds a rows segment."""
    found = []
    for node in graph.nodes:
        rule = banding(graph, axis).rules[node.name]
        if isinstance(rule, Opaque) and not node.effect:
            found.append((node.name, node.op, rule.reason))
    return found
