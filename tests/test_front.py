"""The front in a plan's file: measured and predicted points, and searches that begin where another ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_file import FILE, PLAN
from test_tune_study import Bench, Space, task, true_peak
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.cost.profile import Profile
from rowtune.errors import PlanError, UsageError
from rowtune.plan.file import PlanFile, at_budget, load_plan, save_plan, smaller
from rowtune.plan.plan import Plan, Segment
from rowtune.tune.front import joined
from rowtune.tune.inherit import inherit
from rowtune.tune.records import RecordFile
from rowtune.tune.savers import DEFAULT, SAVERS, used
from rowtune.tune.study import search

MODEL = ["zoo:unet", "--model-arg", "base=4", "--model-arg", "depth=1", "--shape", "1x3x64x48"]


def point(peak: int, seconds: float, name: str, **more: Any) -> dict[str, Any]:
    decisions = Plan((Segment("a", name),)).to_dict()
    return {"peak_bytes": peak, "step_seconds": seconds, "decisions": decisions, **more}


def test_what_was_measured_counts_before_what_is_predicted() -> None:
    measured = [point(10, 5.0, "x"), point(30, 2.0, "y")]
    guesses = [
        point(*found, predicted=True)
        for found in ((5, 9.0, "z"), (8, 4.0, "x"), (20, 3.0, "w"), (40, 2.5, "v"))
    ]
    front = joined(measured, guesses)
    assert [(p["peak_bytes"], p["decisions"]["segments"][0]["last"]) for p in front] == [
        (5, "z"), (10, "x"), (20, "w"), (30, "y"),
    ]  # fmt: skip
    slow = joined([point(10, 5.0, "x")], [point(9, 4.0, "v", predicted=True)])
    assert len(slow) == 2  # what was measured stays


def test_a_predicted_point_has_to_be_clearly_faster() -> None:
    front = (point(10, 5.0, "x"), point(20, 4.8, "w", predicted=True), point(30, 4.0, "y", predicted=True))
    file = replace(FILE, front=front, reserve_bytes=0)
    assert at_budget(file, 25).plan.segments[0].last == "x"
    taken = at_budget(file, 35)
    assert taken.plan.segments[0].last == "y" and taken.measured["peak_bytes"] is None
    assert taken.predicted == {"peak_bytes": 30, "seconds": 4.0}
    down = smaller(taken)
    assert down is not None and down.plan.segments[0].last == "w"
    assert smaller(replace(file, measured={"peak_bytes": 10})) is None


def test_the_file_says_what_was_not_measured(tmp_path: Path) -> None:
    file = replace(FILE, front=(point(5, 9.0, "z", predicted=True),), predicted_for="a card", measured={})
    save_plan(file, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == file
    old = {k: v for k, v in FILE.to_dict().items() if k != "predicted_for"}
    assert PlanFile.from_dict(old) == FILE  # of a version before
    for wrong in (point(5, 9.0, "z", predicted=False), point(5, 9.0, "z", seen=True)):
        with pytest.raises(PlanError, match="a member of the front"):
            PlanFile.from_dict({**FILE.to_dict(), "front": [wrong]})


def test_what_a_plan_uses() -> None:
    inner = Segment("a", "b", "rows", 8, images=2)
    plan = Plan((Segment("a", "b", "checkpoint", inside=(inner,)), Segment("c", "d", store="host")))
    assert used(plan) == {"checkpoint", "rows", "turns", "images", "offload"}
    assert used(Plan((Segment("a", "b"),), layout="channels_last")) == {"channels_last"} < DEFAULT
    assert used(replace(PLAN, dtype="bf16", step_in_backward=True)) == {"rows", "bf16", "step_in_backward"}
    assert used(plan) <= set(SAVERS)


def test_a_saver_that_is_not_allowed_any_more_does_not_win(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    before = search(task(Bench(), path=path))
    halo = before.best.values["halo"]
    may = lambda plan: plan.segments[0].halo != halo  # noqa: E731
    after = search(task(Bench(), path=path, may=may, trials=40))
    assert after.best.values["halo"] != halo
    assert all(dict(r.decisions or {})["segments"][0].get("halo", "sweep") != halo for r in after.front)


def test_inherited_plans_are_no_trials_and_are_not_measured_again(tmp_path: Path) -> None:
    path, own = tmp_path / "plan.records.jsonl", {"study": 1}
    before = search(task(Bench(), limit=150_000, path=path))
    file = replace(FILE, study=path.name, front=())
    save_plan(file, tmp_path / "plan.json")
    records = RecordFile(tmp_path / "other.jsonl", own)
    inherited = inherit(tmp_path / "plan.json", records, own)
    assert inherited == {r.digest for r in before.records if r.status != "rejected"}
    for trials in (0, 5):
        bench = Bench()
        after = search(task(bench, limit=20_000, records=records, inherited=inherited, trials=trials))
        assert after.measured == trials == len(bench.runs("quick"))
        assert not set(bench.runs("quick")) & inherited and ("plain", "quick") not in bench.asked
    assert (after.best.peak_bytes or 0) <= 20_000
    with pytest.raises(UsageError, match="study is 1, now 2"):
        inherit(tmp_path / "plan.json", RecordFile(None, {}), {"study": 2})


def test_without_its_records_a_plan_s_front_is_inherited(tmp_path: Path) -> None:
    plan = Space().plan({"a": 4, "b": 2, "halo": "sweep"})
    front = (
        {"peak_bytes": true_peak(plan), "step_seconds": 0.1, "decisions": plan.to_dict()},
        point(5, 9.0, "z", predicted=True),
    )
    save_plan(replace(FILE, front=front), tmp_path / "plan.json")
    problem = FILE.problem
    identity = {
        "fingerprint": "abc", "inputs": [str(s) for s in problem.inputs], "dtype": "", "device": "cpu",
        "loss": problem.loss, "optimizer": problem.optimizer, "machine": "this one", "torch": "2",
    }  # fmt: skip
    records = RecordFile(None, {})
    assert len(inherit(tmp_path / "plan.json", records, identity)) == 1
    result = search(task(Bench(), records=records, trials=0))
    assert result.best.decisions == plan.to_dict()
    with pytest.raises(UsageError, match=r"--from .* was measured for something else.*loss is mse, now l1"):
        inherit(tmp_path / "plan.json", RecordFile(None, {}), {**identity, "loss": "l1"})


# -- as it is typed ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("front")
    before, threads = Path.cwd(), os.environ.get("OMP_NUM_THREADS")
    os.chdir(path)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    yield path
    os.chdir(before)
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]


def call(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def tried(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()[1:]]


def test_predict_only_runs_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWTUNE_CACHE", str(tmp_path))  # in which nothing was timed yet

    def refuse(*_: Any) -> None:
        raise AssertionError("a step was run")

    monkeypatch.setattr("rowtune.tune.supervisor.Worker.open", refuse)
    card = Profile("a card", 0, "2", 1e13, 1e12, curves={"nothing like it": ((1, 1e-6),)})
    Path("card.json").write_text(json.dumps(card.to_dict()))
    words = ["search", *MODEL, "--budget", "60%", "--timeout", "60", "--predict-only"]
    for more, name, device in (
        ((), "a processor like many", "cpu"),
        (("--device-profile", "card.json"), "a card", "cuda:0"),
    ):
        found = call(*words, "-o", "seen.json", *more, "--force")
        assert found["predicted_for"] == name and found["predicted_peak_bytes"] <= found["budget_bytes"]
        file = load_plan(Path("seen.json"))
        assert file.problem.device == device and file.predicted_for == name and not file.measured
        assert len(file.front) > 1 and all(m["predicted"] for m in file.front)
    assert not Path("seen.records.jsonl").exists()
    refused = call("search", *MODEL, "--budget", "130kB", "--timeout", "60", "--predict-only", code=4)
    assert "no plan fits" in refused["error"] and "give --budget" in refused["error"]
    assert "for --predict-only" in call(*words[:-1], "--device-profile", "card.json", code=2)["error"]
    assert "give a MODEL" in call("search", "--budget", "60%", "--predict-only", code=2)["error"]


def test_a_search_goes_on_from_a_plan(folder: Path) -> None:
    """From a prediction to a search, to another budget: nothing is measured twice."""
    predict = ["--budget", "60%", "--timeout", "60", "--predict-only", "-o", "seen.json", "--force"]
    call("search", *MODEL, *predict)
    shown = CliRunner().invoke(app, ["report", "seen.json"])
    assert shown.exit_code == 0 and "nothing was measured" in " ".join(shown.output.split())
    first = call("search", "--from", "seen.json", "--budget", "80%", "--trials", "2", "-o", "first.json")
    front = load_plan(Path("first.json")).front
    assert any(m.get("predicted") for m in front) and not all(m.get("predicted") for m in front)
    peaks = [m["peak_bytes"] for m in front]
    assert peaks == sorted(peaks) and len(front) > 2
    ran = call("run", "first.json", "--budget", str(peaks[0] + 1000), "--steps", "2")
    assert ran["status"] == "ok" and ran["peak_bytes"] <= peaks[0] + 1000
    again = call("search", "--from", "first.json", "--budget", "79%", "--trials", "0", "-o", "second.json")
    known = {r["digest"] for r in tried("first.records.jsonl") if r["status"] != "rejected"}
    now = [r["digest"] for r in tried("second.records.jsonl")]
    assert again["trials"] == 0 and set(now) == known  # and the winner once more
    assert first["plain_peak_bytes"] == again["plain_peak_bytes"]
    refused = call("search", "--from", "first.json", "--loss", "l1", "--budget", "1GB", code=2)
    assert "--loss with --from" in refused["error"]
