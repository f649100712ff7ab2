"""Where a segment that is made again keeps a tensor, and where it does not.

The tensor at a barrier is kept for backward once it is made again. Behind a convolution that widens (a
bottleneck's last, an inverted bottleneck's first) that is more than what it was made from. There the barrier
is crossed in several passes instead: the wide tensor never exists, at the price of the convolution's
operations once more for each pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rowtune.graph.bands import banding
from rowtune.graph.cuts import barrier_parts, legal_cut
from rowtune.graph.graph import Graph


class Divided(NamedTuple):
    """Nodes [start, stop), and whether they hold a barrier that is crossed in passes."""

    start: int
    stop: int
    passes: bool


def divided(graph: Graph, start: int, stop: int, axis: int) -> list[Divided]:
    """Parts of a segment: as its barriers divide it, but for those behind which tensors are wider than what
    they are made from. Such a part goes on to where the fewest bytes cross."""
    rows = banding(graph, axis).dims
    sizes = {n: v.bytes for n, v in graph.values.items() if rows.get(n) is not None}
    found: list[Divided] = []
    at = start
    while at < stop:
        parts = barrier_parts(graph, at, stop, axis)
        end = parts[0][1]
        if len(parts) > 1 and _made(graph, sizes, at, end) > _read(graph, sizes, at, end):
            inside = range(end + 1, parts[1][1] + 1)
            places = [p for p in inside if legal_cut(graph, p) and _one_barrier(graph, at, p, axis)]
            end = min(places, key=lambda p: (_made(graph, sizes, at, p), -p), default=end)
        found.append(Divided(at, end, len(barrier_parts(graph, at, end, axis)) > 1))
        at = end
    return found


def _one_barrier(graph: Graph, start: int, stop: int, axis: int) -> bool:
    return len(barrier_parts(graph, start, stop, axis)) == 2


def _made(graph: Graph, sizes: dict[str, int], start: int, stop: int) -> int:
    """Bytes made by nodes [start, stop) that later ones read."""
    names = (n.name for n in graph.nodes[start:stop] if any(c >= stop for c in graph.consumers[n.name]))
    return _bytes(sizes, names)


def _read(graph: Graph, sizes: dict[str, int], start: int, stop: int) -> int:
    made = {node.name for node in graph.nodes[start:stop]}
    return _bytes(sizes, {n for node in graph.nodes[start:stop] for n in node.inputs if n not in made})


def _bytes(sizes: dict[str, int], names: Iterable[str]) -> int:
    return sum(sizes.get(n, 0) for n in names)
