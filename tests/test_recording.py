"""A recorded step is the step that runs: its memory is what is measured, and it obeys its own rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import rowtune
from rowtune.graph.losses import parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.runtime.recorder import record
from rowtune.runtime.recording import Recording, check
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
