"""The sizes of gradients of statistics that are finished where they are read."""

from __future__ import annotations

from rowtune.cost.heap import Heap
from rowtune.graph.graph import Graph
from rowtune.kernels.moments import CHUNK
from rowtune.plan.program import SegmentProgram


def finish(heap: Heap, graph: Graph, segment: SegmentProgram, input_grads: dict[str, int]) -> None:
    """Mirrors runtime.gradients.finish: some deviations at a time, then the gradient of the total is gone."""
    for total, source, _ in segment.finishes:
        block = input_grads.pop(total, None)
        if block is None:
            continue
        value = graph.values[source]
        heap.mark(min(value.bytes, CHUNK * value.dtype.itemsize))
        heap.drop(block)
