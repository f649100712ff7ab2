"""What decides a branch is exact where the values around it are rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exactness import step
from hypothesis import given
from hypothesis import strategies as st
from test_remade import lean
from torch import Tensor, nn

import rowtune
from rowtune.graph.graph import Graph
from rowtune.graph.losses import parse
from rowtune.graph.training import with_loss
from rowtune.runtime.stores.branches import EDGES, Branched, Edge, edges_of
from rowtune.runtime.stores.int8 import Int8
from rowtune.runtime.stores.keeping import Keeping
from rowtune.runtime.stores.remade import Remaking
from rowtune.torch_private import storage_of
from rowtune.tune.meter import measure_memory
from rowtune.tune.step import Plain


class Clamp(nn.Module):
    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.5),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "elu": lambda: nn.ELU(2.0),
    "prelu": nn.PReLU,
    "threshold": lambda: nn.Threshold(0.3, 0.1),
    "clamp": lambda: Clamp(-0.7, 0.4),
    "clamp_min": lambda: Clamp(0.2, None),
    "clamp_max": lambda: Clamp(None, 0.2),
}


FAR = ("relu6", "hardswish", "hardsigmoid")


class Saved:
    def __init__(self, t: Tensor) -> None:
        self.t = t

    def get(self) -> Tensor:
        return self.t


@given(
    seed=st.integers(0, 99),
    at=st.sampled_from([-3.0, -0.5, 0.0, 0.3, 6.0]),
    itself=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_every_element_comes_back_on_its_side(seed, at, itself, dtype):
    torch.manual_seed(seed)
    edges = (Edge(at, itself), Edge(at + 1.0))
    x = (at + 2 * torch.randn(3, 4, 5)).to(dtype)
    x[0, 0, 0], x[0, 0, 1] = at, at + 1.0
    off = x + 0.3 * torch.randn(3, 4, 5).to(dtype)
    back = Branched(Saved(off), x, edges).get()
    for t, u in ((x, back), (back, x)):
        sides = [t >= e.at if e.itself else t > e.at for e in edges]
        others = [u >= e.at if e.itself else u > e.at for e in edges]
        assert all(map(torch.equal, sides, others))
    assert ((back - x).abs() <= (off - x).abs() + 2 * torch.finfo(dtype).eps * x.abs().max()).all()
    alone = Branched(Saved(x), x, edges).get()
    assert torch.equal(alone, x)


def stack(make: Callable[[], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=False)]
    for _ in range(2):
        layers += [
            nn.BatchNorm2d(8),
            make(),
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
        ]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_off_by_what_is_rounded_alone(name, monkeypatch):
    """Not by elements that decide otherwise; and what it takes is predicted."""
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)
    torch.manual_seed(1)
    net, x, target = stack(ACTIVATIONS[name]), torch.randn(2, 3, 24, 24), torch.rand(2, 8, 24, 24)
    loss, graph = parse("mse"), rowtune.trace(net, (x,))
    for norm in (net[1], net[5]):  # so that there is something near all edges
        nn.init.constant_(norm.weight, 3.0 if name in FAR else 1.0)
    training = with_loss(graph, loss)
    assert any(node.op in EDGES for node in training.nodes)
    plan = lean(training, "int8", max_grad_error=9.0)
    module = rowtune.apply(net, plan, loss, graph=graph, engine="traced")

    def gradients(m: nn.Module) -> Tensor:
        found = step(net, lambda: m(x, targets=target), {}).gradients
        return torch.cat([found[n].flatten() for n in sorted(found)])

    plain = gradients(Plain(net, loss))
    exact = (gradients(module) - plain).norm()
    cost = rowtune.predict(training, plan, engine="traced")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    found = measure_memory(
        lambda: module(x, targets=target).backward(), module, optimizer, [x, target], "cpu"
    )
    assert abs(cost.peak_bytes / found.peak_bytes - 1) < 0.01
    monkeypatch.setattr("rowtune.runtime.stores.branches.EDGES", {})
    assert exact < 0.85 * (gradients(module) - plain).norm()


def test_signs_that_a_store_keeps_are_not_kept_again():
    """A leaky ReLU behind a convolution: what it reads is in the store as it was, but for its size."""
    node = next(n for n in _one(nn.LeakyReLU()).nodes if n.op == "leaky_relu")
    keeping = Keeping(Int8(), frozenset())
    x = torch.randn(1, 8, 64, 64)
    for edges, branched in ((edges_of(node), False), ((Edge(0.5),), True)):
        remaking = Remaking(frozenset(), 0, keeping, rounded=True)
        remaking.edges = edges
        assert isinstance(remaking.pack(x), Branched) == branched
    remaking = Remaking(frozenset(), 0, Keeping(Int8(), {storage_of(x)}), rounded=True)
    remaking.edges = (Edge(0.5),)
    assert not isinstance(remaking.pack(x), Branched)  # it is not rounded: it lives anyway


def _one(module: nn.Module) -> Graph:
    return rowtune.trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), module), (torch.randn(1, 3, 8, 8),))
