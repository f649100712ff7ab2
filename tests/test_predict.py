"""Predicted memory against measured memory: the prediction is made of recordings of what runs."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn
from zones import PlanSpace, space

import rowtune
from rowtune.cost.predict import Cost
from rowtune.graph.graph import Graph
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.lower import lower
from rowtune.plan.plan import Plan
from rowtune.runtime.recorder import record
from rowtune.tune.meter import Memory, allocator_peak, measure_memory
from rowtune.zoo import build

# A quarter of the published widths or less, and images large enough that activations set the peak.
_STAGES = {"depths": (2, 1, 1, 1, 1, 1), "classes": 5, "dropout": 0.0}
NETS: dict[str, tuple[dict[str, Any], int, int]] = {
    "convnext_tiny": ({"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128), "classes": 10}, 1, 128),
    "edsr": ({"blocks": 3, "channels": 16}, 2, 80),
    "per_pixel": ({"layers": 6, "channels": 8}, 1, 128),
    "resnet50": ({"width": 16, "depths": (1, 1, 1, 1), "classes": 10}, 2, 128),
    "unet": ({"base": 8, "depth": 3}, 1, 144),
    "unet_bn": ({"base": 8, "depth": 3}, 1, 128),
    "vgg16": ({"width": 8, "classes": 10}, 1, 160),
    "vgg16_features": ({"width": 8}, 1, 160),
}
# Asked about warm starts only.
MORE: dict[str, tuple[dict[str, Any], int, int]] = {
    "deeplabv3plus": (
        {"width": 8, "depths": (1, 1, 1, 1), "channels": 16, "low_channels": 8, "rates": (1, 2)}
        | {"classes": 3, "dropout": 0.0},
        2,
        96,
    ),
    "densenet121": ({"growth": 8, "depths": (2, 2, 2, 2), "width": 16, "classes": 5}, 2, 128),
    "efficientnet_v2_s": ({"width": 0.5} | _STAGES, 2, 128),
    "hrnet_w18": (
        {"width": 8, "stem": 16, "modules": (1, 1), "blocks": 1, "head": "segmentation", "classes": 3},
        1,
        128,
    ),
    "mobilenet_v3_large": ({"width": 0.5} | _STAGES | {"depths": (1, 1, 1, 1, 1, 1)}, 2, 128),
    "unet3d": ({"base": 4, "depth": 2, "in_channels": 3}, 1, 32),
}
SAMPLED = ("vgg16", "unet", "edsr")
OPTIMIZERS = {
    0: lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    1: lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    2: lambda parameters: torch.optim.Adam(parameters, lr=1e-4, fused=True),
}


class Bench:
    """A network with its batch and training graph; plans are predicted and measured on it."""

    def __init__(self, name: str) -> None:
        options, batch, size = (NETS | MORE)[name]
        self.model = build(name, **options)
        self.x = torch.randn(batch, 3, *[size] * (3 if name == "unet3d" else 2))
        self.graph: Graph = rowtune.trace(self.model, (self.x,))
        output = self.graph.values[self.graph.outputs[0]]
        self.loss = parse(default_name(output.shape, tuple(self.x.shape)))
        self.target = synthetic_target(self.loss, output.shape, torch.float32, 1)
        self.training = with_loss(self.graph, self.loss)
        self.space: PlanSpace = space(self.training)

    def predict(self, plan: Plan, slots: int = 1, engine: Any = "traced") -> Cost:
        return rowtune.predict(self.training, plan, slots, engine=engine)

    def measure(self, plan: Plan, slots: int = 1, engine: Any = "traced") -> Memory:
        module = rowtune.apply(self.model, plan, self.loss, engine=engine)
        module.lists.after = 0
        optimizer = OPTIMIZERS[slots](self.model.parameters())

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            module(self.x, targets=self.target).backward()
            optimizer.step()

        step()  # steady state: the optimizer has its state, the module its program
        return measure_memory(step, module, optimizer, [self.x, self.target], "cpu")

    def errors(self, plan: Plan, slots: int = 1) -> tuple[float, float]:
        """Relative errors of the peak and of the activation peak."""
        ours, real = self.predict(plan, slots), self.measure(plan, slots)
        return (
            abs(ours.peak_bytes / real.peak_bytes - 1),
            abs(ours.activation_bytes / real.activation_bytes - 1),
        )


BENCHES: list[Bench] = []


@cache
def bench(name: str) -> Bench:
    BENCHES.append(Bench(name))
    return BENCHES[-1]


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Modules of one network at one shape share its graph: tracing is not what is tested here."""

    def known(model: nn.Module, inputs: Any, **_: Any) -> Graph:
        return next(b.graph for b in BENCHES if b.model is model)

    monkeypatch.setattr("rowtune.runtime.module.trace", known)


def draw(space: PlanSpace, count: int, seed: int = 0) -> list[Plan]:
    rng = random.Random(seed)
    return [space.plan({k.name: rng.choice(k.choices) for k in space.knobs}) for _ in range(count)]


def test_random_plans():
    """The project's promise for predictions: 0.1% in the median and 1% at worst (issue 10)."""
    found = {
        (name, plan): bench(name).errors(plan) for name in SAMPLED for plan in draw(bench(name).space, 11)
    }
    assert len(found) > 28
    peak, activations = zip(*found.values(), strict=True)
    assert median(peak) <= 0.001 and max(peak) <= 0.01, max(found, key=lambda k: found[k][0])
    assert median(activations) <= 0.001 and max(activations) <= 0.01, max(found, key=lambda k: found[k][1])
    # Not because all plans are alike: the least takes far less than the most.
    for name in SAMPLED:
        sizes = [bench(name).predict(plan).activation_bytes for n, plan in found if n == name]
        assert min(sizes) < 0.7 * max(sizes)


def test_plans_that_run_alike_are_known_for_it():
    """How tapes are made says nothing where every band is on its own; heights end at the image's."""
    made = bench("unet_bn")

    def program(band: int, halo: str, tapes: str) -> str:
        plan = rowtune.uniform_plan(made.training, "rows", band, halo, tapes=tapes)
        return rowtune.predict(made.training, plan).program

    for halo in ("recompute", "cache"):
        assert len({program(32, halo, tapes) for tapes in ("split", "whole", "late")}) == 1
    assert len({program(32, "sweep", tapes) for tapes in ("split", "whole", "late")}) == 3
    assert program(512, "recompute", "split") == program(256, "recompute", "split")
    assert program(16, "recompute", "split") != program(32, "recompute", "split")


@pytest.mark.parametrize("name", [*NETS, *MORE])
def test_warm_starts(name):
    """A third of what a search tries first, and random plans."""
    found = {}
    plans = [bench(name).space.plan(values) for values in bench(name).space.guesses()[1::3]]
    for plan in (*plans, *draw(bench(name).space, 2, seed=1)):
        ours, real = bench(name).predict(plan).activation_bytes, bench(name).measure(plan).activation_bytes
        found[str(plan)] = ours / real - 1
    off = [abs(error) for error in found.values()]
    assert median(off) <= 0.001, found
    assert max(off) <= 0.01, found


@pytest.mark.parametrize("name", ["per_pixel", "unet_bn", "resnet50", "edsr"])
def test_lists_take_what_is_predicted(name, monkeypatch):
    """What trains: tensors end with their last use. What lists share lives longer, at most 16 kB each: that
    is much of networks as small as these. Inside a checkpoint less is taken than is predicted."""
    monkeypatch.setattr("rowtune.runtime.lists.rewrites.shared.SMALL", 64)
    plans = [bench(name).space.plan(values) for values in bench(name).space.guesses()[::3]]
    plans += [rowtune.uniform_plan(bench(name).training, "rows", 16, halo) for halo in ("cache", "recompute")]
    found = []
    for plan in plans:
        predicted = bench(name).predict(plan, engine="listed").activation_bytes
        found.append(bench(name).measure(plan, engine="listed").activation_bytes / predicted - 1)
        assert predicted <= bench(name).predict(plan).activation_bytes
    assert median(map(abs, found)) <= 0.002, found
    assert -0.2 < min(found) and max(found) < 0.02, found


@pytest.mark.parametrize("height", [64, 128])
def test_what_nobody_reads_is_left_out_of_loops_too(height):
    """Boundary rows in front of a pixel shuffle. Small calls that are shared make the last turn of a loop
    unlike the others here: what is left out all the same is what may be."""
    with torch.device("meta"):
        model = build("edsr", blocks=1, channels=8)
    graph = rowtune.trace(model, (torch.empty(1, 3, height, 16, device="meta"),))
    graph = with_loss(replace(graph, device="cpu"), parse("mse"))
    plan = rowtune.uniform_plan(graph, "rows", 8, tapes="replay")
    real = record(lower(graph, plan), "listed").activation_bytes
    assert rowtune.predict(graph, plan, 0).activation_bytes == pytest.approx(real, abs=64)
    assert real < 0.95 * record(lower(graph, plan), "traced").activation_bytes


@pytest.mark.parametrize("name", NETS)
def test_plain_training(name):
    peak, activations = bench(name).errors(rowtune.uniform_plan(bench(name).training, "keep"))
    assert max(peak, activations) < 0.001


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("halo", ["recompute", "cache", "sweep"])
def test_rows_everywhere(name, halo):
    plan = rowtune.uniform_plan(bench(name).training, "rows", 16, halo)
    peak, activations = bench(name).errors(plan)
    assert max(peak, activations) < 0.005


@pytest.mark.parametrize("name", ["resnet50", "unet_bn"])
@pytest.mark.parametrize("way", ["store", "recompute", "narrow", "passes"])
def test_barriers(name, way):
    found = {}
    for halo in ("recompute", "sweep"):
        plan = rowtune.uniform_plan(bench(name).training, "rows", 16, halo, barriers=way)  # type: ignore[arg-type]
        found[halo] = bench(name).predict(plan).activation_bytes
        peak, activations = bench(name).errors(plan)
        assert max(peak, activations) < 0.005
    stored = rowtune.uniform_plan(bench(name).training, "rows", 16, "recompute", barriers="store")
    if way == "narrow":
        assert found["recompute"] < 0.85 * bench(name).predict(stored).activation_bytes


@pytest.mark.parametrize("name", ["edsr", "unet_bn"])
def test_checkpoint(name):
    knobs = bench(name).space
    plan = knobs.plan(knobs.guesses()[1])
    assert all(s.policy == "checkpoint" for s in plan.segments)
    peak, activations = bench(name).errors(plan)
    assert max(peak, activations) < 0.001


@pytest.mark.parametrize("slots", OPTIMIZERS)
@pytest.mark.parametrize("name", ["vgg16", "edsr"])
def test_optimizers(name, slots):
    """vgg16's state is what counts, edsr's is nothing beside its activations."""
    peak, _ = bench(name).errors(rowtune.uniform_plan(bench(name).training, "rows", 16, "sweep"), slots)
    assert peak < 0.001


def test_images_one_at_a_time():
    plan = rowtune.uniform_plan(bench("edsr").training, "rows", 16, "sweep", images=1)
    peak, activations = bench("edsr").errors(plan)
    assert max(peak, activations) < 0.001


def test_frozen_layers():
    """A pretrained front: nothing is kept for it, and it has neither gradients nor optimizer state."""
    made = Bench("vgg16_features")
    for parameter in list(made.model.parameters())[:8]:
        parameter.requires_grad_(False)
    made.graph = rowtune.trace(made.model, (made.x,))
    made.training = with_loss(made.graph, made.loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rowtune.runtime.module.trace", lambda *_, **__: made.graph)
        for policy in ("keep", "rows"):
            peak, activations = made.errors(rowtune.uniform_plan(made.training, policy, 16))
            assert max(peak, activations) < 0.005, policy


def test_a_prediction_at_8192_needs_no_data():
    """Full-size VGG-16 on a slide: traced and predicted on a machine that could never hold it."""
    with torch.device("meta"):
        model = build("vgg16")
    graphs: list[Graph] = []
    shape = (1, 3, 8192, 8192)

    def trace() -> None:
        graph = rowtune.trace(model, (torch.empty(shape, device="meta"),))
        graphs.append(with_loss(graph, parse("cross_entropy")))

    assert allocator_peak(trace) < 1e6
    plain = rowtune.uniform_plan(graphs[0], "keep")
    banded = rowtune.uniform_plan(graphs[0], "rows", 32, "sweep")
    costs: list[Cost] = []
    assert allocator_peak(lambda: costs.extend(rowtune.predict(graphs[0], p) for p in (plain, banded))) < 1e6
    assert costs[0].activation_bytes > 80e9  # 64 channels of 8192 x 8192 take 17 GB, and there are four
    assert costs[1].activation_bytes < 0.2 * costs[0].activation_bytes


def test_meta_inputs_stand_for_real_ones():
    """Sizes and types are all that tracing reads: the same graph, the same predictions."""
    made = bench("unet")
    graph = rowtune.trace(made.model, (torch.empty(made.x.shape, device="meta"),))
    assert graph.fingerprint == made.graph.fingerprint
    assert graph.values.keys() == made.graph.values.keys()
    assert all(graph.values[n].shape == v.shape for n, v in made.graph.values.items())
    huge: list[Graph] = []
    assert (
        allocator_peak(
            lambda: huge.append(rowtune.trace(made.model, (torch.empty(1, 3, 8192, 8192, device="meta"),)))
        )
        < 1e6
    )
    assert huge[0].values[huge[0].outputs[0]].shape == (1, 2, 8192, 8192)
