"""A run by a plan whose stores round measures how far its gradients are off, and acts on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import plan_file, workload
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.errors import GradientError
from rowtune.plan.choices import LOSSY
from rowtune.plan.file import PlanFile, exact_one, save_plan
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.train.gradient_error import Watch, exactly
from rowtune.train.loop import train
from rowtune.train.options import MadeExact, Options, StepReport, Trained
from rowtune.tune.step import Workload


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)


@pytest.fixture
def work() -> Iterator[Workload]:
    torch.manual_seed(0)
    yield workload("zoo:per_pixel", "1x3x16x12", dtype="float64")


def rounding(work: Workload, allowed: float, way: str = "keep") -> Plan:
    plan = uniform_plan(work.graph, way, 4 if way == "rows" else 0, halo="cache")
    segments = tuple(replace(s, store="int8") for s in plan.segments)
    return replace(plan, segments=segments, max_grad_error=allowed)


def file_of(work: Workload, plan: Plan, *others: Plan) -> PlanFile:
    front = tuple(
        {"peak_bytes": 1000 + i, "step_seconds": 2.0 - i / 10, "decisions": p.to_dict()}
        for i, p in enumerate((plan, *others))
    )
    return replace(plan_file(work), plan=plan, front=front, measured={"peak_bytes": 1000})


def run(work: Workload, file: PlanFile, **options: Any) -> tuple[Trained, list[StepReport], list[MadeExact]]:
    said: list[Any] = []
    trained = train(file, work, Options(**{"steps": 5, **options}), said.append)
    steps = [r for r in said if isinstance(r, StepReport)]
    return trained, steps, [r for r in said if isinstance(r, MadeExact)]


@pytest.mark.parametrize("way", ["keep", "rows"])
def test_the_error_is_measured_every_so_many_steps_and_changes_nothing(way, tmp_path):
    found = []
    for every in (2, 0):
        torch.manual_seed(0)
        work = workload("zoo:per_pixel", "1x3x16x12", dtype="float64")
        path = tmp_path / f"{every}.jsonl"
        weights = tmp_path / f"{every}.safetensors"
        trained, steps, exact = run(
            work, file_of(work, rounding(work, 0.5, way)), check_error_every=every, metrics=path, save=weights
        )
        assert trained.status == "ok" and not exact
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["gradient_error"] for line in lines] == [s.gradient_error for s in steps]
        found.append(([s.loss for s in steps], load_file(weights), [s.gradient_error for s in steps]))
    (losses, weights_, errors), (others, same, none) = found
    assert losses == others and all(torch.equal(weights_[n], same[n]) for n in same)
    assert none == [None] * 5 and [e is None for e in errors] == [False, True, False, True, False]
    assert all(1e-5 < e < 0.5 for e in errors[::2])


def test_a_violation_is_said_and_the_run_goes_on_exactly(work):
    exact, slow = uniform_plan(work.graph, "rows", 8), uniform_plan(work.graph, "checkpoint")
    file = file_of(work, rounding(work, 1e-6), slow, exact)
    trained, steps, said = run(work, file, check_error_every=3)
    assert [(r.step, r.allowed) for r in said] == [(1, 1e-6)] and said[0].error > 1e-6
    assert trained.status == "ok" and trained.notes == (str(said[0]),) and "off by" in trained.notes[0]
    assert steps[0].gradient_error == said[0].error
    assert [s.gradient_error for s in steps[1:]] == [None] * 4  # nothing is rounded any more
    again = workload("zoo:per_pixel", "1x3x16x12", dtype="float64")
    _, others, _ = run(again, replace(plan_file(again), plan=exact))
    assert [s.loss for s in steps] == [s.loss for s in others]


def test_what_the_front_has_to_go_on_with(work):
    bad, exact = rounding(work, 1e-6), uniform_plan(work.graph, "rows", 8)
    file = file_of(work, bad, exact)
    found = exact_one(file)
    assert found is not None and found.plan == exact
    assert exact_one(replace(file, budget_bytes=1000)) is None  # that one takes a byte more
    assert exact_one(file, lambda plan: plan != exact) is None
    assert exact_one(file_of(work, bad, replace(exact, dtype="bf16"))) is None
    assert exact_one(file_of(work, bad, rounding(work, 0.5))) is None


def test_without_an_exact_plan_the_run_stops(work, tmp_path):
    file = file_of(work, rounding(work, 1e-6))
    with pytest.raises(GradientError, match=r"at step 1 gradients are off by .*-every 0 trains"):
        run(work, file)
    assert run(work, file, check_error_every=0)[0].status == "ok"
    path = tmp_path / "plan.json"
    save_plan(file, path)
    shown = CliRunner().invoke(app, ["run", str(path), "--steps", "2", "--json", "--device", "cpu"])
    assert shown.exit_code == 9, shown.output
    assert "max-grad-error" in json.loads(shown.stdout.splitlines()[-1])["error"]
    words = ["run", str(path), "--steps", "2", "--check-error-every", "0", "--device", "cpu"]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_the_exact_twin_of_a_plan(work):
    plan = rounding(work, 0.5, "rows")
    twin = exactly(plan)
    assert not twin.allowed_error and all(s.store == "host" for s in twin.segments)
    assert not any(s.store in LOSSY for s in twin.leaves())
    module = work.module
    import rowtune

    runner, exact = (rowtune.apply(module, p, work.loss, graph=work.traced) for p in (plan, twin))
    before = torch.get_rng_state()
    check = Watch(runner, plan, work.loss, work.traced).check(module, work.batch())
    assert check.ok and 1e-5 < check.max_relative_error < 0.5
    assert Watch(exact, plan, work.loss, work.traced).check(module, work.batch()).max_relative_error == 0.0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in module.parameters())
