"""Keep segments that leave out what is cheap to make again (cheap recompute)."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import TOLERANCE, error, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from savers import case
from test_exact_barriers import LAYERS, Net, plain_and_graph, rounding, run
from torch import Tensor, nn

import rowtune
from rowtune.errors import PlanError
from rowtune.graph.graph import Graph
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import with_loss
from rowtune.plan.choices import Store
from rowtune.plan.plan import Plan
from rowtune.plan.remake import LONGEST, Block, made_again
from rowtune.zoo import build


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tensors of most of these networks are small enough to stay where they are."""
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)


def lean(graph: Graph, store: Store = "device", **whole: Any) -> Plan:
    """All of the network, kept but for what is cheap."""
    plan = rowtune.uniform_plan(graph, "keep")
    segments = tuple(replace(s, cheap="recompute", store=store) for s in plan.segments)
    return replace(plan, segments=segments, **whole)


# -- the cut -----------------------------------------------------------------------------------------------


@st.composite
def networks(draw: Any) -> list[Block]:
    """Blocks that read some before them."""
    blocks: list[Block] = []
    for i in range(draw(st.integers(1, 8))):
        known = [b.name for b in blocks]
        parents = draw(st.lists(st.sampled_from(known), max_size=3, unique=True)) if known else []
        cheap = bool(parents) and draw(st.booleans())
        size = draw(st.integers(0, 9))
        blocks.append(Block(f"b{i}", size, tuple(parents), cheap, draw(st.booleans())))
    return blocks


def bytes_kept(blocks: list[Block], kept: set[str]) -> int | None:
    """None where something that is wanted does not follow from what is kept."""
    have: set[str] = set()
    for b in blocks:
        if b.name in kept or (b.cheap and set(b.parents) <= have):
            have.add(b.name)
    return (
        sum(b.bytes for b in blocks if b.name in kept)
        if {b.name for b in blocks if b.wanted} <= have
        else None
    )


@settings(max_examples=200)
@given(blocks=networks())
def test_the_fewest_bytes_are_kept(blocks):
    """Of all sets from which what is wanted follows. (Chains of these few blocks are short.)"""
    names = [b.name for b in blocks]
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    found = (bytes_kept(blocks, set(some)) for some in subsets)
    best = min(n for n in found if n is not None)
    short = longest(blocks) <= LONGEST
    again = made_again(blocks)
    needed = wanted_of(blocks, again)
    kept = bytes_kept(blocks, needed)
    assert kept is not None and (kept == best or not short)


def longest(blocks: list[Block]) -> int:
    length: dict[str, int] = {}
    for b in blocks:
        length[b.name] = 1 + max((length[p] for p in b.parents), default=0) if b.cheap else 0
    return max(length.values())


def wanted_of(blocks: list[Block], again: frozenset[str]) -> set[str]:
    """What is kept: all that is wanted, or read by what is made again, and is not made again itself."""
    kept: set[str] = set()
    for b in blocks:
        if b.wanted and b.name not in again:
            kept.add(b.name)
        if b.name in again:
            kept |= set(b.parents) - again
    return kept


def test_chains_are_short():
    """Each block is made of the last: to make the last again would be to run all of them."""
    chain = [Block("x", 8, wanted=True)]
    chain += [Block(f"b{i}", 8, (chain[-1].name if not i else f"b{i - 1}",), True, True) for i in range(20)]
    again = made_again(chain)
    kept = [i for i in range(20) if f"b{i}" not in again]
    assert kept == [*range(LONGEST, 20, LONGEST + 1)]


# -- exactness ---------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """What real networks put between convolutions: pools with indices, joins, SiLU, dropout, views, gates."""

    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.norms = nn.ModuleList((nn.BatchNorm2d(c), nn.GroupNorm(2, c), nn.InstanceNorm2d(2 * c)))
        self.second, self.third = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * c, c, 2, 2)
        self.last = nn.Conv2d(2 * c, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.norms[0](self.first(x)))
        b = F.dropout(F.gelu(self.norms[1](self.second(a))) + a, 0.2, self.training)
        c, _ = F.max_pool2d(b, 2, return_indices=True)
        d = torch.cat((c, F.avg_pool2d(a, 2)), 1)
        e = F.relu(self.norms[2](self.third(d)))
        e = e.flatten(2).transpose(1, 2).transpose(1, 2).reshape(e.shape) * torch.sigmoid(
            e.mean((2, 3), keepdim=True)
        )
        f = self.up(F.max_pool2d(F.pad(e, (1, 1, 1, 1)), 3, 1)[:, :, ::1])
        return self.last(torch.cat((b, F.leaky_relu(f, 0.1)), 1).clamp(-3, 3))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4), stride=st.integers(1, 2),
    batch=st.integers(1, 3), height=st.integers(6, 13), width=st.integers(6, 9), seed=st.integers(0, 99),
    layout=st.sampled_from(["contiguous", "channels_last"]),
)  # fmt: skip
def test_random_networks(names, stride, batch, height, width, seed, layout):
    torch.manual_seed(seed)
    net = Net(names, stride).double()
    x = torch.randn(batch, 3, height, width, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    found = error(run(net, x, lean(graph, layout=layout)), plain)
    assert found < TOLERANCE or found < 20 * rounding(net, x, plain)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_lies_between_convolutions(layout):
    """Against a plan that keeps everything: masks are the step's, and the same."""
    net = Mixed().double()
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64, requires_grad=True)
    graph = rowtune.trace(net, (x,))
    found = []
    for plan in (rowtune.uniform_plan(graph, "keep"), lean(graph)):
        torch.manual_seed(7)
        found.append(run(net, x, replace(plan, layout=layout)))
    assert error(found[1], found[0]) < TOLERANCE
    costs = [rowtune.predict(graph, plan) for plan in (rowtune.uniform_plan(graph, "keep"), lean(graph))]
    assert costs[1].activation_bytes < 0.8 * costs[0].activation_bytes


def test_several_segments_and_several_steps():
    made = case("unet_bn")
    nodes = made.training.nodes
    plan = lean(made.training)
    (whole,) = plan.segments
    thirds = [len(nodes) * i // 3 for i in range(4)]
    parts = tuple(
        replace(whole, first=nodes[a].name, last=nodes[b - 1].name) for a, b in itertools.pairwise(thirds)
    )
    assert made.error(replace(plan, segments=parts), steps=3) < TOLERANCE


def test_frozen_parameters_and_graphs_that_are_kept():
    net = Net(["batch norm", "frozen weights", "gate"], 1).double()
    net.first.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    twin = copy.deepcopy(net)
    module = rowtune.apply(twin, lean(rowtune.trace(net, (x,))))

    def twice(call: Any) -> Tensor:
        out = call(x)
        out.sum().backward(retain_graph=True)
        return out

    plain = step(net, lambda: twice(net), {})
    assert error(step(twin, lambda: twice(module), {}), plain) < TOLERANCE


def test_second_derivatives():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    module = rowtune.apply(copy.deepcopy(net), lean(rowtune.trace(net, (x,))))
    found = []
    for call in (net, module):
        (g,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["unet_bn", "resnet50", "unet3d"])
@pytest.mark.parametrize("whole", [{}, {"dtype": "bf16"}, {"layout": "channels_last"}])
def test_it_takes_what_is_predicted(name, whole):
    made = case(name, torch.float32)
    assert made.memory(lean(made.training, **whole)).error < (0.01 if "dtype" in whole else 0.001)
    if "dtype" not in whole:
        assert made.error(lean(made.training, **whole)) < 1e-4


def test_autocast():
    """Made again under the autocast of its forward."""
    made = case("unet_bn", torch.float32)
    keep, plan = rowtune.uniform_plan(made.training, "keep"), lean(made.training)
    found = [made.step(made.apply(replace(p, dtype="bf16"))) for p in (keep, plan)]
    assert error(found[1], found[0]) < 0.05


# -- what it is for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("unet_bn", 0.6), ("resnet50", 0.66), ("unet3d", 0.55)])
def test_much_less_is_kept(name, most):
    """By the networks as people use them."""
    shape = {"resnet50": (2, 3, 224, 224), "unet_bn": (1, 3, 128, 128), "unet3d": (1, 1, 64, 64, 64)}[name]
    net, x = build(name), torch.empty(shape)
    graph = rowtune.trace(net, (x,))
    training = with_loss(graph, parse(default_name(graph.values[graph.outputs[0]].shape, shape)))
    plans = rowtune.uniform_plan(training, "keep"), lean(training)
    keep, cheap = (rowtune.predict(training, plan) for plan in plans)
    assert cheap.activation_bytes < most * keep.activation_bytes


def test_evaluation_keeps_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    module = rowtune.apply(copy.deepcopy(net), lean(rowtune.trace(net, (x,)))).eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x), net.eval()(x), rtol=0, atol=1e-12)


def test_refused():
    made = case("per_pixel")
    whole = rowtune.uniform_plan(made.training, "checkpoint").segments[0]
    with pytest.raises(PlanError, match="policy checkpoint recomputes by itself: take cheap store"):
        made.apply(Plan((replace(whole, cheap="recompute"),)))
    nested = replace(whole, inside=(replace(whole, policy="keep", cheap="recompute"),))
    with pytest.raises(PlanError, match="inside a checkpoint, which keeps everything while it is recomputed"):
        made.apply(Plan((nested,)))
    with pytest.raises(PlanError, match="cheap is one of store, recompute, not 'never'"):
        made.apply(Plan((replace(whole, policy="keep", cheap="never"),)))


@pytest.mark.parametrize("store", ["host", "bf16", "fp16"])
def test_what_is_still_kept_goes_into_a_store(store):
    made = case("unet_bn", torch.float32 if store != "host" else torch.float64)
    plan = lean(made.training, store, max_grad_error=0.0 if store == "host" else 0.4)
    assert made.error(plan, steps=2) < (TOLERANCE if store == "host" else 0.4)
    assert made.memory(plan).error < 0.01
    least, cost = rowtune.predict(made.training, lean(made.training)), rowtune.predict(made.training, plan)
    assert cost.activation_bytes < 0.9 * least.activation_bytes
    if store == "host":
        module = made.apply(plan)
        made.step(module)
        assert module.host.bytes == 0 and module.host.peak_bytes == cost.host_bytes < least.activation_bytes
