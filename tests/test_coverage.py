"""Blocks of many families of CNNs: one bandable stretch each, and exact in any bands."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import TOLERANCE, Lambda, Step, error, step
from families import conv
from family_table import FAMILIES, family
from hypothesis import given, settings
from hypothesis import strategies as st

import rowtune
from rowtune.graph.bands import banding
from rowtune.graph.cuts import opaque_nodes, stretches
from rowtune.graph.graph import Graph
from rowtune.graph.rules import Opaque

HALOS = ("recompute", "cache", "sweep")


class Case:
    """A block, its graph and plain gradients, made once."""

    def __init__(self, name: str) -> None:
        self.model = family(name)
        generator = torch.Generator().manual_seed(1)
        shape = FAMILIES[name][1]
        self.x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        self.graph: Graph = rowtune.trace(self.model, (self.x,))
        self.plain = self.step(self.model)

    def step(self, module: Any) -> Step:
        return step(self.model, lambda: module(self.x), {"x": self.x})

    def error(self, *args: Any, **options: Any) -> float:
        plan = rowtune.uniform_plan(self.graph, "rows", *args, **options)
        module = rowtune.apply(self.model, plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rowtune.runtime.module.trace", lambda *_, **__: self.graph)
            return error(self.step(module), self.plain)


case = cache(Case)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_block_is_one_stretch(name: str) -> None:
    graph = case(name).graph
    assert stretches(graph, 2) == [(0, len(graph.nodes))], opaque_nodes(graph)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("halo", HALOS)
def test_bands_are_exact(name: str, halo: Any) -> None:
    for band in (1, 3, 1000):
        assert case(name).error(band, halo) < TOLERANCE, band


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(FAMILIES)), band=st.integers(1, 40), halo=st.sampled_from(HALOS),
    tapes=st.sampled_from(["split", "whole", "late", "replay"]),
    images=st.integers(0, 1), axis=st.integers(2, 3),
)  # fmt: skip
def test_any_bands_are_exact(name, band, halo, tapes, images, axis):
    found = case(name)
    axis = min(axis, found.x.dim() - 1)
    if images and any(isinstance(r, Opaque) for r in banding(found.graph, 0).rules.values()):
        images = 0
    assert found.error(band, halo, tapes=tapes, images=images, axis=axis) < TOLERANCE


class SqueezeExcite(torch.nn.Module):
    """The gate by linear layers: its views have the number of images written into them."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(c, 2), torch.nn.Linear(2, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, _, _ = x.shape
        gate = self.second(torch.relu(self.first(F.adaptive_avg_pool2d(x, 1).view(b, c))))
        return x * torch.sigmoid(gate).view(b, c, 1, 1).expand_as(x)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("halo", HALOS)
def test_what_is_not_banded_follows_the_images(images: int, halo: Any) -> None:
    torch.manual_seed(2)
    net = torch.nn.Sequential(conv(3, 4), SqueezeExcite(4), conv(4, 2)).double()
    x = torch.randn(3, 3, 9, 5, dtype=torch.float64, requires_grad=True)
    plain = step(net, lambda: net(x), {"x": x})
    plan = rowtune.uniform_plan(rowtune.trace(net, (x,)), "rows", 4, halo, images=images)
    module = rowtune.apply(net, plan)
    assert error(step(net, lambda: module(x), {"x": x}), plain) < TOLERANCE


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), ""),
        (lambda x: x.view(4, 1, *x.shape[1:])[:, 0], ""),
        (lambda x: torch.tanh(x.flatten(0, 1)).view_as(x), "the batch axis is cut, repeated or merged"),
        (lambda x: x[:2] * x[2:], "the batch axis is cut, repeated or merged"),
        (lambda x: x + torch.ones(4, 1, 1, 1, dtype=x.dtype), "ones has an entry for every image"),
    ],
)
def test_bands_of_images_need_entry_by_entry(function: Any, reason: str) -> None:
    """The same images are sliced out of every value, so entry i must come from entry i."""
    net = torch.nn.Sequential(conv(3, 4), Lambda(function)).double()
    graph = rowtune.trace(net, (torch.randn(4, 3, 6, 5, dtype=torch.float64),))
    reasons = [why for _, _, why in opaque_nodes(graph, 0)]
    assert reasons[0].startswith(reason) if reason else not reasons
    assert not opaque_nodes(graph, 2)


def test_one_column_of_antialiased_resampling() -> None:
    """PyTorch 2.13 reads a single column in channels-last order wrongly; bands of one column must not."""
    for band, halo in ((1, "cache"), (2, "sweep"), (3, "sweep")):
        assert case("bicubic_antialias").error(band, halo, axis=3) < TOLERANCE


OPAQUE: dict[str, tuple[Any, str]] = {
    "circular": (lambda x: F.pad(x, (0, 0, 1, 1), mode="circular"), "a circular pad wraps around"),
    "roll": (lambda x: x.roll(1, 2), "a roll along the band axis"),
    "flip": (lambda x: x.flip(-2), "a flip of the band axis"),
    "softmax": (lambda x: x.softmax(2), "softmax over the band axis"),
    "sort": (lambda x: x.sort(2)[0], "sort.0 over the band axis"),
    "cat": (lambda x: torch.cat([x, x], 2), "a cat along the band axis"),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), "repeat along the band axis"),
    "merged": (lambda x: x.flatten(1, 2).unflatten(1, (4, -1)), "flatten merges the band axis with others"),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x), "einsum sums over the band axis"),
    "columns": (lambda x: x.transpose(2, 3) @ x, "matmul"),
    "attention": (
        lambda x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3),
        "the factors of scaled_dot_product_attention",
    ),
    "grid": (
        lambda x: F.grid_sample(x, torch.zeros(2, 12, 7, 2, dtype=x.dtype), align_corners=False),
        "grid_sampler has no row rule",
    ),
    "scale": (lambda x: F.interpolate(x, scale_factor=1.05, mode="bilinear"), "PyTorch's kernels disagree"),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_needs_all_rows_says_why(name: str) -> None:
    """And is run as PyTorch runs it, between the stretches around it."""
    function, reason = OPAQUE[name]
    torch.manual_seed(3)
    net = torch.nn.Sequential(conv(3, 4), Lambda(function)).double()
    x = torch.randn(2, 3, 12, 7, dtype=torch.float64, requires_grad=True)
    plain = step(net, lambda: net(x), {"x": x})
    graph = rowtune.trace(net, (x,))
    reasons = [why for _, _, why in opaque_nodes(graph)]
    assert reasons and reasons[0].startswith(reason)
    module = rowtune.apply(net, rowtune.uniform_plan(graph, "rows", 5))
    assert error(step(net, lambda: module(x), {"x": x}), plain) < TOLERANCE


class DropPath(torch.nn.Module):
    """Stochastic depth as torchvision (made empty, filled) and as timm (new_empty, bernoulli_) write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.empty([x.shape[0], 1, 1, 1], dtype=x.dtype).bernoulli_(0.7).div_(0.7)
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
        return x + torch.tanh(x) * noise + torch.sin(x) * mask


RANDOM: dict[str, Any] = {
    "dropout": torch.nn.Dropout(0.4),
    "dropout2d": torch.nn.Dropout2d(0.4),
    "dropout2d of everything": torch.nn.Dropout2d(1.0),
    "drop_path": DropPath(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_masks_do_not_stop_the_bands(name: str) -> None:
    """One stretch, the same masks in every plan, and of the right kind."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(conv(3, 8), RANDOM[name], conv(8, 2), torch.nn.Tanh()).double().train()
    x = torch.randn(3, 3, 12, 7, dtype=torch.float64, requires_grad=True)
    graph = rowtune.trace(net, (x,))
    (run,) = stretches(graph, 2)
    assert {n.op for n in graph.nodes[: run[0]]} <= {"new_empty", "empty", "bernoulli"}
    assert run[1] == len(graph.nodes)

    def results(*args: Any, **options: Any) -> Step:
        module = rowtune.apply(net, rowtune.uniform_plan(graph, *args, **options))

        def run() -> torch.Tensor:
            torch.manual_seed(11)
            return module(x)

        return step(net, run, {"x": x})

    plain = results("keep")
    assert error(results("checkpoint"), plain) < TOLERANCE
    for images in (0, 1):
        for halo in HALOS:
            assert error(results("rows", 3, halo, images=images), plain) < TOLERANCE


def test_channel_dropout_drops_whole_channels() -> None:
    net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout2d(0.3)).train()
    x = torch.ones(4, 500, 3, 2)
    module = rowtune.apply(net, rowtune.uniform_plan(rowtune.trace(net, (x,)), "rows", 2))
    torch.manual_seed(1)
    y = module(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert torch.equal(y.amax((2, 3)), y.amin((2, 3)))
    assert abs(float((y == 0).float().mean()) - 0.3) < 0.05
    net.eval()
    plan = rowtune.uniform_plan(rowtune.trace(net, (x,), training=False), "rows", 2)
    assert torch.equal(rowtune.apply(net, plan)(x), x)
