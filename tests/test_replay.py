"""Backward graphs made again from line buffers, and operators that run in place."""

from __future__ import annotations

import pytest
import torch
from exactness import TOLERANCE, error, step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rowtune
from rowtune.graph.losses import parse
from rowtune.graph.training import with_loss
from rowtune.plan.lower import lower

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.2, 0.3),
    "leaky_relu": nn.LeakyReLU(0.1),
    "a growing leaky_relu": nn.LeakyReLU(-0.3),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
}


class Stack(nn.Module):
    """Every kind of step: convolutions alone, before an activation, a sum, a shuffle, a product, a pool."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.wide, self.tail = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        y = self.activation(self.convs[1](x))
        x = x + self.convs[2](y)
        y = self.activation(x + self.convs[3](2 * x))
        z = nn.functional.max_pool2d(self.activation(self.wide(y * x)), 2)
        return self.tail(nn.functional.pixel_shuffle(z, 2))


@pytest.mark.parametrize("tapes", ["replay", "late"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_exact_for_every_kind_of_step(name, tapes):
    torch.manual_seed(0)
    net = Stack(ACTIVATIONS[name]).double()
    x = torch.randn(2, 4, 18, 6, dtype=torch.float64, requires_grad=True)
    plain = step(net, lambda: net(x), {"x": x})
    graph = rowtune.trace(net, (x,))
    for band, images in ((1, 0), (4, 1), (5, 0), (18, 0)):
        plan = rowtune.uniform_plan(graph, "rows", band, "sweep", images=images, tapes=tapes)
        module = rowtune.apply(net, plan)
        assert error(step(net, lambda: module(x), {"x": x}), plain) < TOLERANCE  # noqa: B023


def test_no_convolution_is_run_again():
    """Split tapes run none twice, and have more pieces."""
    net, loss = rowtune.zoo.edsr(blocks=2, channels=8), parse("mse")
    x, target = torch.randn(1, 3, 40, 12), torch.randn(1, 3, 80, 24)
    graph = with_loss(rowtune.trace(net, (x,)), loss)

    def operations(tapes: str) -> int:
        module = rowtune.apply(net, rowtune.uniform_plan(graph, "rows", 8, "sweep", tapes=tapes), loss)
        with FlopCounterMode(display=False) as counter:
            module(x, targets=target).backward()
        return counter.get_total_flops()

    replayed = operations("replay")
    assert replayed <= operations("split")
    assert replayed < operations("late"), "halves of pairs of layers are run again"


def test_one_piece_a_band_forward_and_one_backward():
    """Split tapes need two; where frontiers lie in a row's distance that is pieces of a few rows."""
    net = rowtune.zoo.edsr(blocks=4, channels=8)
    graph = rowtune.trace(net, (torch.randn(1, 3, 96, 8),))

    def pieces(tapes: str) -> int:
        program = lower(graph, rowtune.uniform_plan(graph, "rows", 16, "sweep", tapes=tapes))
        return sum(type(s).__name__ == "Back" for s in program.segments[0].how.backward)

    assert pieces("replay") < 0.7 * pieces("split")


def test_only_values_that_nobody_else_reads_are_written_over():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.a(x), self.b(x)
            return torch.relu(two) + torch.relu(one) * torch.sigmoid(one)

    net = Net().double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    graph = rowtune.trace(net, (x,))
    plan = rowtune.uniform_plan(graph, "rows", 3, "recompute")
    in_place = lower(graph, plan).segments[0].how.groups[0].in_place
    relus = [n for n in graph.nodes if n.op == "relu"]
    second = next(n.name for n in relus if graph.nodes[graph.index[n.inputs[0]]].inputs[1].startswith("p_b"))
    assert set(in_place) == {second}, "the other convolution is also read by the gate"
    plain = step(net, lambda: net(x), {"x": x})
    module = rowtune.apply(net, plan)
    assert error(step(net, lambda: module(x), {"x": x}), plain) < TOLERANCE
