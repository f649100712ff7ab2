"""A recorded step is the step that runs: its memory is what is measured, and it obeys its own rules."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from zones import space

import rowtune
from rowtune.cost.predict import _SEEN
from rowtune.errors import UsageError
from rowtune.graph.bands import banding
from rowtune.graph.cuts import legal_cut
from rowtune.graph.graph import Graph
from rowtune.graph.losses import parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.runtime.blank import Answers
from rowtune.runtime.recorder import record
from rowtune.runtime.recording import Recording, check
from rowtune.runtime.segment_recorder import SegmentRun
from rowtune.runtime.segment_recording import Crossing
from rowtune.tune.meter import measure_memory
from rowtune.zoo import build

LOSS = parse("cross_entropy")
NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "per_pixel": ({"layers": 5, "channels": 8}, (2, 3, 64, 32)),
    "unet_bn": ({"base": 4, "depth": 2}, (2, 3, 32, 24)),
    "hrnet_w18": (
        {"width": 4, "stem": 8, "modules": (1, 1), "blocks": 1, "head": "segmentation", "classes": 3},
        (1, 3, 32, 32),
    ),
}


def plans(graph: Any) -> dict[str, Plan]:
    last = graph.nodes[-1].name
    half = graph.nodes[len(graph.nodes) // 2].name
    after = graph.nodes[len(graph.nodes) // 2 + 1].name
    inside = (
        Segment(graph.nodes[0].name, half, "checkpoint"),
        Segment(after, last, "checkpoint"),
    )
    made = {
        "keep": rowtune.uniform_plan(graph, "keep"),
        "checkpoint": rowtune.uniform_plan(graph, "checkpoint"),
        "turns": Plan((Segment(graph.nodes[0].name, last, "checkpoint", inside=inside),)),
    }
    for halo in ("recompute", "cache", "sweep"):
        made[halo] = rowtune.uniform_plan(graph, "rows", 16, halo)  # type: ignore[arg-type]
    made["replay"] = rowtune.uniform_plan(graph, "rows", 16, tapes="replay")
    return made


def measured(model: nn.Module, plan: Plan, graph: Any, x: torch.Tensor, target: torch.Tensor) -> int:
    module = rowtune.apply(model, plan, LOSS, graph=graph)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(x, targets=target).backward()

    step()
    return measure_memory(step, module, optimizer, [x, target], "cpu").activation_bytes


@pytest.mark.parametrize("name", NETS)
def test_the_peak_of_the_list_is_what_is_measured(name: str) -> None:
    """hrnet_w18 is predicted up to 12% too low from tables; a recording knows how its gradients meet."""
    options, shape = NETS[name]
    model, x = build(name, **options), torch.randn(shape)
    traced = rowtune.trace(model, (x,))
    graph = with_loss(traced, LOSS)
    target = synthetic_target(LOSS, graph.values[graph.loss_output].shape, torch.float32)
    for policy, plan in plans(graph).items():
        recording = record(rowtune.lower(graph, plan))
        real = measured(model, plan, traced, x, target)
        assert recording.activation_bytes == pytest.approx(real, rel=0.005), policy


def small() -> Recording:
    model = build("per_pixel", layers=3, channels=4)
    graph = with_loss(rowtune.trace(model, (torch.empty(1, 3, 16, 8),)), LOSS)
    return record(rowtune.lower(graph, rowtune.uniform_plan(graph, "rows", 4)))


def test_two_recordings_are_the_same_and_compute_nothing() -> None:
    first, again = small(), small()
    assert first == again
    assert {b.role for b in first.buffers} >= {"parameter", "gradient", "batch", "activation"}
    convolutions = [c for c in first.calls if c.name == "aten::convolution"]
    assert len(convolutions) >= 3 * 4 and all(c.makes for c in convolutions)


def test_what_a_recording_may_not_be() -> None:
    good = small()
    assert check(good) is good
    read = {number: i for i, call in reversed([*enumerate(good.calls)]) for number in good.read_by(call)}
    number, made = next((n, b) for n, b in enumerate(good.buffers) if b.role == "activation" and n in read)
    reader = read[number]

    def changed(**changes: Any) -> Recording:
        buffers = list(good.buffers)
        buffers[number] = replace(made, **changes)
        return replace(good, buffers=tuple(buffers))

    with pytest.raises(AssertionError, match="left over"):
        check(changed(died=None))
    with pytest.raises(AssertionError, match="gone"):
        check(changed(died=reader - 1))
    with pytest.raises(AssertionError, match=r"before it is made|made before"):
        check(changed(born=reader + 1, died=reader + 2))


# -- segments ------------------------------------------------------------------------------------------------


def in_one_piece(graph: Graph, plan: Plan) -> tuple[int, int]:
    """(activations, all) of a recording of the whole step, but for the tables of operators."""
    whole = without_tables(record(rowtune.lower(graph, plan), "traced"))
    return whole.activation_bytes, whole.peak_bytes


def without_tables(made: Recording) -> Recording:
    """They are made once for a program, not in a step, and only some of the bands' are seen."""
    buffers = tuple(replace(b, bytes=0) if b.name == "a constant" else b for b in made.buffers)
    return replace(made, buffers=buffers)


def assert_sums_up(graph: Graph, plan: Plan) -> None:
    ours, (activations, peak) = rowtune.predict(graph, plan, engine="traced"), in_one_piece(graph, plan)
    assert ours.activation_bytes == pytest.approx(activations, rel=1e-4, abs=64), plan
    assert ours.peak_bytes == pytest.approx(peak, rel=1e-4, abs=64), plan


@pytest.mark.parametrize("name", NETS)
def test_segments_make_up_the_step(name: str) -> None:
    """Recorded one by one and linked, they take what the whole step takes."""
    options, shape = NETS[name]
    graph = with_loss(rowtune.trace(build(name, **options), (torch.empty(shape),)), LOSS)
    knobs, rng = space(graph), random.Random(1)
    drawn = [knobs.plan({k.name: rng.choice(k.choices) for k in knobs.knobs}) for _ in range(6)]
    for plan in (*plans(graph).values(), *drawn):
        assert_sums_up(graph, plan)


def at_every_node(graph: Graph, policy: str) -> Plan:
    """As many segments as there can be."""
    ends = [i for i in range(len(graph.nodes)) if legal_cut(graph, i + 1)]
    starts = [0, *(i + 1 for i in ends[:-1])]
    names = [node.name for node in graph.nodes]
    return Plan(tuple(Segment(names[a], names[b], policy) for a, b in zip(starts, ends, strict=True)))  # type: ignore[arg-type]


class Tied(nn.Module):
    """A weight that is read twice, a value that several read, views, and a mean, whose gradient is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.conv(x)
        b = self.conv(a.relu())
        left, right = b.chunk(2, dim=3)
        c = torch.cat([torch.cat([right, left], 3) + a, a.transpose(2, 3)], 1)
        return self.head(self.last(c).mean((2, 3)).reshape(x.shape[0], -1))


@pytest.mark.parametrize("policy", ["keep", "checkpoint"])
def test_whatever_crosses_a_cut_is_linked(policy: str) -> None:
    graph = with_loss(rowtune.trace(Tied(), (torch.empty(2, 3, 16, 16),)), parse("cross_entropy"))
    assert_sums_up(graph, at_every_node(graph, policy))
    for cut in range(1, len(graph.nodes)):
        if legal_cut(graph, cut):
            names = [n.name for n in graph.nodes]
            first, second = Segment(names[0], names[cut - 1], policy), Segment(names[cut], names[-1], "keep")  # type: ignore[arg-type]
            assert_sums_up(graph, Plan((first, second)))


def test_a_segment_is_recorded_once() -> None:
    """Also where another plan has it among other segments."""
    model = build("per_pixel", layers=6, channels=8)
    graph = with_loss(rowtune.trace(model, (torch.empty(1, 3, 64, 32),)), LOSS)
    names = [node.name for node in graph.nodes]

    def plan(*cuts: int) -> Plan:
        stops = [*cuts, len(names)]
        spans = zip([0, *cuts], stops, strict=True)
        return Plan(tuple(Segment(names[a], names[b - 1], "checkpoint") for a, b in spans))

    rowtune.predict(graph, plan(4, 8))
    seen = _SEEN[graph]["listed"]
    assert seen.recorded == 3
    first = rowtune.predict(graph, plan(4, 8))
    assert seen.recorded == 3 and first == rowtune.predict(graph, plan(4, 8))
    rowtune.predict(graph, plan(4, 6, 8))  # two new ones, alike but for their names
    assert seen.recorded == 4


def test_a_graph_is_let_go_of() -> None:
    graph = with_loss(
        rowtune.trace(build("per_pixel", layers=2, channels=4), (torch.empty(1, 3, 16, 8),)), LOSS
    )
    rowtune.predict(graph, rowtune.uniform_plan(graph, "keep"))
    seen = weakref.ref(_SEEN[graph]["listed"])
    banding.cache_clear()
    del graph
    gc.collect()
    assert seen() is None


def test_the_state_of_an_optimizer() -> None:
    model = build("per_pixel", layers=3, channels=4)
    graph = with_loss(rowtune.trace(model, (torch.empty(1, 3, 16, 8),)), LOSS)
    plan = rowtune.uniform_plan(graph, "keep")
    weights = sum(p.numel() * 4 for p in model.parameters())
    base = rowtune.predict(graph, plan).peak_bytes
    adam = torch.optim.Adam(model.parameters())
    assert rowtune.predict(graph, plan, 2).peak_bytes == base + 2 * weights
    before = rowtune.predict(graph, plan, adam).peak_bytes
    assert before == pytest.approx(base + 2 * weights, abs=100)  # and a count of steps for each
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    assert rowtune.predict(graph, plan, adam).peak_bytes == before
    with pytest.raises(UsageError, match="LBFGS"):
        rowtune.predict(graph, plan, torch.optim.LBFGS(model.parameters()))


def test_a_graph_without_a_loss() -> None:
    """Its output has a gradient from outside, and is held by the caller."""
    graph = rowtune.trace(build("per_pixel", layers=3, channels=8), (torch.empty(1, 3, 32, 32),))
    output = graph.values[graph.outputs[0]].bytes
    banded = rowtune.predict(graph, rowtune.uniform_plan(graph, "rows", 4))
    plain = rowtune.predict(graph, rowtune.uniform_plan(graph, "keep"))
    assert 2 * output < banded.activation_bytes < plain.activation_bytes


def test_what_a_segment_recording_says() -> None:
    model = build("per_pixel", layers=3, channels=4)
    graph = with_loss(rowtune.trace(model, (torch.empty(1, 3, 16, 8),)), LOSS)
    names = [node.name for node in graph.nodes]
    program = rowtune.lower(graph, Plan((Segment(names[0], names[2]), Segment(names[3], names[-1]))))
    value = graph.values[graph.inputs[0]]
    given = Crossing(value.name, value.shape, (384, 128, 8, 1), 0, value.dtype, value.bytes, 0)
    run = SegmentRun(graph, program.segments[0], (given,))
    (made,) = run.outputs
    assert made.wanted and made.shape == graph.values[made.name].shape
    found = run.backward((made._replace(memory=0),))
    buffers = found.recording.buffers
    assert 0 < found.forward < found.calls == len(found.recording.calls)
    assert buffers[found.inputs[value.name]].role == "batch" and not found.gradients
    assert buffers[found.outer[made.name]].born == found.forward - 1
    assert {*found.weight_gradients} == {n for n in found.weights if graph.values[n].requires_grad}
    assert all(buffers[b].role == "gradient" for b in found.weight_gradients.values())
    assert found.inputs[value.name] in found.kept, "a convolution's weight gradient reads its input"


def test_a_given_output_is_answered_from_memory_unless_it_was_resized() -> None:
    answers, div = Answers(), torch.ops.aten.div.out
    a, fits, small = (torch.empty(n, device="meta") for n in (6, 6, 0))
    for _ in range(2):
        assert answers.call(div, (a, 2.0), {"out": fits}) is fits
    assert len(answers.known) == 1 and answers.asked is not None
    answers.call(div, (a, 2.0), {"out": small})
    assert small.shape == (6,) and len(answers.known) == 1
