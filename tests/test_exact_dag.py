"""The contract: any plan gives the gradients of plain PyTorch, on random small networks."""

from __future__ import annotations

import pytest
import torch
from exactness import TOLERANCE, RandomNet, error, step
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import rowtune
from rowtune.errors import ModelError
from rowtune.graph.bands import banding
from rowtune.graph.cuts import stretches
from rowtune.graph.losses import parse
from rowtune.graph.training import synthetic_target, with_loss

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # drawn so

small = st.integers(0, 2)
options = st.fixed_dictionaries(
    {
        "k": st.integers(1, 4), "s": st.integers(1, 3), "p": st.integers(0, 3), "d": st.integers(1, 2),
        "g": st.sampled_from([1, 2, 4]), "op": st.integers(0, 1), "ceil": st.booleans(),
        "count": st.booleans(),
        "scale": st.sampled_from([2, 3, 1.5, 0.7]), "corners": st.booleans(),
        "a": st.integers(0, 2), "b": st.integers(0, 2),
        "mode": st.sampled_from(["constant", "reflect", "replicate"]),
    }
)  # fmt: skip
kinds = [
    "conv", "conv", "conv", "same", "transposed", "max", "avg", "nearest", "bilinear", "size", "pad",
    "shuffle", "unshuffle", "norm", "crop", "chunk", "batchnorm",
]  # fmt: skip
layers = st.lists(st.tuples(st.sampled_from(kinds), options, small), min_size=1, max_size=6)


def plain_or_skip(net: RandomNet, x: torch.Tensor) -> None:
    """Some drawn networks shrink to nothing or reflect more than there is; those are not networks."""
    try:
        with torch.no_grad():
            out = net(x)
    except RuntimeError:
        assume(False)
    assume(out.numel() > 0 and out.shape[2:].numel() < 4000)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    layers=layers, rank=st.sampled_from([2, 2, 2, 1, 3]), batch=st.integers(1, 3), height=st.integers(3, 17),
    width=st.integers(3, 7), band=st.integers(1, 17), halo=st.sampled_from(["recompute", "cache", "sweep"]),
    tapes=st.sampled_from(["split", "whole", "late", "replay"]), images=st.integers(0, 2),
    axis=st.sampled_from([2, 2, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_networks_are_exact(layers, rank, batch, height, width, band, halo, tapes, images, axis, seed):
    torch.manual_seed(seed)
    net = RandomNet(layers, 4, rank).double()
    x = torch.randn(batch, 4, *[height, width, 4][:rank], dtype=torch.float64, requires_grad=True)
    axis = min(axis, rank + 1)
    plain_or_skip(net, x)
    graph = rowtune.trace(net, (x,))
    split = images if images < batch else 0
    plan = rowtune.uniform_plan(graph, "rows", band, halo, images=split, tapes=tapes, axis=axis)
    module = rowtune.apply(net, plan)
    plain = step(net, lambda: net(x), {"x": x})
    assert error(step(net, lambda: module(x), {"x": x}), plain) < TOLERANCE


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    layers=layers, batch=st.integers(1, 2), height=st.integers(3, 13), band=st.integers(1, 13),
    halo=st.sampled_from(["recompute", "cache", "sweep"]), images=st.integers(0, 1), seed=st.integers(0, 99),
    name=st.sampled_from([
        "cross_entropy", "cross_entropy:ignore_index=1", "cross_entropy:reduction=sum", "mse",
        "l1:reduction=sum", "smooth_l1:beta=0.5", "bce_with_logits", "dice_ce", "dice_ce:ignore_index=0",
    ]),
)  # fmt: skip
def test_losses_in_bands_are_exact(layers, batch, height, band, halo, images, seed, name):
    torch.manual_seed(seed)
    net = RandomNet(layers, 4).double()
    x = torch.randn(batch, 4, height, 6, dtype=torch.float64, requires_grad=True)
    plain_or_skip(net, x)
    loss = parse(name)
    graph = rowtune.trace(net, (x,))
    target = synthetic_target(loss, graph.values[graph.outputs[0]].shape, torch.float64, seed)
    if "ignore" in name:
        assume(bool((target != (1 if "=1" in name else 0)).any()))
    training = with_loss(graph, loss)
    split = images if images < batch else 0
    plan = rowtune.uniform_plan(training, "rows", band, halo, images=split)
    module = rowtune.apply(net, plan, loss)
    plain = step(net, lambda: loss(net(x), target), {"x": x})
    assert error(step(net, lambda: module(x, targets=target), {"x": x}), plain) < TOLERANCE


def test_the_drawn_layers_are_really_banded():
    """Guards the tests above: a rule that turned opaque would make them pass in plain segments."""
    option = {"k": 3, "s": 2, "p": 1, "d": 1, "g": 2, "op": 1, "ceil": True, "count": False, "scale": 1.5,
              "corners": True, "a": 1, "b": 2, "mode": "reflect"}  # fmt: skip
    for kind in kinds:
        for rank in (1, 2, 3):
            net = RandomNet([(kind, option, 0)], 4, rank)
            x = torch.randn(1, 4, *[12, 8, 8][:rank])
            try:
                graph = rowtune.trace(net, (x,))
            except ModelError:
                continue  # reflect pads of rank 3 and the like
            assert stretches(graph, 2) == [(0, len(graph.nodes))], (kind, rank, banding(graph, 2).rules)


@pytest.mark.parametrize("policy", ["keep", "checkpoint"])
def test_plain_policies_are_exact(policy):
    net = RandomNet([("conv", {"k": 3, "s": 2, "p": 1, "d": 1, "g": 1}, 0)] * 3, 4).double()
    x = torch.randn(2, 4, 16, 9, dtype=torch.float64, requires_grad=True)
    graph = rowtune.trace(net, (x,))
    for images in (0, 1) if policy == "checkpoint" else (0,):
        module = rowtune.apply(net, rowtune.uniform_plan(graph, policy, images=images))
        plain = step(net, lambda: net(x), {"x": x})
        assert error(step(net, lambda m=module: m(x), {"x": x}), plain) < TOLERANCE
