"""Bands like others are traced once and run in a loop: the same bits as all of them traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import RandomNet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_exact_dag import layers, plain_or_skip
from test_lists import applied, both, build, listing, per_pixel, run, same_bits
from torch import Tensor, nn

import rowtune
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan
from rowtune.plan.turns import turns_of
from rowtune.runtime.lists import kinds, loops
from rowtune.runtime.lists.alike import NotAlike
from rowtune.runtime.lists.listing import Listing
from rowtune.runtime.lists.loops import Loop, Rolled, rolled
from rowtune.runtime.lists.rewrites import rewritten
from rowtune.runtime.recording import Turn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Rolled]:
    """What is compiled."""
    found: list[Rolled] = []
    compile_ = kinds.compiled

    def compiled(what: Rolled, own: Any) -> Any:
        found.append(what)
        return compile_(what, own)

    monkeypatch.setattr(kinds, "compiled", compiled)
    return found


def loops_of(found: list[Rolled]) -> list[Loop]:
    return [call for each in found for call in each.calls if isinstance(call, Loop)]


def size(found: list[Rolled]) -> int:
    return sum(len(c.body) if isinstance(c, Loop) else 1 for each in found for c in each.calls)


def case(
    name: str, rows: int, band: int, batch: int = 1, **how: Any
) -> tuple[nn.Module, Plan, Any, Tensor, Any]:
    """(model, plan, a call of it, input, loss) of a zoo network on a narrow, tall image."""
    options = {"per_pixel": {"layers": 4, "channels": 3}, "unet_bn": {"base": 2, "depth": 2}}
    torch.manual_seed(0)
    model = build(name, options.get(name, {"width": 2, "depths": (2, 1, 1, 1), "classes": 5}))
    x = torch.randn(batch, 3, rows, 8, requires_grad=True)
    traced = rowtune.trace(model, (x,))
    out = traced.values[traced.outputs[0]].shape
    loss = parse(default_name(out, tuple(x.shape)))
    target = synthetic_target(loss, out, torch.float32)
    plan = rowtune.uniform_plan(with_loss(traced, loss), "rows", band, **how)
    return model, plan, lambda m: m(x, targets=target), x, loss


@pytest.mark.parametrize("bands", [1, 2, 3, 5, 9, 40])
@pytest.mark.parametrize("halo", ["sweep", "recompute", "cache"])
def test_any_number_of_bands(bands: int, halo: Any, written: list[Rolled]) -> None:
    model, plan, call, x, loss = case("per_pixel", 4 * bands, 4, halo=halo)
    module = both(model, plan, call, x, loss)
    assert module.lists.kinds and not module.lists.why_not()
    found = loops_of(written)
    if bands == 40 and halo != "cache":
        assert found and all(loop.times > 20 for loop in found)
    if bands < 4:
        assert not found


HOW: list[dict[str, Any]] = [
    {}, {"tapes": "replay"}, {"tapes": "late"}, {"halo": "recompute"}, {"images": 1},
    {"barriers": "recompute"},
]  # fmt: skip


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", ["per_pixel", "unet_bn", "resnet50"])
def test_networks_run_in_loops_bit_for_bit(name: str, how: dict[str, Any], written: list[Rolled]) -> None:
    model, plan, call, x, loss = case(name, 128, 4, batch=2 if "images" in how else 1, **how)
    module = both(model, plan, call, x, loss)
    assert loops_of(written) and not module.lists.why_not()


@pytest.mark.parametrize(
    ("how", "store"), [({}, "int4"), ({}, "host"), ({"tapes": "replay"}, "host")], ids=str
)
def test_loops_fetch_rows_from_stores(
    how: dict[str, Any], store: Any, written: list[Rolled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where autograd asks for them by name: the rows that it then gets are the turn's own."""
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)
    model, plan, call, x, loss = case("unet_bn", 80, 4, **how)
    segments = tuple(replace(s, store=store) for s in plan.segments)
    plan = replace(plan, segments=segments, max_grad_error=1.0)
    module = both(model, plan, call, x, loss)
    assert not module.lists.why_not()
    inside = {c.name for loop in loops_of(written) for c in loop.body}
    assert ("rowtune::fetch" in inside) == (store == "host")


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    layers=layers, batch=st.integers(1, 2), height=st.integers(40, 70), band=st.integers(2, 4),
    halo=st.sampled_from(["recompute", "sweep"]),
    tapes=st.sampled_from(["split", "whole", "late", "replay"]), images=st.integers(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_random_networks_run_in_loops(layers, batch, height, band, halo, tapes, images, seed):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    net, x = RandomNet(layers, 4), torch.randn(batch, 4, height, 4, requires_grad=True)
    plain_or_skip(net, x)
    graph = rowtune.trace(net, (x,))
    few = images if images < batch else 0
    plan = rowtune.uniform_plan(graph, "rows", band, halo, images=few, tapes=tapes)
    module = both(net, plan, lambda m: m(x), x)
    assert not module.lists.why_not()


def test_a_listing_is_as_long_for_many_bands_as_for_some(written: list[Rolled]) -> None:
    sizes = {}
    for rows in (120, 1200):
        written.clear()
        model, plan, call, _, loss = case("per_pixel", rows, 4)
        call(applied(model, plan, loss))
        sizes[rows] = size(written)
    assert sizes[1200] == sizes[120]


def test_masks_move_with_their_rows(written: list[Rolled]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.randn(2, 3, 80, 8, requires_grad=True)
    plan = rowtune.uniform_plan(rowtune.trace(model, (x,)), "rows", 4)
    found = []
    for engine in ("traced", "listed"):
        torch.manual_seed(3)
        module = applied(model, plan, engine=engine)  # type: ignore[arg-type]
        model.zero_grad(set_to_none=True)
        out = module(x)
        out.sum().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    assert same_bits(*found) and loops_of(written)


def test_two_calls_alive_at_once() -> None:
    """Variables of a loop are one call's."""
    model, x = build("per_pixel", {"layers": 4, "channels": 3}), torch.randn(3, 1, 3, 80, 7)
    plan = rowtune.uniform_plan(rowtune.trace(model, (x[0],)), "rows", 4)
    found = []
    for engine in ("traced", "listed"):
        model.zero_grad(set_to_none=True)
        module = applied(model, plan, engine=engine)  # type: ignore[arg-type]
        outs = [module(each) for each in x]
        for out in reversed(outs):
            out.square().sum().backward(retain_graph=True)
        found.append([p.grad for p in model.parameters()])
    assert same_bits(*found)


def test_what_cannot_be_a_loop_is_traced_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns that looked alike, and what follows them reads what it may not."""
    model, plan, call, x, loss = case("per_pixel", 120, 4)
    roll = loops.rolled

    def refused(found: Listing, traced: Rolled | None = None) -> Rolled:
        if found.more:
            raise NotAlike
        return roll(found, traced)

    monkeypatch.setattr(kinds, "rolled", refused)
    module = both(model, plan, call, x, loss)
    assert module.lists.kinds and not module.lists.why_not()


def test_turns_of_a_schedule() -> None:
    model = per_pixel()[0]
    for rows, alike in ((400, True), (12, False)):
        graph = rowtune.trace(model, (torch.empty(1, 3, rows, 7),))
        program = rowtune.lower(graph, rowtune.uniform_plan(graph, "rows", 4))
        banded = program.segments[0].how
        assert banded is not None
        turns = turns_of(banded, banded.backward)
        assert (turns is not None) == alike
        if turns is not None:
            assert {*turns.shift.values()} == {4} and turns.times > 90


# -- listings ---------------------------------------------------------------------------------------------


def in_turns(found: Listing, start: int, length: int, turns: int, more: int) -> Listing:
    """A listing whose calls from `start` on are turns of a loop, the last of which comes more often."""
    end = start + length * turns

    def placed(i: int) -> Turn | None:
        return Turn(0, *divmod(i - start, length)) if start <= i < end else None

    calls = tuple(call._replace(turn=placed(i)) for i, call in enumerate(found.calls))
    return Listing(calls, found.views, found.given, found.constants, found.results, {0: more})


X = torch.arange(60.0).view(20, 3)


def windows(bands: int) -> Any:
    """Sums of rows with those of two bands before, each band two rows of x."""

    def function(x: Tensor) -> Tensor:
        total, before, last = x[0] * 0, x[0] + 1, x[1] + 2
        for i in range(bands):
            now = x.narrow(0, 2 * i, 2).sum(0)
            total = total + now * before
            before, last = last, now
        return total + before + last

    return function


@pytest.mark.parametrize("more", [1, 3])
def test_numbers_advance_and_tensors_are_handed_on(more: int) -> None:
    found = in_turns(listing(windows(6), X), 6, 4, 6, more)
    assert found.calls[6].name == "aten::slice" and found.calls[9].name == "aten::add"
    (loop,) = (c for c in rolled(found).calls if isinstance(c, Loop))
    assert loop.times == 1 + more and len(loop.body) == 4
    for each in (found, rewritten(found)):
        assert torch.equal(run(each)([X])[0], windows(6 + more)(X))


def test_turns_that_differ_are_no_loop() -> None:
    found = in_turns(listing(windows(6), X), 6, 4, 6, 1)
    calls = [c._replace(way="backward") for c in found.calls]
    with pytest.raises(NotAlike):  # autograd would go on with the rows that it knows
        rolled(found.with_calls(iter(calls)))
    with pytest.raises(NotAlike):
        rolled(in_turns(listing(windows(6), X), 6, 8, 2, 1))


def test_rows_that_a_turn_looked_at_are_not_taken_for_later_ones() -> None:
    """After the loop a view may look like one that a turn made, of rows further up."""

    def function(x: Tensor) -> Tensor:
        total = x[0] * 0
        for i in range(4):
            total = total + x.narrow(0, 2 * i, 2).sum(0)
        return total + x.narrow(0, 6, 2).sum(0)

    found = listing(function, X)
    with pytest.raises(NotAlike, match="looks at rows"):
        rolled(in_turns(found, 2, 3, 4, 2))
