"""What only a GPU can show. Marked cuda; without a card each says so."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.cost.predict import predict
from rowtune.importers.source import parse_source
from rowtune.plan.uniform import uniform_plan
from rowtune.runtime.captured import capture
from rowtune.runtime.module import apply
from rowtune.tune.device import cap_memory, context_bytes, warm_up
from rowtune.tune.measure import Bench
from rowtune.tune.reference import plain_peak
from rowtune.tune.step import Workload, define, steps_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CARD = "cuda:0"


def workload(name: str = "unet", arguments: str = "base=8 depth=2", shape: str = "1x3x256x192") -> Workload:
    return define(parse_source(f"zoo:{name}", arguments.split()), [shape], device=CARD)


@pytest.mark.parametrize("name", ["unet", "unet_bn"])
@pytest.mark.parametrize("halo", ["recompute", "cache", "sweep"])
def test_float64_gradients(name: str, halo: Any) -> None:
    work = workload(name)
    check = Bench(work.problem, work=work).check(uniform_plan(work.graph, "rows", 16, halo), torch.float64)
    assert check.ok, check


def test_a_plan_is_measured_under_a_cap_that_plain_does_not_fit() -> None:
    work = workload("per_pixel", "", "1x3x2048x2048")
    warm_up(CARD)
    budget = context_bytes(CARD) + plain_peak(work) // 2
    bench = Bench(work.problem, budget, work)
    made = bench.measure(uniform_plan(work.graph, "rows", 128))
    assert made.status == "ok" and (made.peak_bytes or 0) <= budget, made
    assert bench.measure(uniform_plan(work.graph, "keep")).status == "oom"
    assert bench.measure(None).status == "ok"


def test_the_allocator_agrees_with_the_prediction() -> None:
    work = workload("vgg16_features", "", "1x3x1024x1024")
    plan = uniform_plan(work.graph, "keep")
    made = Bench(work.problem, work=work).measure(plan)
    assert made.allocator_peak_bytes is not None
    assert made.allocator_peak_bytes == pytest.approx(predict(work.graph, plan, 1).peak_bytes, rel=0.5)


def test_bf16_autocast_trains_in_bands() -> None:
    work = workload("unet_bn")
    module = work.module.to(CARD)
    runner = apply(module, uniform_plan(work.graph, "rows", 16), work.loss)
    inputs, target = work.batch(device=CARD)
    with torch.autocast("cuda", torch.bfloat16):
        loss = runner(*inputs, targets=target)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("policy", ["keep", "checkpoint", "rows"])
@pytest.mark.parametrize("name", ["unet", "unet_bn"])
def test_captured_steps_train_as_others_do(name: str, policy: Any) -> None:
    work = workload(name)
    plan = uniform_plan(work.graph, policy, 16 if policy == "rows" else 0)
    batches = [work.batch(device=CARD) for _ in range(4)]
    weights = {}
    for how in ("off", "on"):
        module = copy.deepcopy(work.module).to(CARD, torch.float64)
        runner = apply(module, replace(plan, capture=how), work.loss)
        step = steps_of(runner, torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9))
        for at, (inputs, target) in enumerate(batches):
            step(tuple(t.double() * (1 + at) for t in inputs), target)
        weights[how] = module.state_dict()
    for key, wanted in weights["off"].items():
        torch.testing.assert_close(weights["on"][key], wanted, rtol=1e-9, atol=1e-9, msg=key)


def test_a_captured_step_is_launched_sooner() -> None:
    work = workload("per_pixel", "", "1x3x512x512")
    module = work.module.to(CARD)
    inputs, target = work.batch(device=CARD)
    runner = apply(module, uniform_plan(work.graph, "rows", 16), work.loss)
    step = capture(runner)
    launches = []
    for _ in range(3):
        module.zero_grad(set_to_none=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(*inputs, targets=target)
            torch.cuda.synchronize()
        launches.append(sum(e.name.startswith("aten::") for e in profile.events() or []))
    assert launches[2] < 0.1 * launches[0], launches


def test_a_cap_can_be_lifted() -> None:
    cap_memory(CARD, context_bytes(CARD) + (64 << 20))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(256 << 20, dtype=torch.uint8, device=CARD)
    cap_memory(CARD, None)
    torch.empty(256 << 20, dtype=torch.uint8, device=CARD)


def test_search_run_and_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Any:
        result = CliRunner().invoke(app, [*words, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    found = call("search", "zoo:per_pixel", "--shape", "1x3x2048x2048", "--budget", "2GB", "--trials", "3")
    assert found["peak_bytes"] <= 2e9 and found["max_relative_error"] < 1e-3
    ran = call("run", "plan.json", "--steps", "4")
    assert ran["status"] == "ok" and ran["peak_bytes"] <= 2e9
    assert call("verify", "plan.json")["status"] == "ok"
