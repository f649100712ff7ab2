"""Plans predicted from some dozens of bands, against recordings of the same steps with every band."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from test_recording import without_tables
from torch import nn
from zones import space

import rowtune
from rowtune.graph.bands import banding
from rowtune.graph.graph import Graph
from rowtune.graph.losses import default_name, parse
from rowtune.graph.rules import RowRule
from rowtune.graph.training import with_loss
from rowtune.plan import repeat
from rowtune.plan.lower import lower
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.program import Banded
from rowtune.rows import Chained
from rowtune.runtime.recorder import record
from rowtune.zoo import build

NETS: dict[str, dict[str, Any]] = {
    "edsr": {"blocks": 4, "channels": 8},
    "unet": {"base": 8, "depth": 3},
    "vgg16_features": {"width": 8},
}
WAYS = [
    ("recompute", "split"),
    ("cache", "split"),
    *(("sweep", t) for t in ("split", "whole", "late", "replay")),
]


def training_graph(model: nn.Module, *shape: int) -> Graph:
    """Traced without data."""
    graph = rowtune.trace(model.to("meta"), (torch.empty(shape, device="meta"),))
    output = graph.values[graph.outputs[0]]
    return with_loss(graph, parse(default_name(output.shape, shape)))


@cache
def zoo_graph(name: str, rows: int, images: int = 1, columns: int = 64) -> Graph:
    return training_graph(build(name, **NETS[name]), images, 3, rows, columns)


def shortened(graph: Graph, plan: Plan) -> bool:
    """Whether bands were left out at all."""
    program = lower(graph, plan, repeat.shortened)
    return any(isinstance(s.how, Banded) and s.how.repeat is not None for s in program.segments)


def assert_same(graph: Graph, plan: Plan, within: float = 1e-4) -> None:
    """As a recording of the whole step, but for the tables of operators, which no step makes."""
    ours = rowtune.predict(graph, plan, engine="traced")
    full = without_tables(record(lower(graph, plan), "traced"))
    assert ours.activation_bytes == pytest.approx(full.activation_bytes, rel=within, abs=64)
    assert ours.peak_bytes == pytest.approx(full.peak_bytes, rel=within, abs=64)


@pytest.mark.parametrize("halo, tapes", WAYS)
@pytest.mark.parametrize(
    "name, rows, band", [("edsr", 192, 8), ("unet", 384, 8), ("vgg16_features", 1024, 1)]
)
def test_interior_bands_are_alike(name, rows, band, halo, tapes):
    graph = zoo_graph(name, rows)
    plan = rowtune.uniform_plan(graph, "rows", band, halo, tapes=tapes)
    assert shortened(graph, plan)
    assert_same(graph, plan)


@pytest.mark.parametrize("name, rows", [("edsr", 128), ("unet", 320), ("vgg16_features", 500)])
def test_random_plans(name, rows):
    graph = zoo_graph(name, rows)
    knobs, rng = space(graph), random.Random(rows)
    plans = [knobs.plan({k.name: rng.choice(k.choices) for k in knobs.knobs}) for _ in range(6)]
    assert any(shortened(graph, plan) for plan in plans)
    for plan in plans:
        assert_same(graph, plan)


@pytest.mark.parametrize("halo", ["recompute", "cache", "sweep"])
def test_bands_of_rows_inside_bands_of_images(halo):
    graph = zoo_graph("unet", 512, images=3)
    plan = rowtune.uniform_plan(graph, "rows", 8, halo, images=2)
    assert shortened(graph, plan)
    assert_same(graph, plan)


@pytest.mark.parametrize("halo", ["recompute", "cache", "sweep"])
@pytest.mark.parametrize("name", ["edsr", "vgg16_features"])
def test_many_bands_of_images(name, halo):
    """The last band of images is smaller; a kept rest of the network makes edsr's segment no single sweep."""
    graph = zoo_graph(name, 128, images=11)
    nodes = graph.nodes
    cut = len(nodes) * 2 // 3
    plan = Plan(
        (
            Segment(nodes[0].name, nodes[cut].name, "rows", 8, halo, images=2),
            Segment(nodes[cut + 1].name, nodes[-1].name),
        )
    )
    for made in (plan, rowtune.uniform_plan(graph, "rows", 8, halo, images=2)):
        assert_same(graph, made)


def test_rows_that_a_band_or_a_pool_leaves_over():
    """Neither the band height nor the pools divide the image's height."""
    for rows, band in ((1003, 1), (967, 2)):
        graph = zoo_graph("vgg16_features", rows)
        plan = rowtune.uniform_plan(graph, "rows", band, "sweep")
        assert shortened(graph, plan)
        assert_same(graph, plan)


class Resampled(nn.Module):
    """Down by two, through a reflected pad, and up again by a table of rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.pad = nn.ReflectionPad2d(2)
        self.body = nn.Conv2d(8, 8, 5)
        self.up = nn.Upsample(**options)
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.body(self.pad(self.down(x)))))


@pytest.mark.parametrize(
    "options, exact",
    [
        ({"scale_factor": 2, "mode": "nearest"}, True),
        ({"scale_factor": 1.5, "mode": "bilinear"}, True),
        ({"scale_factor": 2, "mode": "bilinear", "align_corners": True}, False),
        ({"size": (701, 64), "mode": "nearest"}, False),
    ],
)
def test_tables_of_rows(options, exact):
    """Aligned corners and odd sizes make a table drift over the image; an estimate may be a row off."""
    graph = training_graph(Resampled(**options), 1, 3, 768, 64)
    for halo, tapes in WAYS:
        plan = rowtune.uniform_plan(graph, "rows", 6, halo, tapes=tapes)
        assert shortened(graph, plan) or "size" in options  # its table comes round after 31 rows, or never
        assert_same(graph, plan, 1e-4 if exact else 0.005)


class Pooled(nn.Module):
    """Adds a feature map and its pooled self, which lacks a row where the height is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        small = self.up(nn.functional.max_pool2d(x, 2))
        return x[..., : small.shape[2], : small.shape[3]] + small[..., : x.shape[2], : x.shape[3]]


@pytest.mark.parametrize("rows", [512, 511])
def test_outputs_of_unlike_heights_are_lowered_in_full(rows):
    """511 rows and 255 of the pool: bands of one drift along bands of the other."""
    graph = training_graph(Pooled(), 1, 3, rows, rows)
    names = [node.name for node in graph.nodes]
    cut = next(i for i, node in enumerate(graph.nodes) if node.op.startswith("max_pool")) + 1
    plan = Plan((Segment(names[0], names[cut - 1], "rows", 4), Segment(names[cut], names[-1])))
    assert shortened(graph, plan) == (rows == 512)
    assert_same(graph, plan)


@pytest.mark.parametrize("halo, tapes", WAYS)
@pytest.mark.parametrize("name, band", [("edsr", 16), ("unet", 16), ("vgg16_features", 1)])
def test_work_does_not_grow_with_the_image(name, band, halo, tapes):
    """Pieces of rows lowered for a slide, against those for an image an eighth as tall."""

    def pieces(rows: int) -> int:
        graph = zoo_graph(name, rows)
        plan = rowtune.uniform_plan(graph, "rows", band, halo, tapes=tapes)
        program = lower(graph, plan, repeat.shortened)
        return sum(len(s.how.pieces) for s in program.segments if isinstance(s.how, Banded))

    assert pieces(8192) <= 1.1 * pieces(1024)


class Shortcut(nn.Module):
    """Between barriers, two convolutions whose inputs have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.short = nn.Conv2d(3, 8, 1, stride=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.norms[0](self.first(x)).relu())
        return (self.norms[1](y) + self.norms[2](self.short(x))).relu()


@pytest.mark.parametrize("rows, barriers", [(128, "store"), (96, "passes"), (125, "store")])
def test_what_hangs_together_with_nothing_else_repeats_too(rows, barriers):
    """125 rows are halved to 63: not the same share of all."""
    graph = training_graph(Shortcut(), 1, 3, rows, 16)
    plan = rowtune.uniform_plan(graph, "rows", 4, "sweep", barriers=barriers)
    runs = [s.how for s in lower(graph, plan, repeat.shortened).segments]
    assert rows % 2 or all(run.repeat for run in runs if isinstance(run, Banded))
    assert_same(graph, plan)


class Patches(nn.Module):
    """Rows of patches, read through two windows: patches by their place, and rows of the image by patch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(self.first(x), 3, padding=1).relu()
        return self.last(nn.functional.fold(patches, x.shape[2:], 3, padding=1))


@pytest.mark.parametrize("halo", ["recompute", "cache", "sweep"])
def test_windows_on_windows(halo):
    graph = training_graph(Patches(), 1, 3, 384, 8)
    assert any(
        isinstance(read.window, Chained) for rule in banding(graph, 2).rules.values()
        if isinstance(rule, RowRule) for read in rule.reads.values()
    )  # fmt: skip
    plan = rowtune.uniform_plan(graph, "rows", 8, halo)
    assert shortened(graph, plan)
    assert_same(graph, plan)
