"""Where segments may well begin and end."""

from __future__ import annotations

from rowtune.graph.bands import banding
from rowtune.graph.cuts import barrier_parts, is_local, legal_cut, stretches, why_not
from rowtune.graph.graph import Graph
from rowtune.graph.rules import Opaque


def has_barriers(graph: Graph, axis: int) -> bool:
    return any(len(barrier_parts(graph, a, b, axis)) > 1 for a, b in stretches(graph, axis))


def is_split(graph: Graph, start: int, stop: int, axis: int) -> bool:
    """Whether a rows segment can take some images at a time between its barriers."""
    return all(is_local(graph, a, b, 0) for a, b in barrier_parts(graph, start, stop, axis))


def candidate_cuts(graph: Graph, most: int) -> tuple[int, ...]:
    """At most `most` places for a segment to end: the network in as many parts of equal bytes, and in each
    part the legal cut that the fewest bytes cross. Where blocks are joined by narrow places (the ends of
    residual blocks), only there."""
    crossing = crossing_bytes(graph)
    sizes = [graph.values[node.name].bytes for node in graph.nodes]
    total, so_far = max(sum(sizes), 1), 0
    legal = [p for p in range(1, len(graph.nodes)) if legal_cut(graph, p)]
    narrow = _valleys(crossing, legal)
    allowed = set(narrow if len(narrow) >= most // 2 else legal)
    best: dict[int, tuple[bool, int, int]] = {}
    for position in range(1, len(graph.nodes)):
        so_far += sizes[position - 1]
        part = min(so_far * most // total, most - 1)
        if position in allowed:
            here = (position not in narrow, crossing[position], -position)
            best[part] = min(best.get(part, here), here)
    return tuple(sorted(-position for _, _, position in best.values()))


def _valleys(crossing: list[int], legal: list[int]) -> list[int]:
    """Positions that fewer bytes cross than some before and some behind; a tenth is no difference."""
    found = []
    peak = low = crossing[legal[0]] if legal else 0
    at = 0
    for position in legal:
        here = crossing[position]
        if here <= low:
            low, at = here, position
        elif here > 1.1 * low:
            if peak > 1.1 * low:
                found.append(at)
            peak, low, at = here, here, position
    return found


def crossing_bytes(graph: Graph) -> list[int]:
    """Bytes of activations alive across each position, 0 to len(nodes)."""
    change = [0] * (len(graph.nodes) + 2)
    for i, node in enumerate(graph.nodes):
        readers = graph.consumers[node.name]
        if readers:
            change[i + 1] += graph.values[node.name].bytes
            change[min(max(readers), len(graph.nodes)) + 1] -= graph.values[node.name].bytes
    out, live = [], 0
    for position in range(len(graph.nodes) + 1):
        live += change[position]
        out.append(live)
    return out


def bandable(graph: Graph, start: int, stop: int, axis: int) -> list[tuple[int, int]]:
    """Runs of nodes [start, stop) that can be rows segments and are worth it (more than one node)."""
    rules = banding(graph, axis).rules
    found = []
    at = start
    while at < stop:
        end = at
        while end < stop and not isinstance(rules[graph.nodes[end].name], Opaque):
            end += 1
        after = max(end, at + 1)
        while end > at and not legal_cut(graph, end):
            end -= 1
        if end > at + 1 and not why_not(graph, at, end, axis):
            found.append((at, end))
        at = after
    return found
