"""The contract on real architectures: whatever the plan, what plain PyTorch computes."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from exactness import TOLERANCE, Step, error, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zones import space

import rowtune
from rowtune.graph.graph import Graph
from rowtune.graph.losses import Loss, default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan
from rowtune.zoo import ZOO, build

# Arguments, and the spatial sizes: odd and not square wherever the architecture takes that.
NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "convnext_tiny": (
        {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10), "classes": 5, "layer_scale": 0.7},
        (45, 33),
    ),
    "deeplabv3plus": (
        {
            "width": 2, "depths": (1, 1, 1, 2), "channels": 4, "low_channels": 2, "rates": (1, 2),
            "classes": 3, "dropout": 0.0,
        },
        (45, 33),
    ),
    "densenet121": ({"growth": 2, "depths": (1, 2, 1, 1), "width": 4, "classes": 5}, (67, 65)),
    "edsr": ({"blocks": 2, "channels": 5, "residual_scale": 0.5}, (13, 7)),
    "efficientnet_v2_s": (
        {"width": 0.1, "depths": (2, 1, 1, 1, 1, 1), "classes": 5, "dropout": 0.0},
        (45, 33),
    ),
    "hrnet_w18": (
        {"width": 2, "stem": 3, "modules": (1, 1), "blocks": 1, "head": "segmentation", "classes": 3},
        (29, 19),
    ),
    "mobilenet_v3_large": (
        {"width": 0.1, "depths": (1, 1, 1, 1, 1, 1), "classes": 5, "dropout": 0.0},
        (45, 33),
    ),
    "per_pixel": ({"layers": 5, "channels": 4}, (19, 7)),
    "resnet50": ({"width": 3, "depths": (2, 1, 1, 1), "classes": 5}, (45, 35)),
    "unet": ({"base": 3, "depth": 3}, (24, 16)),
    "unet3d": ({"base": 2, "depth": 2, "in_channels": 3}, (12, 8, 8)),
    "unet_bn": ({"base": 3, "depth": 2, "up": "bilinear"}, (20, 12)),
    "vgg16": ({"width": 2, "classes": 5, "dropout": 0.0}, (45, 33)),
    "vgg16_features": ({"width": 2}, (71, 33)),
}  # fmt: skip
# Their last segment ends in a loss that can be taken row by row.
PER_PIXEL = {
    "deeplabv3plus", "edsr", "hrnet_w18", "per_pixel", "unet", "unet3d", "unet_bn", "vgg16_features",
}  # fmt: skip
HALOS = ("recompute", "cache", "sweep")
BANDS = (1, 3, 8, 1000)


class Case:
    """A network with its weights, inputs and plain results, all made once: tracing is what takes long."""

    def __init__(self, name: str, batch: int) -> None:
        options, size = NETS[name]
        self.name = name
        self.model = build(name, **options).double()
        with torch.no_grad():  # norms and biases start at one and zero, which would hide mistakes
            for p in self.model.parameters():
                if p.dim() == 1:
                    p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        generator = torch.Generator().manual_seed(batch)
        self.x = torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator).requires_grad_()
        self.state = copy.deepcopy(self.model.state_dict())
        self.graph = rowtune.trace(self.model, (self.x,))
        output = self.graph.values[self.graph.outputs[0]]
        self.loss: Loss = parse(default_name(output.shape, tuple(self.x.shape)))
        self.target = synthetic_target(self.loss, output.shape, torch.float64, 3)
        self.training = with_loss(self.graph, self.loss)
        CASES.append(self)
        self.plain = self.step(lambda: self.model(self.x))
        self.plain_loss = self.step(lambda: self.loss(self.model(self.x), self.target))

    def step(self, run: Any) -> Step:
        """A step from the same weights and running statistics every time."""
        self.model.load_state_dict(self.state)
        return step(self.model, run, {"x": self.x})

    def error(self, plan: Plan) -> float:
        module = rowtune.apply(self.model, plan)
        return error(self.step(lambda: module(self.x)), self.plain)

    def loss_error(self, plan: Plan) -> float:
        module = rowtune.apply(self.model, plan, self.loss)
        return error(self.step(lambda: module(self.x, targets=self.target)), self.plain_loss)


@cache
def case(name: str, batch: int = 2) -> Case:
    return Case(name, batch)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """The same model is the same graph; modules of this file need not trace it again."""

    def known(model: nn.Module, inputs: Any, **_: Any) -> Graph:
        return next(c.graph for c in CASES if c.model is model and c.x.shape == inputs[0].shape)

    monkeypatch.setattr("rowtune.runtime.module.trace", known)


CASES: list[Case] = []


def test_every_network_of_the_zoo_is_here():
    assert set(NETS) == set(ZOO)


@pytest.mark.parametrize("name", NETS)
def test_the_module_traces_this_graph(name, monkeypatch):
    """Guards the shortcut above: what a module traces itself is the graph the tests hand it."""
    monkeypatch.undo()
    found = case(name)
    module = rowtune.apply(found.model, rowtune.uniform_plan(found.graph, "rows", 5))
    program = module.program((found.x,), with_targets=False)
    assert program.graph.fingerprint == found.graph.fingerprint
    assert error(found.step(lambda: module(found.x)), found.plain) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("policy", ["keep", "checkpoint"])
def test_plain_policies(name, policy):
    found = case(name)
    assert found.error(rowtune.uniform_plan(found.graph, policy)) < TOLERANCE
    assert found.loss_error(rowtune.uniform_plan(found.training, policy)) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("halo", HALOS)
@pytest.mark.parametrize("band", BANDS)
def test_rows(name, halo, band):
    """Any outer gradient of the output; running statistics too, as the buffers are compared."""
    found = case(name)
    plan = rowtune.uniform_plan(found.graph, "rows", band, halo)
    assert any(s.policy == "rows" for s in plan.segments)
    assert found.error(plan) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("halo", HALOS)
def test_rows_of_single_images(name, halo):
    found = case(name)
    assert found.error(rowtune.uniform_plan(found.graph, "rows", 4, halo, images=1)) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_other_tapes_and_the_other_axis(name):
    found = case(name)
    for tapes in ("whole", "late", "replay"):
        assert found.error(rowtune.uniform_plan(found.graph, "rows", 6, "sweep", tapes=tapes)) < TOLERANCE
    assert found.error(rowtune.uniform_plan(found.graph, "rows", 5, "sweep", axis=3)) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("band", "images", "tapes"), [(2, 0, "split"), (7, 0, "whole"), (5, 0, "late"), (4, 1, "late")]
)
def test_the_default_loss_in_a_sweep(name, band, images, tapes):
    found = case(name)
    plan = rowtune.uniform_plan(found.training, "rows", band, "sweep", images=images, tapes=tapes)
    last = rowtune.lower(found.training, plan).segments[-1]
    assert (last.single_sweep) == (name in PER_PIXEL)
    assert found.loss_error(plan) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_the_guesses_a_search_starts_from(name):
    found = case(name, 1)
    knobs = space(found.training)
    for setting in knobs.guesses():
        assert found.loss_error(knobs.plan(setting)) < TOLERANCE, setting


@settings(max_examples=80)
@given(name=st.sampled_from(sorted(NETS)), batch=st.sampled_from([1, 2, 2]), data=st.data())
def test_any_plan_of_the_search_space(name, batch, data):
    found = case(name, batch)
    knobs = space(found.training)
    setting = {k.name: data.draw(st.sampled_from(k.choices), k.name) for k in knobs.knobs}
    assert found.loss_error(knobs.plan(setting)) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_float32_is_as_near_to_the_truth_as_plain(name):
    """The order of a sum differs from plain's, and nothing else does."""
    found = case(name)
    single = copy.deepcopy(found.model).float()
    x = found.x.detach().float().requires_grad_()
    state = copy.deepcopy(single.state_dict())
    truth = found.plain

    def distance(run: Any) -> tuple[float, float]:
        single.load_state_dict(state)
        made = step(single, run, {"x": x})
        assert made.output.dtype == torch.float32
        made = Step(made.output.double(), {n: g.double() for n, g in made.gradients.items()}, made.buffers)
        return float((made.output - truth.output).abs().max() / truth.output.abs().max()), error(made, truth)

    plain = distance(lambda: single(x))
    for halo in HALOS:
        module = rowtune.apply(single, rowtune.uniform_plan(found.graph, "rows", 4, halo))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rowtune.runtime.module.trace", rowtune.trace)
            ours = distance(lambda m=module: m(x))
        assert ours[0] < 3 * plain[0] + 1e-6, halo
        assert ours[1] < 3 * plain[1] + 1e-5, halo
