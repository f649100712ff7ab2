"""Gradients under way: sums by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rowtune.graph.graph import Graph
from rowtune.graph.moments import add_processes
from rowtune.plan.program import SegmentProgram
from rowtune.runtime.evaluate import grad_dtype


@dataclass
class Gradients:
    """Sums over bands and images, by name: of segment inputs and of weights."""

    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]


def add(sums: dict[str, Tensor], name: str, grad: Tensor) -> None:
    """One more gradient of a value."""
    sums[name] = sums[name] + grad if name in sums else grad


def finish(
    graph: Graph,
    segment: SegmentProgram,
    tensors: Mapping[str, Tensor],
    gradients: Gradients,
    wanted: Collection[str],
) -> None:
    """What comes of the gradients of statistics that the segment reads: see rowtune/plan/finish.py."""
    for total, source, reduction in segment.finishes:
        grad = gradients.inputs.pop(total, None)
        if grad is None or source not in wanted:
            continue
        assert reduction.add_gradient is not None
        x = tensors[source]
        if source not in gradients.inputs:
            gradients.inputs[source] = torch.zeros_like(x, dtype=grad_dtype(x.dtype))
        grad = add_processes(grad) if reduction.shared else grad
        node = graph.nodes[graph.index[total]]
        reduction.add_gradient(node, x, tensors[total], grad, gradients.inputs[source])
