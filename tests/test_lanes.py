"""Copies beside a device's work: on a stream whose copies are as late as they may be, nothing is read too
early, nothing is let go of too early, and what comes next is on its way."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
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
from test_shelves import in_two
from torch import Tensor

import rowtune
from rowtune.runtime.stores.host import Host, HostPool
from rowtune.runtime.stores.lanes import LEAVING, Ahead, Blank
from rowtune.runtime.stores.shelf import Shelf
from rowtune.runtime.stores.store import cut
from rowtune.torch_private import without_modes


class Late:
    """Makes copies when they are waited for, in order; what they are of and where they go has to be there.

    Memory that comes is full of something else until then.
    """

    def __init__(self) -> None:
        self.started = self.done = 0
        self.waiting: list[tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]] = []
        self.most = 0

    def copy(self, into: Tensor, of: Tensor) -> int:
        with without_modes():
            if into.is_floating_point() and into.untyped_storage().nbytes() == into.numel() * into.itemsize:
                into.fill_(float("nan"))
        self.waiting.append((*map(_memory, (into, of)), _view(into), _view(of)))
        self.started += 1
        self.most = max(self.most, self.started - self.done)
        return self.started

    def wait(self, mark: int) -> None:
        while self.done < mark:
            into, of, *views = self.waiting.pop(0)
            there = [memory() for memory in (into, of)]
            assert None not in there, "memory was let go of while it was copied"
            with without_modes():
                a, b = (torch.empty(0, dtype=v[0]).set_(m, *v[1:]) for m, v in zip(there, views, strict=True))
                a.copy_(b)
            self.done += 1


def _memory(t: Tensor) -> Any:
    return weakref.ref(t.untyped_storage())


def _view(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.storage_offset(), t.shape, t.stride()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Late]]:
    """Every pool's copies go by such a stream, also where a plan is predicted (then without data)."""
    found: list[Late] = []

    def lane(device: torch.device, stands_for: str, told: Any) -> Ahead:
        if device.type == "meta":
            return Ahead(Blank())
        found.append(Late())
        return Ahead(found[-1])

    monkeypatch.setattr("rowtune.runtime.stores.host._lane", lane)
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)
    yield found
    for stream in found:
        for into, of, *_ in stream.waiting:  # what is still under way holds nobody's memory
            assert of() is not None or into() is None


@settings(max_examples=40)
@given(layout=st.sampled_from(sorted(LAYOUTS)), shape=st.tuples(*(st.integers(1, 6) for _ in range(4))),
       image_dim=st.sampled_from([None, 0]), data=st.data())  # fmt: skip
def test_what_comes_back_is_what_left(layout, shape, image_dim, data):
    """By bands and by images, in any order, as one block where that can be."""
    stream = Late()
    pool = HostPool()
    pool._lanes[torch.device("cpu"), ""] = Ahead(stream)
    x = LAYOUTS[layout](torch.randn(shape))
    dim = data.draw(st.sampled_from([2, 3]))
    shelf = Shelf(Host(pool), x, dim, 1, image_dim)
    kept = x.clone()
    for _ in range(4):
        first = data.draw(st.integers(0, x.shape[dim] - 1))
        part: Any = ((dim, first, data.draw(st.integers(1, x.shape[dim] - first))),)
        if image_dim is not None and data.draw(st.booleans()):
            part = (*part, (image_dim, data.draw(st.integers(0, x.shape[0] - 1)), 1))
        found = shelf.get(part)
        assert torch.equal(found, cut(kept, part))
        assert found.stride() == torch.empty_like(cut(x, part)).stride() or 1 in found.shape
    del shelf
    assert stream.done == stream.started and pool.bytes == 0


def test_the_next_band_is_on_its_way():
    """Downwards, upwards and in two sizes by turns; once where something else is asked for."""
    stream, pool = Late(), HostPool()
    pool._lanes[torch.device("cpu"), ""] = Ahead(stream)
    x = torch.randn(1, 2, 40, 3)
    shelf = Shelf(Host(pool), x, 2, 4)
    (place,) = shelf.parts
    for size, places in ((4, range(0, 36, 4)), (6, range(30, -1, -5))):
        for turn, at in enumerate(places):
            ahead = dict(place.coming)
            assert torch.equal(shelf.get(((2, at, size),)), x[:, :, at : at + size])
            assert (((2, at, size),) in ahead) == (turn > 1), (size, at)
            assert len([p for p in place.coming if p[0][2] == size]) <= 1
    before = stream.started
    shelf.get(((2, 17, 6),))  # not what was on its way
    assert stream.started <= before + 2 and len(place.coming) <= 2
    assert stream.most <= LEAVING + 3


def test_what_leaves_is_held_until_the_device_waits_for_it():
    stream, pool = Late(), HostPool()
    pool._lanes[torch.device("cpu"), ""] = Ahead(stream)
    store = Host(pool)
    handles, expected = [], []
    for i in range(5):
        x = torch.full((8, 8), float(i))
        handles.append(store.put(x))
        expected.append(x.clone())
        del x
        assert stream.started - stream.done <= LEAVING
    for at in (4, 3, 2, 1, 0):  # and what was put before is on its way
        assert torch.equal(store.get(handles[at]), expected[at])
        assert not at or () in handles[at - 1].place.coming
    handles.clear()
    assert pool.bytes == 0 and stream.done == stream.started


def test_buffers_are_used_again_in_order():
    """The next tenant's copy is made after all of the last one's."""
    stream, pool = Late(), HostPool()
    pool._lanes[torch.device("cpu"), ""] = Ahead(stream)
    store = Host(pool)
    places = set()
    for i in range(6):
        kept = store.put(torch.full((16, 16), float(i)))
        places.add(kept.place.host.data_ptr())
        assert (store.get(kept) == i).all()
        del kept
    assert len(places) == 1


@pytest.mark.parametrize("engine", ["traced", "listed"])
@pytest.mark.parametrize("way", ["keep", "checkpoint", "recompute", "cache", "sweep", "replay", "again"])
def test_steps_are_exact_beside_late_copies(way, engine, late):
    made = case("unet_bn", shape=(1, 3, 32, 12))
    how = WAYS[way] if way in ("keep", "checkpoint") else {**WAYS[way], "band_rows": 4}
    plan = stored(in_two(made.training, how), "host")
    assert made.error(plan, engine, steps=3) < TOLERANCE
    assert any(stream.done for stream in late)
    if way not in ("keep", "sweep"):
        return
    plan = replace(stored(uniform(made.training, way), "host"), waiting_gradients="host")
    assert made.error(plan, engine, steps=3) < TOLERANCE


@pytest.mark.parametrize("way", ["keep", "cache", "sweep"])
def test_what_is_on_its_way_is_predicted(way, late):
    made = case("unet_bn", torch.float32, (1, 3, 128, 40))  # of no other test: predictions are remembered
    how = {"policy": "keep"} if way == "keep" else {"policy": "rows", "band_rows": 16, "halo": way}
    plan = stored(in_two(made.training, how), "host")
    found = made.memory(plan, "listed")
    assert found.error < 0.01, found


def test_images_come_one_by_one(late):
    made = case("edsr", shape=(4, 3, 12, 10))
    plan = stored(rowtune.uniform_plan(made.training, "rows", 3, "cache", images=1), "host")
    assert made.error(plan, "listed", steps=3) < TOLERANCE
