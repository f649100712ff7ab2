"""A rough time for a program, to rank plans before they are measured: operations, bytes and steps.

Measured steps replace it; its only use is to order guesses and to reject the absurd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from rowtune.graph.graph import Graph, Node
from rowtune.plan.program import Program, Run, SegmentProgram
from rowtune.plan.repeat import Repeat

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


def seconds(program: Program, repeats: Mapping[int, Repeat] | None = None) -> float:
    """Forward, backward (twice a forward) and recomputation of one step."""
    known = repeats or {}
    return sum(_segment(program.graph, s, known.get(s.part.start)) for s in program.segments)


def _segment(graph: Graph, segment: SegmentProgram, repeat: Repeat | None) -> float:
    once = {n.name: _node_seconds(graph, n) for n in segment.part.nodes}
    if segment.banded is None:
        factor = 4 if segment.decision.policy == "checkpoint" else 3
        return factor * sum(once.values()) + len(once) * 3 * SECONDS_PER_STEP / 4
    banded, total = segment.banded, 0.0
    steps = 0
    for step in (*(() if banded.single_sweep else banded.forward), *banded.backward):
        if type(step) is not Run:
            continue
        times = 1 + repeat.more if repeat is not None and step.piece in repeat.pieces else 1
        steps += times
        piece = banded.pieces[step.piece]
        share = sum(
            once[name] * rows.size / banded.bands.full_height(graph.values[name])
            for name, rows in piece.ranges.items()
            if name in once
        )
        total += times * share * (3 if step.tape else 1)
    return total + steps * 2 * SECONDS_PER_STEP * len(banded.image_ranges)
