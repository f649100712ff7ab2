"""What a rows segment keeps in a store is got back a band at a time, from every store alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from savers import case
from test_exact_barriers import LAYOUTS
from test_savers import WAYS, stored, uniform

import rowtune
from rowtune.graph.cuts import legal_cut
from rowtune.graph.graph import Graph
from rowtune.plan.choices import LOSSY
from rowtune.plan.plan import Plan, Segment
from rowtune.runtime.stores import STORES
from rowtune.runtime.stores.host import Host, HostPool
from rowtune.runtime.stores.shelf import MOST_BANDS, Shelf
from rowtune.runtime.stores.store import cut

BANDED = ["recompute", "cache", "sweep", "late", "passes"]


@st.composite
def parts(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    found = []
    for dim in draw(st.sets(st.integers(0, len(shape) - 1), max_size=2)):
        first = draw(st.integers(0, shape[dim] - 1))
        found.append((dim, first, draw(st.integers(1, shape[dim] - first))))
    return tuple(found)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(STORES)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    shape=st.tuples(*(st.integers(1, 7) for _ in range(4))),
    data=st.data(),
)
def test_a_part_is_what_the_whole_has_there(name, layout, shape, data):
    dim, band = data.draw(st.sampled_from([0, 2, 3])), data.draw(st.integers(1, 8))
    x = LAYOUTS[layout](torch.randn(shape))
    shelf = Shelf(STORES[name](HostPool()), x, dim, band)
    whole = shelf.get(())
    assert whole.shape == x.shape and whole.dtype == x.dtype
    if name in LOSSY:
        bound = x.abs().amax((2, 3), keepdim=True) * {"int8": 1 / 127, "int4": 1 / 7}.get(name, 1 / 256)
        assert ((whole - x).abs() <= bound * (1 + 1e-5)).all()
        assert torch.equal(whole.sign(), x.sign())
    else:
        assert torch.equal(whole, x)
    part = data.draw(parts(tuple(x.shape)))
    found = shelf.get(part)
    assert torch.equal(found, cut(whole, part))
    assert found.stride() == torch.empty_like(cut(x, part)).stride() or 1 in found.shape
    bands = [*shelf.bands()]
    assert torch.equal(torch.cat([shelf.get(b) for b in bands], dim), whole)
    assert all(size <= max(band, 1) for ((_, _, size),) in bands)


def test_no_more_chunks_than_a_few():
    shelf = Shelf(STORES["host"](HostPool()), torch.randn(1, 1, 1000, 2), 2, 1)
    assert len([*shelf.bands()]) <= MOST_BANDS
    assert shelf.bytes == 0
    small = Shelf(STORES["int8"](HostPool()), torch.randn(1, 1, 1000, 2), 2, 1)
    assert small.bytes <= 2000 + 4 * MOST_BANDS


def in_two(graph: Graph, how: dict[str, Any]) -> Plan:
    """Two such segments: the second reads what the first made."""
    nodes = graph.nodes
    at = next(at for at in range(len(nodes) // 3, len(nodes)) if legal_cut(graph, at))
    ends = (nodes[0], nodes[at - 1]), (nodes[at], nodes[-1])
    return Plan(tuple(Segment(first.name, last.name, **how) for first, last in ends))


@pytest.fixture
def read(monkeypatch):
    """The sizes of all that is got of shelves, as shares of the whole."""
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)
    found: list[float] = []
    get = Shelf.get

    def noted(self: Shelf, part: Any) -> torch.Tensor:
        made = get(self, part)
        found.append(made.numel() / self.shape.numel())
        return made

    monkeypatch.setattr(Shelf, "get", noted)
    return found


@pytest.mark.parametrize("way", BANDED)
def test_no_stored_tensor_is_whole_again(way, read, monkeypatch):
    """Neither what a segment reads nor what lies at its barriers; whole ones are not even asked for."""

    whole = Host.get

    def refused(self: Host, handle: Any) -> torch.Tensor:
        assert len(handle.shape) < 3, "a whole feature map is got"
        return whole(self, handle)

    made = case("unet_bn", shape=(1, 3, 32, 8))
    plan = stored(in_two(made.training, {**WAYS[way], "band_rows": 8 if way == "passes" else 4}), "host")
    if way != "cache":  # whose stashes are some rows each
        monkeypatch.setattr(Host, "get", refused)
    assert made.error(plan) < TOLERANCE
    assert read and max(read) < 1
    found = made.memory(plan)
    assert found.error < 0.01


def test_images_alone_come_back_some_at_a_time(read):
    made = case("edsr", shape=(4, 3, 12, 10))
    plan = stored(rowtune.uniform_plan(made.training, "rows", images=1, halo="recompute"), "host")
    assert made.error(plan) < TOLERANCE
    assert made.memory(plan).error < 0.01
    both = stored(rowtune.uniform_plan(made.training, "rows", 3, "cache", images=2), "host")
    assert made.error(both) < TOLERANCE
    assert made.memory(both).error < 0.01


def test_less_is_on_the_device_than_with_whole_tensors(read, monkeypatch):
    """By about a tensor at a barrier: its gradient and that of the next are then the most there is."""
    made = case("unet_bn", torch.float32, (1, 3, 32, 16))
    plan = stored(uniform(made.training, "sweep"), "host")
    banded = made.memory(plan)
    monkeypatch.setattr("rowtune.runtime.rows_call.banded_inputs", lambda graph, segment: {})
    whole = made.memory(replace(plan))
    assert banded.real_activations < 0.85 * whole.real_activations


@pytest.mark.parametrize("store", sorted(STORES))
@pytest.mark.parametrize("way", ["recompute", "cache", "sweep", "replay"])
def test_lists_make_what_schedules_make(way, store, read):
    """Bit for bit, with rows that their own calls fetch, and stashes that they put away."""
    made = case("unet_bn", torch.float32, (1, 3, 32, 8))
    plan = replace(stored(in_two(made.training, {**WAYS[way], "band_rows": 4}), store), max_grad_error=1.0)
    module = made.apply(plan, "listed")
    module.lists.after = 0
    expected, *found = [made.step(m) for m in (made.apply(plan), module, module)]
    assert not module.lists.why_not()
    for step in found:
        assert all(torch.equal(step.gradients[n], g) for n, g in expected.gradients.items())


@pytest.mark.parametrize("name", ["unet_bn", "edsr"])
@pytest.mark.parametrize("store", ["host", "int8"])
@pytest.mark.parametrize("halo", ["cache", "sweep"])
def test_lists_take_what_is_predicted(name, store, halo):
    """What is on shelves goes with its last use."""
    made = case(name, torch.float32, (1, 3, 128, 48))
    plan = in_two(made.training, {"policy": "rows", "band_rows": 16, "halo": halo})
    assert made.memory(replace(stored(plan, store), max_grad_error=1.0), "listed").error < 0.01


CHECKPOINTS = {
    "barriers made again": {"policy": "rows", "band_rows": 4, "halo": "recompute", "barriers": "recompute"},
    "narrow": {"policy": "rows", "band_rows": 4, "halo": "recompute", "barriers": "narrow"},
}


@pytest.mark.parametrize("way", CHECKPOINTS)
def test_what_a_checkpoint_reads_comes_back_by_bands(way, read, monkeypatch):
    """Where rows come first inside it, and nothing else reads it."""
    made = case("resnet50", shape=(1, 3, 64, 32))
    plan = stored(in_two(made.training, CHECKPOINTS[way]), "host")
    assert made.error(plan) < TOLERANCE
    assert read and max(read) < 1
    found = made.memory(plan)
    assert found.error < 0.01
    assert made.error(plan, engine="listed", steps=3) < TOLERANCE


def test_a_checkpoint_made_of_segments_that_begins_with_rows(read):
    made = case("per_pixel", shape=(1, 3, 40, 12))
    nodes = made.training.nodes
    inside = (
        Segment(nodes[2].name, nodes[3].name, "rows", 4, tapes="replay"),
        Segment(nodes[4].name, nodes[-1].name),
    )
    whole = Segment(nodes[2].name, nodes[-1].name, "checkpoint", store="host", inside=inside)
    plan = Plan((Segment(nodes[0].name, nodes[1].name), whole))
    assert made.error(plan) < TOLERANCE and made.error(plan, engine="listed", steps=3) < TOLERANCE
    assert read and max(read) < 1
    assert made.memory(plan).error < 0.01
    first = replace(whole, inside=(Segment(nodes[2].name, nodes[3].name), inside[1]))
    read.clear()
    assert made.error(replace(plan, segments=(plan.segments[0], first))) < TOLERANCE and not read
