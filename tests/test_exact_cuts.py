"""The contract where a network has several outputs, and a plan cuts it anywhere, with any policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import TOLERANCE, RandomNet, error, step
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_exact_dag import layers
from torch import Tensor

import rowtune
from rowtune.errors import ModelError
from rowtune.graph.cuts import legal_cut, why_not
from rowtune.graph.graph import Graph
from rowtune.plan.plan import Plan, Segment

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # drawn so


class Several(RandomNet):
    """Returns the maps numbered `outputs`, at whatever heights they have."""

    outputs: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        maps = [x]
        for (_, _, source), op in zip(self.layers, self.ops, strict=True):
            maps.append(op(maps[max(0, len(maps) - 1 - source)]))
        return tuple(maps[1:][i % len(self.layers)] for i in self.outputs)


@st.composite
def segments(draw: Any, graph: Graph) -> tuple[Segment, ...]:
    """Cuts wherever they are legal; rows where the part can be banded."""
    total = len(graph.nodes)
    legal = [c for c in range(1, total) if legal_cut(graph, c)]
    cuts = sorted(draw(st.sets(st.sampled_from(legal), max_size=4))) if legal else []
    made = []
    for a, b in zip([0, *cuts], [*cuts, total], strict=True):
        first, last = graph.nodes[a].name, graph.nodes[b - 1].name
        policies = (
            ["keep", "checkpoint"] if why_not(graph, a, b, 2) else ["rows", "rows", "rows", "checkpoint"]
        )
        policy = draw(st.sampled_from(policies))
        if policy != "rows":
            made.append(Segment(first, last, policy))
            continue
        images = 0 if why_not(graph, a, b, 0) else draw(st.integers(0, 1))
        halo = draw(st.sampled_from(["recompute", "cache", "sweep"]))
        tapes = draw(st.sampled_from(["split", "whole", "late", "replay"]))
        made.append(Segment(first, last, "rows", draw(st.integers(1, 9)), halo, images, tapes))
    return tuple(made)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    layers=layers, outputs=st.lists(st.integers(0, 5), min_size=1, max_size=3), used=st.integers(0, 2),
    height=st.integers(3, 15), width=st.integers(3, 6), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_several_outputs_and_any_cuts(layers, outputs, used, height, width, seed, data):
    """`used` leaves some outputs out of the loss: they have no gradient, and may be all there is."""
    torch.manual_seed(seed)
    net = Several(layers, 4).double()
    net.outputs = tuple(outputs)
    x = torch.randn(2, 4, height, width, dtype=torch.float64, requires_grad=True)
    try:
        with torch.no_grad():
            sizes = [t.numel() for t in net(x)]
        assume(all(0 < n < 8000 for n in sizes))
        graph = rowtune.trace(net, (x,))
    except (RuntimeError, ModelError):
        assume(False)
    assume(graph.nodes)
    plan = Plan(data.draw(segments(graph), "segments"))
    module = rowtune.apply(net, plan)

    def loss(made: tuple[Tensor, ...]) -> Tensor:
        chosen = made[used % len(made) :]
        total = torch.zeros((), dtype=torch.float64)
        for t in chosen:
            total = (
                total
                + (t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum()
                + t.sin().mean()
            )
        return total

    plain = step(net, lambda: loss(net(x)), {"x": x})
    assert error(step(net, lambda: loss(module(x)), {"x": x}), plain) < TOLERANCE
