"""torchao's optimizers, whose state is rounded to a few bits."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training import plan_file

from rowtune.cost.predict import predict
from rowtune.cost.state import state_bytes
from rowtune.errors import UsageError
from rowtune.importers.source import parse_source
from rowtune.plan.uniform import uniform_plan
from rowtune.runtime.module import apply
from rowtune.runtime.optimizer_state import state_on_device
from rowtune.train.loop import train
from rowtune.train.options import Options
from rowtune.tune.meter import measure_memory
from rowtune.tune.optimizers import parse_optimizer, without_warnings
from rowtune.tune.step import Workload, define, steps_of

NAMES = ["adamw8bit", "adamw4bit"]


def of(name: str) -> Workload:
    with without_warnings():
        pytest.importorskip("torchao.optim")
    return define(
        parse_source("zoo:vgg16_features", ["width=16"]), ["1x3x32x32"], optimizer=f"{name}:lr=0.01"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", [False, True])
def test_their_state_is_predicted_byte_by_byte(name: str, inside: bool) -> None:
    work = of(name)
    plan = uniform_plan(work.graph, "keep")
    plan = replace(plan, step_in_backward=inside)
    module = apply(work.module, plan, work.loss, graph=work.traced)
    optimizer = work.optimizer.make(work.module.parameters())
    inputs, target = work.batch()

    def step() -> None:
        steps_of(module, optimizer)(inputs, target)

    step()
    kept = sum(t.nbytes for t in state_on_device(optimizer) if t.numel() > 1)
    assert kept == state_bytes(work.graph, work.optimizer)
    adam = state_bytes(work.graph, parse_optimizer("adamw"))
    assert kept < (0.3 if name == "adamw8bit" else 0.17) * adam
    found = measure_memory(step, work.module, optimizer, [*inputs, target], "cpu")
    assert found.peak_bytes == pytest.approx(predict(work.graph, plan, work.optimizer).peak_bytes, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_them_goes_on_as_it_began(name: str, tmp_path: Path) -> None:
    losses = []
    for stops in ((4,), (2, 4)):
        folder = tmp_path / str(len(stops))
        for stop in stops:
            work = of(name)
            options = Options(steps=stop, checkpoint=folder, resume=stop > stops[0])
            found = train(plan_file(work, 0), work, options)
        losses.append(found.loss)
    assert losses[0] == losses[1]


def test_what_is_small_stays_on_the_device() -> None:
    work = of("adamw8bit")
    file = plan_file(work, 0)
    away = replace(file, plan=replace(file.plan, optimizer_state="host"))
    with pytest.raises(UsageError, match="keeps a OptimState8bit, which is small already"):
        train(away, work, Options(steps=2))


def test_where_torchao_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match=r"pip install rowtune\[torchao\], or take adamw"):
        parse_optimizer("adamw8bit:lr=0.1")
