"""Checkpoints made of segments that are recomputed in turns: exact, small, nothing run in vain."""

from __future__ import annotations

import copy
import gc
import math
import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import TOLERANCE, error, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_exact_barriers import LAYERS, Net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zones import space

import rowtune
from rowtune.cli.page import segments_table
from rowtune.errors import PlanError
from rowtune.graph.cuts import legal_cut, why_not
from rowtune.graph.graph import Graph
from rowtune.graph.losses import parse
from rowtune.graph.training import with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.report.build import stretches
from rowtune.report.words import nested, policies
from rowtune.runtime.banded import BandedRun
from rowtune.runtime.lists.run import Run
from rowtune.tune.meter import measure_memory
from rowtune.zoo import build

KEEP, CHECKPOINT = Segment("", ""), Segment("", "", "checkpoint")


def ways(rows: int) -> list[Segment]:
    made = [KEEP, CHECKPOINT]
    for barriers in ("store", "recompute", "narrow", "passes"):
        for halo in ("sweep", "recompute"):
            made.append(Segment("", "", "rows", rows, halo, 0, "split", barriers))  # type: ignore[arg-type]
    return made


def named(graph: Graph, start: int, stop: int, like: Segment) -> Segment:
    return replace(like, first=graph.nodes[start].name, last=graph.nodes[stop - 1].name)


def drawn(data: Any, graph: Graph, start: int, stop: int, rows: int, depth: int) -> Segment:
    """A random segment over nodes [start, stop), of others to `depth` levels."""
    places = [p for p in range(start + 1, stop) if legal_cut(graph, p)]
    if depth and places and data.draw(st.booleans()):
        cuts = sorted(data.draw(st.sets(st.sampled_from(places), max_size=3)))
        spans = zip([start, *cuts], [*cuts, stop], strict=True)
        inside = tuple(drawn(data, graph, a, b, rows, depth - 1) for a, b in spans)
        return named(graph, start, stop, replace(CHECKPOINT, inside=inside))
    fits = [w for w in ways(rows) if w.policy != "rows" or not why_not(graph, start, stop, 2)]
    return named(graph, start, stop, data.draw(st.sampled_from(fits)))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3), stride=st.integers(1, 2),
    height=st.integers(6, 12), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_random_checkpoints(names, stride, height, seed, data):
    torch.manual_seed(seed)
    net = Net(names, stride).double()
    x = torch.randn(2, 3, height, 6, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(net)
    plain = step(twin, lambda: twin(x), {"x": x})
    graph = rowtune.trace(net, (x,))
    rows = data.draw(st.integers(1, height))
    plan = Plan((drawn(data, graph, 0, len(graph.nodes), rows, 3),))
    assert Plan.from_dict(plan.to_dict()) == plan
    module = rowtune.apply(net, plan)
    found = step(net, lambda: module(x), {"x": x})
    assert error(found, plain) < max(TOLERANCE, 20 * rounding(names, stride, seed, x, plain)), plan


def rounding(names: list[str], stride: int, seed: int, x: Tensor, plain: Any) -> float:
    """How far plain is from itself where sums are taken in another order: the images the other way round."""
    torch.manual_seed(seed)
    net = Net(names, stride).double()
    y = x.detach().flip(0).requires_grad_()
    other = step(net, lambda: net(y).flip(0), {"x": y})
    other.gradients["x"] = other.gradients["x"].flip(0)
    return error(other, plain)


BLOCKS = ("layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1")
AGAIN = Segment("", "", "rows", 64, "recompute", barriers="recompute")


def resnet() -> tuple[nn.Module, Tensor, Tensor, Graph]:
    torch.manual_seed(0)
    model = build("resnet50", width=8, classes=10)
    x = torch.randn(4, 3, 64, 64)
    graph = with_loss(rowtune.trace(model, (x,)), parse("cross_entropy"))
    return model, x, torch.randint(0, 10, (4,)), graph


def blocks(graph: Graph, like: Segment, *sizes: int) -> Plan:
    """The first blocks, so many together in a checkpoint, each of which is `like` that; the rest kept."""
    ends = [max(i for i, n in enumerate(graph.nodes) if n.module.startswith(b)) + 1 for b in BLOCKS]
    made, at, left = [], 0, list(ends)
    for size in sizes:
        inside = []
        for stop in left[:size]:
            inside.append(named(graph, at, stop, like))
            at = stop
        del left[:size]
        whole = replace(CHECKPOINT, first=inside[0].first, last=inside[-1].last, inside=tuple(inside))
        made.append(whole if size > 1 else inside[0])
    return Plan((*made, named(graph, at, len(graph.nodes), KEEP)))


@pytest.mark.parametrize(
    "like", [CHECKPOINT, AGAIN, replace(AGAIN, barriers="narrow", band_rows=8, images=2)]
)
def test_predicted_and_measured_peaks_are_equal(like):
    model, x, target, graph = resnet()
    found = []
    for sizes in ((1, 1, 1, 1, 1), (2, 3), (5,)):
        plan = blocks(graph, like, *sizes)
        module = rowtune.apply(model, plan, "cross_entropy")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def train(module=module, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            module(x, targets=target).backward()
            optimizer.step()

        train()
        real = measure_memory(train, module, optimizer, [x, target], "cpu")
        ours = rowtune.predict(graph, plan, 1, engine="traced")
        assert abs(ours.activation_bytes / real.activation_bytes - 1) < 0.02
        found.append(ours.activation_bytes)
    assert found[1] < found[0]


@pytest.mark.parametrize("like", [CHECKPOINT, AGAIN])
def test_the_last_of_those_inside_does_not_run_in_vain(like):
    """In turns, a block runs once in forward, once for those behind it in its checkpoint, and once for its
    own backward; the last of them has none behind it."""
    model, x, target, graph = resnet()

    def flops(plan: Plan) -> int:
        module = rowtune.apply(model, plan, "cross_entropy")
        module(x, targets=target).backward()
        with FlopCounterMode(display=False) as counter:
            module(x, targets=target).backward()
        return counter.get_total_flops()

    inside = [n for n in graph.nodes if n.module.startswith(("layer1.2", "layer2.0")) and n.op == "conv2d"]
    forward = 0
    for node in inside:
        weight, out = graph.values[node.inputs[1]].shape, graph.values[node.name].shape
        forward += 2 * math.prod(out) * math.prod(weight[1:])
    one = flops(blocks(graph, like, 2, 1, 1, 1))
    two = flops(blocks(graph, like, 2, 3))
    assert two - one == forward


@pytest.mark.parametrize(("engine", "kind"), [("traced", BandedRun), ("listed", Run)])
def test_nothing_is_left_behind(monkeypatch, engine, kind):
    """What a step holds is freed by reference counts alone, with the graph or with its backward."""
    model, x, target, graph = resnet()
    module = rowtune.apply(model, blocks(graph, AGAIN, 2, 3), "cross_entropy", engine=engine)
    module(x, targets=target).backward()
    runs: list[weakref.ref[Any]] = []
    begin = kind.__init__

    def counted(self: Any, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        runs.append(weakref.ref(self))

    monkeypatch.setattr(kind, "__init__", counted)
    gc.collect()
    gc.disable()
    try:
        module(x, targets=target).backward()
        assert runs and not any(run() for run in runs)
        module(x, targets=target)  # forward alone
        assert not any(run() for run in runs)
    finally:
        gc.enable()


def test_without_gradients_and_in_eval_mode():
    model, x, target, graph = resnet()
    plain = copy.deepcopy(model)
    module = rowtune.apply(model, blocks(graph, AGAIN, 2, 3), "cross_entropy")
    with torch.no_grad():
        assert torch.allclose(
            module(x, targets=target), nn.functional.cross_entropy(plain(x), target), atol=1e-5
        )
        module.eval(), plain.eval()
        assert torch.allclose(module(x), plain(x), atol=1e-4)


def test_a_search_divides_regions_into_turns():
    _, _, _, graph = resnet()
    knobs = space(graph)
    guess = next(g for g in knobs.guesses() if g["turns"] == "yes" and g["front"] == "rows/again")
    plan = knobs.plan(guess)
    inner = [s for s in plan.segments if s.inside]
    assert inner and any(leaf.barriers == "recompute" for leaf in plan.leaves())
    assert [s for s in inner if s.inside[-1].policy == "rows"], "a region of rows ends in rows"
    flat = knobs.plan({**guess, "turns": "no"})
    assert not any(s.inside for s in flat.segments)
    assert rowtune.predict(graph, plan, 1).activation_bytes < 0.9 * (
        rowtune.predict(graph, flat, 1).activation_bytes
    )


def test_whatever_the_search_tries_can_be_shown():
    """Also bands of images alone, which have no band height, and segments inside others."""
    _, _, _, graph = resnet()
    knobs, rng = space(graph), random.Random(0)
    drawn_at_random = [{k.name: rng.choice(k.choices) for k in knobs.knobs} for _ in range(40)]
    shown = set()
    for values in (*knobs.guesses(), *drawn_at_random):
        plan = knobs.plan(values)
        decisions = plan.to_dict()
        shown |= set(policies(decisions).replace("(", " ").split())
        leaves = [s for _, s in nested(decisions["segments"])]
        assert segments_table(stretches(plan)).row_count == len(leaves) >= len(decisions["segments"])
    assert {"images", "turns", "keep", "checkpoint", "narrow"} <= {word.strip("),") for word in shown}


def test_what_cannot_be_inside_is_named():
    _, _, _, graph = resnet()
    good = blocks(graph, AGAIN, 2, 3)
    first = good.segments[0]

    def refused(segment: Segment, says: str) -> None:
        with pytest.raises(PlanError, match=says):
            rowtune.lower(graph, replace(good, segments=(segment, *good.segments[1:])))

    refused(replace(first, inside=first.inside[:1]), f"not at {first.last}")
    refused(replace(first, inside=first.inside[::-1]), "in order")
    cached = replace(first.inside[0], halo="cache", barriers="store")
    refused(replace(first, inside=(cached, first.inside[1])), "inside a checkpoint")
    for key, value, says in (
        ("policy", "keep", "only a checkpoint"),
        ("images", 1, "segments inside"),
        ("inside", 3, "a list of segments"),
        ("inside", [{"first": "x"}], "a segment has keys"),
    ):
        data = good.to_dict()
        data["segments"][0][key] = value
        with pytest.raises(PlanError, match=says):
            Plan.from_dict(data)
