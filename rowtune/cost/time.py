"""A rough time for a program, to rank plans before they are measured: operations, bytes and steps.

Measured steps replace it; its only use is to order guesses and to reject the absurd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rowtune.graph.graph import Graph, Node
from rowtune.plan.program import Banded, Passes, Program, Replay, Run, SegmentProgram, Step

# Orders of magnitude of a laptop core; a ratio between plans is all that is read from them.
OPERATIONS_PER_SECOND = 5e10
BYTES_PER_SECOND = 8e9
SECONDS_PER_STEP = 1.5e-4


def operations(graph: Graph, node: Node) -> float:
    """Multiply-adds of a node's forward: exact for convolutions and linear layers, one an element else."""
    out = graph.values[node.name].shape
    if "conv" in node.op and len(node.inputs) > 1:
        weight = graph.values[node.inputs[1]].shape
        at = graph.values[node.inputs[0]].shape if "transpose" in node.op else out
        return float(math.prod(at)) * math.prod(weight[1:]) * 2
    if node.op in ("linear", "matmul", "mm") and len(node.inputs) > 1:
        return 2.0 * math.prod(out) * graph.values[node.inputs[0]].shape[-1]
    return float(math.prod(out))


def _node_seconds(graph: Graph, node: Node) -> float:
    return operations(graph, node) / OPERATIONS_PER_SECOND + graph.values[node.name].bytes / BYTES_PER_SECOND


def seconds(program: Program) -> float:
    """Forward, backward (twice a forward) and recomputation of one step."""
    return sum(segment_seconds(program.graph, segment) for segment in program.segments)


def segment_seconds(graph: Graph, segment: SegmentProgram) -> float:
    """Its share of a step."""
    once = {n.name: _node_seconds(graph, n) for n in segment.part.nodes}
    if segment.inner:
        parts = sum(segment_seconds(graph, inner) for inner in segment.inner)
        return parts + sum(_forward(graph, inner) for inner in segment.inner[:-1])
    if segment.passes is not None:
        return _passes(graph, segment, once)
    if segment.banded is None:
        factor = 4 if segment.decision.policy == "checkpoint" else 3
        return factor * sum(once.values()) + len(once) * 3 * SECONDS_PER_STEP / 4
    banded = segment.banded
    found = _steps(graph, banded, banded.backward, once, None, backward=not banded.single_sweep)
    return found if banded.single_sweep else found + _forward(graph, segment)


def _forward(graph: Graph, segment: SegmentProgram) -> float:
    """Once more; several passes know their reductions by then."""
    if segment.passes is not None:
        return _forward(graph, segment.passes.forward[-1])
    if segment.inner:
        return sum(_forward(graph, inner) for inner in segment.inner)
    once = {n.name: _node_seconds(graph, n) for n in segment.part.nodes}
    if segment.banded is None:
        return sum(once.values())
    return _steps(graph, segment.banded, segment.banded.forward, once, None)


def _passes(graph: Graph, segment: SegmentProgram, once: dict[str, float]) -> float:
    assert segment.passes is not None
    total = 0.0
    for one in segment.passes.forward:
        assert one.banded is not None
        total += _steps(graph, one.banded, one.banded.forward, once, None)
    twins = {twin: once[name] for name, twin in segment.passes.twins.items()}
    for one, wanted in zip(segment.passes.backward, _wanted_in(graph, segment.passes), strict=True):
        assert one.banded is not None
        given = {**once, **twins}
        total += _steps(segment.passes.twin_graph, one.banded, one.banded.backward, given, wanted)
    return total


def _steps(
    graph: Graph,
    banded: Banded,
    steps: Sequence[Step],
    once: dict[str, float],
    wanted: frozenset[str] | None,
    backward: bool = False,
) -> float:
    """Seconds of these steps; a node on a tape also runs backward, where a gradient flows through it. A
    `backward` leaves out what it can."""
    total, count = 0.0, 0
    spared = banded.spared if backward else frozenset()
    unread = banded.unread if backward else frozenset()
    for step in steps:
        if not isinstance(step, Run | Replay):
            continue
        tape = True if isinstance(step, Replay) else step.tape
        group = banded.groups[banded.pieces[step.piece].group]
        if backward and type(step) is Run and banded.left_out(group, tape):
            continue
        valueless = group.replay.unread if group.replay and type(step) is Replay else unread
        times = 1 + banded.repeat.more if banded.repeat and step.piece in banded.repeat.pieces else 1
        count += times
        for name, rows in banded.pieces[step.piece].ranges.items():
            if name in once and name not in spared:
                share = once[name] * rows.size / banded.bands.full_height(graph.values[name])
                back = 2 if tape and (wanted is None or name in wanted) else 0
                total += times * share * (back + (name not in valueless))
    return total + count * 2 * SECONDS_PER_STEP * len(banded.image_ranges)


def _wanted_in(graph: Graph, passes: Passes) -> list[frozenset[str]]:
    """Values that carry a gradient in each backward pass: what follows one barrier's reductions, and in the
    last pass everything."""
    found = []
    for at, one in zip(range(len(passes.levels) - 1, -1, -1), passes.backward, strict=True):
        if not at:
            found.append(graph.needs_grad | frozenset(passes.twins.values()))
            continue
        reached = set(passes.levels[at - 1])
        for node in one.part.nodes:
            if any(n in reached for n in node.inputs):
                reached.add(node.name)
        found.append(frozenset(reached))
    return found
