"""Steps in a CUDA graph: what is captured once and replayed trains as steps that are run, bit for bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated_graph
import torch
from torch import Tensor, nn
from training import masks, plan_file

import rowtune
from rowtune.errors import UsageError
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.importers.source import parse_source
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.runtime.captured import Captured, backward_of, capture, cuda_graph
from rowtune.train.loop import train
from rowtune.train.options import Options
from rowtune.tune import step as step_module
from rowtune.tune.find import Request, find
from rowtune.tune.savers import NOT_IN_GRAPHS, check_capture, last_resort, used
from rowtune.tune.savers import parse as savers
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.step import define, steps_of

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "per_pixel": ({"layers": 5, "channels": 4}, (1, 3, 48, 20)),
    "unet": ({"base": 4, "depth": 2}, (1, 3, 64, 24)),
    "unet_bn": ({"base": 4, "depth": 1}, (2, 3, 32, 16)),
    "unet3d": ({"base": 4, "depth": 2}, (1, 1, 32, 8, 8)),
    "resnet50": ({"width": 8, "depths": (1, 1, 1, 1), "classes": 5}, (2, 3, 64, 64)),
    "vgg16": ({"width": 4, "classes": 5, "dropout": 0.5}, (2, 3, 64, 64)),
    "deeplabv3plus": (
        {"width": 4, "depths": (1, 1, 1, 1), "channels": 8, "low_channels": 4, "rates": (1, 2), "classes": 3},
        (2, 3, 64, 64),
    ),
}
PLANS: dict[str, Callable[[Any], Plan]] = {
    "keep": lambda g: uniform_plan(g, "keep"),
    "lean": lambda g: replace(
        (p := uniform_plan(g, "keep")), segments=tuple(replace(s, cheap="recompute") for s in p.segments)
    ),
    "checkpoint": lambda g: uniform_plan(g, "checkpoint"),
    "sweep": lambda g: uniform_plan(g, "rows", 8),
    "replay": lambda g: uniform_plan(g, "rows", 8, tapes="replay"),
    "cache": lambda g: uniform_plan(g, "rows", 8, "cache"),
    "recompute": lambda g: uniform_plan(g, "rows", 8, "recompute", barriers="recompute"),
    "passes": lambda g: uniform_plan(g, "rows", 16, barriers="passes"),
    "int8": lambda g: replace(
        (p := uniform_plan(g, "keep")),
        segments=tuple(replace(s, store="int8") for s in p.segments), max_grad_error=1.0,
    ),
}  # fmt: skip


class Case:
    """A model, a planned module of a copy of it, and batches."""

    def __init__(self, name: str, plan: Callable[[Any], Plan]) -> None:
        options, shape = NETWORKS[name]
        torch.manual_seed(1)
        self.model = rowtune.zoo.build(name, **options)
        graph = rowtune.trace(self.model, (torch.randn(shape),))
        out = graph.values[graph.outputs[0]].shape
        loss = parse(default_name(out, shape))
        self.plan = plan(with_loss(graph, loss))
        self.module = rowtune.apply(self.model, self.plan, loss, graph=graph)
        self.batches = [
            (torch.randn(shape), synthetic_target(loss, out, torch.float32, seed)) for seed in range(5)
        ]

    def twin(self) -> Case:
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.module = rowtune.apply(other.model, self.plan, self.module.loss)
        return other


def trained(
    case: Case, step: Callable[..., Tensor], accumulate: int = 1, keep: bool = False
) -> tuple[list[Tensor], nn.Module]:
    """Losses, and the model after five batches."""
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(3)
    losses = []
    for at, (x, y) in enumerate(case.batches):
        if at % accumulate == 0:
            optimizer.zero_grad(set_to_none=not keep)
        losses.append(step(x, targets=y))
        if (at + 1) % accumulate == 0:
            optimizer.step()
    return losses, case.model


def same(a: tuple[list[Tensor], nn.Module], b: tuple[list[Tensor], nn.Module]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)), (a[0], b[0])
    for (name, x), y in zip(a[1].state_dict().items(), b[1].state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    for p, q in zip(a[1].parameters(), b[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def run_plainly(case: Case, **how: Any) -> tuple[list[Tensor], nn.Module]:
    backward = backward_of(case.module)
    case.module.lists.after = 0
    return trained(case, lambda x, targets: backward((x,), targets), **how)


def captured(case: Case) -> Captured:
    return Captured(case.module, backward_of(case.module), simulated_graph.record)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["unet_bn", "vgg16"])
def test_every_policy(name: str, plan: str) -> None:
    case = Case(name, PLANS[plan])
    twin = case.twin()
    same(trained(twin, captured(twin)), run_plainly(case))


@pytest.mark.parametrize("plan", ["keep", "sweep"])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("unet_bn", "vgg16")])
def test_every_network(name: str, plan: str) -> None:
    case = Case(name, PLANS[plan])
    twin = case.twin()
    same(trained(twin, captured(twin)), run_plainly(case))


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_added_to(keep: bool) -> None:
    case = Case("per_pixel", PLANS["sweep"])
    twin = case.twin()
    same(trained(twin, captured(twin), accumulate=2, keep=keep), run_plainly(case, accumulate=2, keep=keep))


def test_a_batch_of_another_size_runs_as_ever() -> None:
    case = Case("unet_bn", PLANS["sweep"])
    x, y = case.batches[2]
    case.batches[2] = (x[:1], y[:1])
    twin = case.twin()
    same(trained(twin, captured(twin)), run_plainly(case))


def test_replaced_weights_are_captured_again() -> None:
    case = Case("unet", PLANS["sweep"])
    step, x, y = captured(case), *case.batches[0]
    for _ in range(3):
        step(x, targets=y)
    for p in case.model.parameters():
        p.data = p.data.clone().mul_(0.5)
        p.grad = None
    found = step(x, targets=y)
    gradients = [p.grad for p in case.model.parameters()]
    case.model.zero_grad(set_to_none=True)
    wanted = backward_of(case.module)((x,), y)
    assert torch.equal(found, wanted)
    assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), gradients, strict=True))


def test_frozen_weights_and_modes_are_looked_at() -> None:
    case = Case("unet_bn", PLANS["sweep"])
    step, x, y = captured(case), *case.batches[0]
    for _ in range(2):
        step(x, targets=y)
    first = next(case.model.parameters())
    first.requires_grad_(False)
    case.model.zero_grad(set_to_none=True)
    step(x, targets=y)
    assert first.grad is None


def test_what_is_released_keeps_its_gradients() -> None:
    case = Case("per_pixel", PLANS["sweep"])
    step, x, y = captured(case), *case.batches[0]
    for _ in range(2):
        case.model.zero_grad(set_to_none=True)
        step(x, targets=y)
    before = [p.grad.clone() for p in case.model.parameters()]
    step.release()
    assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), before, strict=True))
    case.model.zero_grad(set_to_none=True)
    step(*case.batches[0][:1], targets=y)
    assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), before, strict=True))


# -- where a plan says so ------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Devices can write down what they do; one entry for each time that one did."""
    made: list[None] = []

    def record(work: Callable[[], Tensor]) -> Any:
        made.append(None)
        return simulated_graph.record(work)

    monkeypatch.setattr(step_module, "recorder_for", lambda device: record)
    return made


@pytest.mark.parametrize("dtype", ["as given", "bf16", "fp16"])
def test_optimizer_steps(dtype: Any, graphs: list[None]) -> None:
    """Loss scaling too, whose scale changes where gradients are infinite."""
    case = Case("unet_bn", lambda g: replace(uniform_plan(g, "rows", 16), dtype=dtype))
    losses, models = [], []
    for how in ("off", "on"):
        one = case.twin()
        plan = replace(one.plan, capture=how)
        module = rowtune.apply(one.model, plan, one.module.loss)
        module.lists.after = 0
        optimizer = torch.optim.SGD(one.model.parameters(), lr=1e-3, momentum=0.9)
        scaler = (
            torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=2) if dtype == "fp16" else None
        )
        step = steps_of(module, optimizer, scaler)
        losses.append([step((x,), y) for x, y in case.batches])
        models.append(one.model)
    same((losses[0], models[0]), (losses[1], models[1]))
    assert len(graphs) == 1


def test_a_run_with_validations(tmp_path: Path, graphs: list[None]) -> None:
    """Between validations, whose memory is not the graph's, steps are captured once."""
    masks(tmp_path / "data"), masks(tmp_path / "val")
    trained = []
    for how in ("off", "on"):
        source = parse_source("zoo:unet_bn", ["base=4", "depth=1", "classes=3"])
        work = define(source, ["2x3x16x12"])
        file = plan_file(work)
        file = replace(file, plan=replace(file.plan, capture=how))
        options = Options(epochs=3, data=str(tmp_path / "data"), val=str(tmp_path / "val"), accumulate=2)
        trained.append(train(file, work, options))
    assert trained[0].loss == trained[1].loss and trained[0].validation == trained[1].validation
    assert len(graphs) == 3


def test_a_search_for_a_card_asks_for_it(tmp_path: Path) -> None:
    work = define(parse_source("zoo:per_pixel", ["layers=3", "channels=4"]), ["1x3x32x32"])
    with pytest.raises(UsageError, match=r"--savers capture .* device is cpu"):
        find(Request(work, 0.5, tmp_path / "plan.json", savers=savers("+capture")))
    space = ProgrammeSpace(work.graph, work.optimizer, savers=savers("+capture"))
    assert space.table.plan([space.table.segment(0, len(work.graph.nodes), "keep")]).capture == "on"
    assert not last_resort("+capture") & NOT_IN_GRAPHS
    by_name = {"step_in_backward", "offload_gradients", "offload"}
    assert by_name == NOT_IN_GRAPHS  # those that plans are refused for: see above
    with pytest.raises(UsageError, match="does not go with offload"):
        check_capture(savers("+capture,+offload"), "cuda:0")


def segments(plan: Plan, **more: Any) -> Plan:
    return replace(plan, segments=tuple(replace(s, **more) for s in plan.segments))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda p: replace(p, step_in_backward=True), "step_in_backward"),
        (lambda p: replace(p, waiting_gradients="host"), "host's memory"),
        (lambda p: segments(p, store="host"), "host's memory"),
    ],
)
def test_what_no_graph_can_hold_is_refused(change: Callable[[Plan], Plan], why: str) -> None:
    case = Case("unet", lambda g: change(uniform_plan(g, "keep")))
    with pytest.raises(UsageError, match=why):
        captured(case)
    assert used(case.plan) - {"capture"} <= NOT_IN_GRAPHS  # a search knows it by its savers' names


def test_a_generator_that_the_host_seeds_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x + torch.rand_like(x))

    model, x = Noisy(), torch.randn(1, 3, 8, 8)
    graph = with_loss(rowtune.trace(model, (x,)), parse("mse"))
    module = rowtune.apply(model, uniform_plan(graph, "keep"), "mse")
    step, y = Captured(module, backward_of(module), simulated_graph.record), torch.randn(1, 4, 6, 6)
    step(x, targets=y)
    with pytest.raises(UsageError, match="rand_like draws"):
        step(x, targets=y)


def test_what_failed_is_not_hidden_by_the_end_of_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory is what steps down to a smaller plan."""

    @contextlib.contextmanager
    def capturing(graph: Any, **how: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    class Graph:
        def replay(self) -> None:
            """Nothing was captured."""

    def work() -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(torch.OutOfMemoryError):
        cuda_graph(work)
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graph(lambda: torch.zeros(()))


def test_there_are_graphs_on_cuda_devices_only() -> None:
    case = Case("unet", PLANS["keep"])
    with pytest.raises(UsageError, match="CUDA device"):
        capture(case.module)
