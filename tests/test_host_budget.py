"""What plans keep in the host's memory has a budget of its own; a report says what each saver is for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from training import plan_file
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.cost.candidates import offloaded
from rowtune.cost.predict import predict
from rowtune.cost.profile import Profile
from rowtune.cost.programme import fastest, plan_of, smallest
from rowtune.cost.table import Table, within
from rowtune.errors import InfeasibleError, RowtuneError
from rowtune.importers.source import parse_source
from rowtune.plan.file import save_plan
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.report.savings import WITHOUT, savings
from rowtune.train.loop import train
from rowtune.train.options import Options
from rowtune.tune.find import Request, host_bytes, state_bytes
from rowtune.tune.foresee import foresee
from rowtune.tune.host import half_of_free, on_host
from rowtune.tune.savers import SAVERS, last_resort, parse, used
from rowtune.tune.step import Workload, define


@pytest.fixture(scope="module")
def work() -> Workload:
    return define(parse_source("zoo:per_pixel", ["layers=4"]), ["1x3x64x64"])


def on_the_host(work: Workload) -> Plan:
    plan = uniform_plan(work.graph, "keep")
    return replace(plan, segments=tuple(replace(s, store="host") for s in plan.segments))


def test_paths_keep_within_the_hosts_budget(work):
    made = Table(work.graph)
    made.add([*offloaded(made), *(made.keep(k, k + 1) for k in range(len(made.cuts) - 1))], within(60))
    whole = fastest(made, 1 << 60)
    assert whole is not None
    limit = smallest(made) or 0
    free = fastest(made, limit)
    assert free is not None
    most = sum(o.host_bytes for o in free.options)
    assert predict(work.graph, plan_of(made, free)).host_bytes == most > 0
    made.host_bytes = most - 1
    found = fastest(made, limit)
    assert found is None or found.seconds >= free.seconds
    assert found is None or predict(work.graph, plan_of(made, found)).host_bytes < most
    made.host_bytes = 0
    least = fastest(made, limit)
    assert least is None or predict(work.graph, plan_of(made, least)).host_bytes == 0
    roomy = fastest(made, whole.peak)
    assert roomy is not None and sum(o.host_bytes for o in roomy.options) == 0


def test_what_is_over_it_is_rejected_with_the_figures(work):
    cost = predict(work.graph, on_the_host(work))
    assert cost.host_bytes > 1 << 20 and on_host(cost, cost.host_bytes) is cost
    with pytest.raises(RowtuneError, match=r"MB in the host's memory, over its budget of 1\.00 MB"):
        on_host(cost, 1_000_000)
    with pytest.raises(InfeasibleError, match="--host-budget"):
        train(replace(plan_file(work), plan=on_the_host(work)), work, Options(steps=1, host_budget=1000))


def test_half_of_what_is_free_by_default(work, monkeypatch):
    monkeypatch.setattr("rowtune.tune.host.free_bytes", lambda device: 1000)
    assert half_of_free() == 500 and half_of_free(2) == 250
    request = Request(work, 1000, Path("plan.json"))
    assert host_bytes(request) == 500 and host_bytes(replace(request, workers=4)) == 125
    assert host_bytes(replace(request, host_budget=7)) == 7


def test_plans_without_a_search_keep_to_it(work, tmp_path, monkeypatch):
    """Neither the plan nor its front."""
    monkeypatch.setattr("rowtune.tune.space.MOST", 3.0)
    peaks = [
        predict(work.graph, p, 1).peak_bytes for p in (uniform_plan(work.graph, "keep"), on_the_host(work))
    ]
    request = Request(work, sum(peaks) // 2, tmp_path / "plan.json", savers=frozenset({"offload", "rows"}))
    found = foresee(replace(request, host_budget=0), Profile())[0]
    plans = [found.plan, *(Plan.from_dict(point["decisions"]) for point in found.front)]
    assert all(predict(work.graph, plan).host_bytes == 0 for plan in plans)


def test_the_last_resort_is_taken_where_nothing_fits_without(tmp_path, monkeypatch):
    """Weights, gradients and momentum alone are over the budget."""
    monkeypatch.setattr("rowtune.tune.space.MOST", 6.0)
    made = define(parse_source("zoo:unet", ["base=8", "depth=3"]), ["1x3x32x32"])
    budget = int(0.9 * state_bytes(made))
    request = Request(made, budget, tmp_path / "plan.json", savers=parse(""), resort=last_resort(""))
    said: list[str] = []
    found = foresee(request, Profile(), said.append)[0]
    assert "alone take" in said[0] and "trying with offload, offload_gradients, offload_state" in said[0]
    assert found.predicted["peak_bytes"] <= budget and found.predicted["host_bytes"] > 0
    assert {"offload_state", "step_in_backward"} <= used(found.plan)
    for forbidden in ("-offload_state,-step_in_backward", "rows,checkpoint"):
        less = replace(request, savers=parse(forbidden), resort=last_resort(forbidden))
        with pytest.raises(InfeasibleError, match=r"alone take .*allow --savers \+offload_state"):
            foresee(less, Profile())


def test_the_command_line_says_so(work, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(replace(plan_file(work), plan=on_the_host(work)), path)
    words = ["run", str(path), "--steps", "1", "--device", "cpu", "--json"]
    shown = CliRunner().invoke(app, [*words, "--host-budget", "100kB"])
    assert shown.exit_code == 4, shown.output
    assert "over its budget of 100 kB" in json.loads(shown.stdout.splitlines()[-1])["error"]
    assert CliRunner().invoke(app, words).exit_code == 0
    report = json.loads(CliRunner().invoke(app, ["report", str(path), "--json"]).stdout)
    assert report["host_bytes"] == predict(work.graph, on_the_host(work)).host_bytes
    assert [s["name"] for s in report["savings"]] == ["offload"]
    told = CliRunner().invoke(app, ["report", str(path)])
    assert "What each saver takes off the peak" in told.output and "on the host" in told.output


def test_what_each_saver_takes_off(work):
    graph = work.graph
    rows, keep = uniform_plan(graph, "rows", 8), uniform_plan(graph, "keep")
    found = savings(graph, rows, 1)
    assert [(s.name, s.bytes) for s in found] == [
        ("rows", predict(graph, keep, 1).peak_bytes - predict(graph, rows, 1).peak_bytes)
    ]
    mixed = replace(on_the_host(work), dtype="bf16", step_in_backward=True, optimizer_state="host")
    mixed = replace(mixed, waiting_gradients="host")
    mixed = replace(mixed, segments=tuple(replace(s, cheap="recompute") for s in mixed.segments))
    names = {s.name: s.bytes for s in savings(graph, mixed, 1)}
    whole = {"bf16", "step_in_backward", "offload_gradients", "offload_state"}
    assert names.keys() == {"offload", "recompute"} | whole
    assert names["offload"] > 0 and list(names.values()) == sorted(names.values(), reverse=True)
    assert WITHOUT.keys() == SAVERS.keys() - {"channels_last", "capture"}  # which are for time
    for name, change in WITHOUT.items():
        assert name not in used(change(mixed)) and name not in used(change(rows))
