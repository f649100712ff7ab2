"""What a backward need not do again: gradients of statistics, which whoever reads them can finish, and
convolutions whose values nobody reads.

A rows segment that ends in convolution and statistics hands both to the next one, which normalises. When the
backward of that next segment is done, it holds the convolution's output, its gradient, and the gradient of
the statistics: it adds the statistics' share and is done with the barrier. What is left for the segment
before is the convolution's own gradient, and that does not need the convolution's output.
"""

from __future__ import annotations

from dataclasses import replace

from rowtune.graph.cuts import reduces
from rowtune.graph.graph import Graph
from rowtune.plan.program import Banded, Checkpoint, Finish, Passes, SegmentProgram


def finished(graph: Graph, segments: tuple[SegmentProgram, ...]) -> tuple[SegmentProgram, ...]:
    """The same segments, with every gradient of statistics finished where they are read."""
    leaves = [leaf for segment in segments for leaf in _parts(segment)]
    home = {node.name: i for i, leaf in enumerate(leaves) for node in leaf.part.nodes}
    finishes: list[list[Finish]] = [[] for _ in leaves]
    spared: list[set[str]] = [set() for _ in leaves]
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf.how, Banded):
            continue
        for total in leaf.how.sums:
            readers = _readers(graph, leaves, home, i, total)
            if readers and (finish := _finish(graph, leaf.how, total)):
                spared[i].add(total)
                for r in readers:
                    finishes[r].append(finish)
    made = iter(_leaf(graph, *each) for each in zip(leaves, finishes, spared, strict=True))
    return tuple(
        s.with_parts(next(made) for _ in s.parts) if _made_again(s) else next(made) for s in segments
    )


def _parts(segment: SegmentProgram) -> tuple[SegmentProgram, ...]:
    """What backward runs through. (The segments inside a checkpoint are finished among themselves.)"""
    return segment.parts if _made_again(segment) else (segment,)


def _made_again(segment: SegmentProgram) -> bool:
    """Whether the segment is made of the rows between barriers."""
    return isinstance(segment.how, Checkpoint) and segment.decision.policy == "rows"


def _finish(graph: Graph, maker: Banded, total: str) -> Finish | None:
    rule = maker.bands.rule(total)
    assert rule.reduces is not None
    source = next(iter(rule.reads))
    if rule.reduces.add_gradient is None or source not in graph.needs_grad:
        return None
    return Finish(total, source, rule.reduces)


def _readers(
    graph: Graph, leaves: list[SegmentProgram], home: dict[str, int], maker: int, total: str
) -> set[int]:
    """The segments that read the statistics, if each of them can finish their gradient; else none."""
    node = graph.nodes[graph.index[total]]
    source, shared = node.inputs[0], node.op == "moments" and bool(node.args[3])
    found = set()
    for c in graph.consumers[total]:
        if c >= len(graph.nodes) or graph.nodes[c].name not in home:
            return set()
        if graph.nodes[c].effect:
            continue
        reader = home[graph.nodes[c].name]
        leaf = leaves[reader]
        if leaf.single_sweep and shared:  # gradients before those of other processes
            return set()
        if reader == maker or not isinstance(leaf.how, Banded | Passes) or source not in leaf.part.inputs:
            return set()
        found.add(reader)
    return found


def _leaf(graph: Graph, leaf: SegmentProgram, finishes: list[Finish], spared: set[str]) -> SegmentProgram:
    leaf = replace(leaf, finishes=tuple(finishes))
    how = leaf.how
    if not isinstance(how, Banded) or how.single_sweep:
        return leaf
    unread = {
        node.name
        for node in leaf.part.nodes
        if node.name in leaf.part.outputs and _unread(graph, leaf, how, node.name, spared)
    }
    return replace(leaf, how=replace(how, spared=frozenset(spared), unread=frozenset(unread)))


def _unread(graph: Graph, leaf: SegmentProgram, banded: Banded, name: str, spared: set[str]) -> bool:
    rule = banded.bands.rule(name) if name not in {n.name for n in banded.post} else None
    if rule is None or rule.unvalued is None or reduces(rule):
        return False
    inside = [graph.nodes[c] for c in graph.consumers[name] if c < leaf.part.stop]
    return all(node.name in spared or node.effect for node in inside)
