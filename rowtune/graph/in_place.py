"""Operators that may write over their input: nobody else reads it, and its maker's backward does not."""

from __future__ import annotations

from collections.abc import Sequence

from rowtune.graph.graph import Graph, Node, Ref

FRESH = frozenset(
    (
        *(f"conv{n}d" for n in (1, 2, 3)),
        *(f"conv_transpose{n}d" for n in (1, 2, 3)),
        *("normalise", "batch_norm", "add"),
    )
)
"""The output is memory of its own that backward does not read."""


def overwritten(graph: Graph, nodes: Sequence[Node], outputs: Sequence[str]) -> dict[str, str]:
    """For the nodes of one step that may run in place: the input that they write over.

    Args:
        outputs: what is read after the step.
    """
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    fresh = {n.name for n in nodes if n.op in FRESH and n.name not in outputs and readers.get(n.name) == 1}
    found = {}
    regions = {node.name: node.region for node in nodes}
    for node in nodes:
        own = [n for n in _candidates(graph, node) if n in fresh and regions[n] == node.region]
        over = next(iter(own), None)
        if over is not None:
            found[node.name] = over
    return found


def _candidates(graph: Graph, node: Node) -> tuple[str, ...]:
    """Inputs that the output could take the place of."""
    if node.op == "relu":
        return node.inputs
    plain = node.op == "add" and not node.kwargs and len(node.args) == 2
    if not plain or len(node.inputs) != 2 or not all(isinstance(a, Ref) for a in node.args):
        return ()
    kinds = {(graph.values[n].shape, graph.values[n].dtype) for n in (*node.inputs, node.name)}
    return node.inputs if len(kinds) == 1 else ()
