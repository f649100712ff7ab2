"""A model's map: stages that cover it, what plain PyTorch keeps in them, what bounds banding, and peaks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import rowtune
from rowtune.cli.app import app
from rowtune.cost.predict import predict
from rowtune.graph.losses import parse
from rowtune.graph.stages import MOST, multiply_adds, stages
from rowtune.graph.training import with_loss
from rowtune.plan.uniform import uniform_plan
from rowtune.problem import Source
from rowtune.report.network import describe, mapped_stages
from rowtune.tune.step import define

SIZES = {
    "unet": ({"base": 4, "depth": 2}, (1, 3, 64, 32)),
    "unet_bn": ({"base": 4, "depth": 2}, (1, 3, 64, 32)),
    "resnet50": ({}, (1, 3, 64, 64)),
}


def graph_of(name: str) -> rowtune.graph.graph.Graph:
    arguments, shape = SIZES[name]
    with torch.device("meta"):
        model = rowtune.zoo.build(name, **arguments)
    return rowtune.trace(model, (torch.zeros(shape, device="meta"),))


@pytest.mark.parametrize("name", SIZES)
def test_stages_cover_the_network_once(name: str) -> None:
    graph = graph_of(name)
    found = stages(graph)
    assert 1 < len(found) <= MOST
    assert [s.start for s in found[1:]] == [s.stop for s in found[:-1]]
    assert found[0].start == 0 and found[-1].stop == len(graph.nodes)
    assert all(s.name and s.shape for s in found)


class SideBySide(nn.Module):
    """Two resolutions in turns, as in HRNet: forty changes of size."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(20))
        self.coarse = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.avg_pool2d(x, 2)
        for fine, coarse in zip(self.fine, self.coarse, strict=True):
            x, y = fine(x), coarse(y)
        return x + nn.functional.interpolate(y, scale_factor=2.0)


def test_too_many_stages_are_joined() -> None:
    graph = rowtune.trace(SideBySide(), (torch.zeros(1, 3, 16, 16),))
    found = stages(graph)
    assert len(found) == MOST and found[-1].stop == len(graph.nodes)
    assert [s.start for s in found[1:]] == [s.stop for s in found[:-1]]


def test_a_stage_is_one_resolution() -> None:
    heights = [stage.shape[2] for stage in stages(graph_of("unet"))]
    assert heights == [64, 32, 16, 32, 32, 64, 64, 64]


@pytest.mark.parametrize("name", ["unet", "resnet50"])
def test_multiply_adds_are_torchs_count(name: str) -> None:
    arguments, shape = SIZES[name]
    model, x = rowtune.zoo.build(name, **arguments), torch.zeros(shape)
    with FlopCounterMode(display=False) as counter:
        model(x)
    graph = graph_of(name)
    assert 2 * multiply_adds(graph, graph.nodes) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["unet", "unet_bn"])
def test_what_plain_keeps_adds_up(name: str) -> None:
    """All that is alive when backward begins is kept by some stage; the peak is soon after."""
    graph = with_loss(graph_of(name), parse("cross_entropy"))
    kept = sum(stage.kept_bytes for stage in mapped_stages(graph))
    activations = predict(graph, uniform_plan(graph, "keep")).activation_bytes
    assert 0.6 * activations < kept < activations


class Middle(nn.Module):
    """Rows turned around between two convolutions, the second of which is normed."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.after(self.before(x).flip(2))).relu()


def test_where_banding_stops_and_why() -> None:
    graph = rowtune.trace(Middle(), (torch.zeros(1, 3, 16, 16),))
    found = mapped_stages(with_loss(graph, parse("mse")))
    (stopped,) = [s for s in found if s.banding == "stops"]
    ((operator, reason),) = stopped.stops
    assert operator == "flip" and reason and "flip" in stopped.operations
    assert "moments" not in {op for s in found for op in s.operations}


def test_peaks_of_three_ways_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowtune.tune.fit.least_peaks.__defaults__", (0.5,))
    source = Source("zoo", "unet_bn", (("base", 4), ("depth", 1)))
    work = define(source, ["1x3x64x16"], loss="cross_entropy")
    told: list[str] = []
    found = describe(work, told.append)
    peaks = found["predicted_peaks"]
    assert peaks["rowtune"] <= peaks["checkpointing"] < peaks["plain"] == found["plain_peak_bytes"]
    assert told and [s["banding"] for s in found["stages"]].count("stops") == 0
    words = ["inspect", "zoo:unet_bn", "--model-arg", "base=4", "--model-arg", "depth=1"]
    for columns in ("80", "140"):
        shown = CliRunner().invoke(app, [*words, "--shape", "1x3x64x16"], env={"COLUMNS": columns})
        assert shown.exit_code == 0, shown.output
        assert max(map(len, shown.stdout.splitlines())) <= int(columns)
        for text in ("down.0", "1x4x64x16", "barrier", "smallest plan", "best checkpointing"):
            assert text in shown.stdout
        assert ("conv2d" in shown.stdout) == (columns == "140")
