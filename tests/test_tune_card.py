"""Budgets far below what plain PyTorch takes, on a simulated card: no plan that fits is out of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_card import Card, insert
from torch import nn

from rowtune.cost.predict import predict
from rowtune.importers.source import parse_source
from rowtune.plan.file import PlanFile
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.train.loop import train
from rowtune.train.options import Options
from rowtune.tune.find import state_bytes
from rowtune.tune.measure import Bench
from rowtune.tune.meter import measure_memory
from rowtune.tune.records import RecordFile
from rowtune.tune.reference import plain_peak
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.step import Workload, define
from rowtune.tune.study import search
from rowtune.tune.task import Task


def workload(name: str = "zoo:unet", shape: str = "1x3x96x48") -> Workload:
    return define(parse_source(name, ["base=4", "depth=1"]), [shape])


def card_for(monkeypatch: pytest.MonkeyPatch, work: Workload) -> Card:
    """As large as plain and its float64 copy need, so that no budget's cap comes from the card itself."""
    parameters = sum(t.numel() * t.itemsize for t in work.module.state_dict().values())
    return insert(monkeypatch, Card(3 * plain_peak(work), parameters))


@pytest.mark.parametrize(
    ("name", "share"),
    [("zoo:unet", 0.25), ("zoo:unet", 0.5), ("zoo:unet", 0.75), ("zoo:unet_bn", 0.75)],
)
def test_search_verify_and_run_under_a_cap(monkeypatch: pytest.MonkeyPatch, name: str, share: float) -> None:
    work = workload(name)
    card = card_for(monkeypatch, work)
    limit = int(share * plain_peak(work))
    assert state_bytes(work) < limit
    with card:
        bench = Bench(work.problem, limit)
        space = ProgrammeSpace(work.graph, work.optimizer.slots)
        task = Task(
            space=space,
            predict=lambda plan: predict(work.graph, plan, work.optimizer.slots, space.profile),
            measure=lambda plan, effort, timeout, worth: bench.measure(plan, "quick", worth),
            records=RecordFile(None, {}),
            limit=limit,
            trials=3,
            tell=lambda now: space.tell(now._replace(left=20.0)),  # planning takes a third of that
        )
        result = search(task)
        best = Plan.from_dict(dict(result.best.decisions or {}))
        assert (result.best.peak_bytes or 0) <= limit
        assert {r.status for r in result.records} <= {"ok", "slow", "rejected", "oom"}, result.records
        # Plans take less than predicted so far: only one that was predicted to take more may not fit.
        assert all((r.predicted_bytes or 0) > limit for r in result.records if r.status == "oom")
        assert result.plain is not None and (result.plain.peak_bytes or 0) > limit
        assert bench.check(best).ok
        file = PlanFile(work.problem, work.graph.fingerprint, limit, best, {}, {})
        trained = train(file, workload(name), Options(steps=3))
    assert trained.status == "ok" and trained.steps == 3 and (trained.peak_bytes or 0) <= limit
    assert limit in card.caps and card.refused == sum(r.status == "oom" for r in result.records)


def test_a_plan_over_the_cap_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload()
    card = card_for(monkeypatch, work)
    with card:
        bench = Bench(work.problem, plain_peak(work) // 3)
        assert bench.measure(uniform_plan(work.graph, "keep")).status == "oom"
        assert bench.measure(uniform_plan(work.graph, "rows", 8)).status == "ok"
        assert bench.measure(None).status == "ok"  # plain is not asked to fit
    assert card.refused == 1


def test_a_plan_that_cannot_win_is_left_after_one_step() -> None:
    work = workload()
    bench = Bench(work.problem)
    plan = uniform_plan(work.graph, "rows", 8)
    slow = bench.measure(plan, worth_seconds=0.0)
    assert slow.status == "slow" and slow.peak_bytes is None and (slow.step_seconds or 0) > 0
    assert (slow.max_relative_error or 0) < 1e-3
    assert bench.measure(plan).status == "ok"


def test_the_context_is_warm_before_it_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are part of the context once they are loaded: by a warm-up, by the plan's check, and
    by its first step in training, after which the cap is set again."""
    said: list[Any] = []
    for place in ("tune.measure", "train.loop"):
        monkeypatch.setattr(f"rowtune.{place}.warm_up", lambda device: said.append("warm"))
        monkeypatch.setattr(f"rowtune.{place}.cap_memory", lambda device, limit: said.append(limit))
    work = workload()
    plan = uniform_plan(work.graph, "rows", 8)
    bench = Bench(work.problem, 10**9, work)
    checked = bench.check

    def check(plan: Plan, dtype: Any = None) -> Any:
        said.append("check")
        return checked(plan, dtype)

    monkeypatch.setattr(bench, "check", check)
    assert bench.measure(plan).status == "ok"
    assert said == ["warm", "check", 10**9, None]
    said.clear()
    file = PlanFile(work.problem, work.graph.fingerprint, 10**9, plan, {}, {})
    train(file, work, Options(steps=3), lambda report: said.append(report.step))
    assert said == ["warm", 10**9, 1, 10**9, 2, 3]


def test_a_card_is_metered_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator holds in reserve may still grow after the first; the context counts as well."""
    steps: list[int] = []
    reserved = [100, 300, 200]
    cuda = {
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: steps.clear(),
        "memory_allocated": lambda *_: 10,
        "max_memory_allocated": lambda *_: 90,
        "max_memory_reserved": lambda *_: max(reserved[: len(steps)]),
        "memory_reserved": lambda *_: 50,
        "mem_get_info": lambda *_: (1000, 2000),
    }
    for name, function in cuda.items():
        monkeypatch.setattr(f"torch.cuda.{name}", function)
    monkeypatch.setattr("rowtune.tune.device.torch.zeros", lambda *_, **__: None)
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    memory = measure_memory(lambda: steps.append(1), module, optimizer, [], "cuda:0", steps=3)
    assert len(steps) == 3 and memory.allocator_peak_bytes == 90
    assert memory.peak_bytes == 300 + (2000 - 1000 - 50)
    assert measure_memory(lambda: steps.append(1), module, optimizer, [], "cuda:0").peak_bytes == 100 + 950
    assert len(steps) == 1  # a training step is taken once
