"""The contract of savers: exact ones give plain PyTorch's gradients, lossy ones keep within their bound, and
what each takes is predicted; alone and in random combinations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exactness import TOLERANCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from savers import NETS, case, plans

import rowtune
from rowtune.errors import PlanError
from rowtune.graph.graph import Graph
from rowtune.plan.plan import Plan
from rowtune.runtime.layout import channels_last, has_channels_last, strides

WAYS = {
    "keep": {"policy": "keep"},
    "checkpoint": {"policy": "checkpoint"},
    "recompute": {"policy": "rows", "band_rows": 5, "halo": "recompute"},
    "cache": {"policy": "rows", "band_rows": 5, "halo": "cache"},
    "sweep": {"policy": "rows", "band_rows": 5, "halo": "sweep"},
    "whole": {"policy": "rows", "band_rows": 5, "tapes": "whole"},
    "late": {"policy": "rows", "band_rows": 5, "tapes": "late"},
    "replay": {"policy": "rows", "band_rows": 5, "tapes": "replay"},
    "again": {"policy": "rows", "band_rows": 8, "barriers": "recompute"},
    "narrow": {"policy": "rows", "band_rows": 8, "barriers": "narrow"},
    "passes": {"policy": "rows", "band_rows": 8, "barriers": "passes"},
}


def uniform(graph: Graph, way: str) -> Plan:
    return rowtune.uniform_plan(graph, **WAYS[way])  # type: ignore[arg-type]


# -- layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["per_pixel", "unet_bn"])
def test_channels_last(name, way):
    made = case(name)
    plan = replace(uniform(made.training, way), layout="channels_last")
    assert made.error(plan) < TOLERANCE
    assert made.memory(plan).error < 0.01


@pytest.mark.parametrize("name", NETS)
def test_channels_last_everywhere(name):
    made = case(name)
    for way in ("keep", "sweep"):
        plan = replace(uniform(made.training, way), layout="channels_last")
        assert made.error(plan) < TOLERANCE
        assert made.memory(plan).error < 0.01


@pytest.mark.parametrize("way", ["cache", "narrow"])
def test_channels_last_from_lists(way):
    made = case("unet_bn")
    plan = replace(uniform(made.training, way), layout="channels_last")
    assert made.error(plan, engine="listed", steps=2) < TOLERANCE


def test_parameters_keep_their_own_layout():
    """Plans of both layouts may take turns on one model and one optimizer."""
    made = case("unet_bn")
    before = [p.stride() for p in made.net.parameters()]
    found = made.step(made.apply(replace(uniform(made.training, "sweep"), layout="channels_last")))
    assert [p.stride() for p in made.net.parameters()] == before
    assert all(found.gradients[n].stride() == p.stride() for n, p in made.net.named_parameters())


def test_which_layout_a_tensor_has():
    for shape in ((2, 3, 4, 5), (1, 3, 4, 5), (2, 3, 4, 5, 6), (2, 1, 4, 5), (1, 1, 4, 5, 6)):
        t = torch.randn(shape)
        last = channels_last(t)
        assert torch.equal(t, last) and has_channels_last(last) and not has_channels_last(t)
        assert last.stride() == strides(shape)
        assert (last.data_ptr() == t.data_ptr()) == (shape[1] == 1)
        assert channels_last(last) is last
        assert has_channels_last(last[:, :, 1:3])
    assert not has_channels_last(torch.randn(2, 3, 4)) and not has_channels_last(torch.randn(3, 4))


# -- in combination ----------------------------------------------------------------------------------------


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["edsr", "per_pixel", "unet_bn"]), data=st.data())
def test_combinations(name, data):
    made = case(name)
    plan = data.draw(plans(made.training))
    plan = replace(plan, layout=data.draw(st.sampled_from(["contiguous", "channels_last"])))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert made.error(plan) < TOLERANCE
    assert made.memory(plan).error < 0.01


# -- what a plan may say -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"), [({"layout": "nhwc"}, "layout is one of contiguous, channels_last")]
)
def test_refused(change, says):
    made = case("per_pixel")
    with pytest.raises(PlanError, match=says):
        made.apply(replace(uniform(made.training, "keep"), **change))
