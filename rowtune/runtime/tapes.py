"""A tape: what a piece's backward needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rowtune.plan.groups import Group
from rowtune.rows import Rows


@dataclass
class Tape:
    """Where gradients are asked for, and where they start. Places in autograd's graph, not tensors: the tape
    holds on to no memory that the operators do not need."""

    slabs: list[tuple[str, Rows, GradientEdge]]
    weights: list[str]
    outputs: dict[str, tuple[GradientEdge, torch.dtype]]

    def backward(self, seeds: dict[str, Tensor], leaves: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Gradients of the slabs for these of the outputs, which are let go of; those of weights go to the
        leaves' hooks. Runs once."""
        outputs: list[Any] = []
        given = []
        for name in [*seeds]:
            edge, dtype = self.outputs[name]
            seed = seeds.pop(name)
            outputs.append(edge)
            given.append(seed if seed.dtype == dtype else seed.to(dtype))
            del seed
        self.outputs.clear()
        asked: list[Any] = [*(edge for _, _, edge in self.slabs), *(leaves[n] for n in self.weights)]
        if not asked or not outputs:
            return [None] * len(self.slabs)
        found: list[Tensor | None] = [*torch.autograd.grad(outputs, asked, given, allow_unused=True)]
        return found[: len(self.slabs)]


def tape_of(
    group: Group,
    slabs: list[tuple[str, Rows, GradientEdge]],
    outputs: Mapping[str, Tensor],
    weights: Collection[str],
) -> Tape:
    """What `group` left behind.

    Args:
        slabs: what it read that gradients flow to.
        outputs: what it made.
        weights: those that need a gradient.
    """
    read = dict.fromkeys(n for node in group.nodes for n in node.inputs if n in weights)
    made = {n: (get_gradient_edge(t), t.dtype) for n, t in outputs.items() if t.requires_grad}
    return Tape(slabs, list(read), made)
