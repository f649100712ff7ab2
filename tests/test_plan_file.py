"""plan.json: round trip, strict reading, whole writing."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rowtune.errors import InfeasibleError, PlanError
from rowtune.plan.file import PlanFile, at_budget, dumps, load_plan, save_plan
from rowtune.plan.plan import Plan, Segment
from rowtune.problem import Problem, Source, TensorSpec

PLAN = Plan((Segment("conv2d", "relu", "rows", band_rows=8, halo="cache"), Segment("pool", "loss")))
FILE = PlanFile(
    problem=Problem(
        Source("zoo", "unet", (("base", 4), ("sizes", (3, 5)))),
        (TensorSpec("input", (1, 3, 64, 64)),),
        "cpu",
        "mse",
        "sgd:lr=0.01",
        3,
    ),
    fingerprint="abc",
    budget_bytes=10_000,
    plan=PLAN,
    predicted={"peak_bytes": 9000, "activation_bytes": 5000, "seconds": 0.5, "peak_at": "relu"},
    measured={"peak_bytes": 9100, "step_seconds": 0.25, "plain_peak_bytes": None, "max_relative_error": 1e-6},
    front=({"peak_bytes": 9100, "step_seconds": 0.25, "decisions": PLAN.to_dict()},),
    study="plan.records.jsonl",
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(FILE, path)
    assert load_plan(path) == FILE
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_another_budget_takes_another_point_of_the_front() -> None:
    small, fast = Plan((Segment("a", "b", "checkpoint"),)), Plan((Segment("a", "b"),))
    front = tuple(
        {"peak_bytes": peak, "step_seconds": seconds, "decisions": plan.to_dict()}
        for peak, seconds, plan in ((5_000, 0.9, small), (9_100, 0.25, PLAN), (20_000, 0.1, fast))
    )
    file = replace(FILE, front=front, reserve_bytes=1_000, threads=1)
    for budget, plan in ((6_000, small), (9_999, small), (10_100, PLAN), (50_000, fast)):
        found = at_budget(file, budget)
        assert (found.plan, found.budget_bytes, found.threads) == (plan, budget, 0)
        assert found.measured["peak_bytes"] <= budget - 1_000
    with pytest.raises(InfeasibleError, match="takes 6000 bytes"):
        at_budget(file, 5_999)
    with pytest.raises(InfeasibleError, match="search again"):
        at_budget(replace(file, front=()), 1 << 30)


def test_a_person_can_read_it() -> None:
    text = dumps(FILE.to_dict())
    assert json.loads(text) == json.loads(json.dumps(FILE.to_dict()))
    assert '{"first": "conv2d", "last": "relu", "policy": "rows", "band_rows": 8, "halo": "cache"}' in text
    assert max(map(len, text.splitlines())) <= 160


def test_savers_are_read_back(tmp_path: Path) -> None:
    """What is at its default is not written: such a plan reads as before."""
    assert set(PLAN.to_dict()) == {"axis", "segments"}
    segments = (replace(PLAN.segments[0], store="host"), replace(PLAN.segments[1], store="bf16"))
    plan = Plan(segments, 2, "channels_last", "bf16", True, 0.02)
    save_plan(replace(FILE, plan=plan), tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").plan == plan
    assert '"store": "host"' in (tmp_path / "plan.json").read_text()


def edit(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The file's JSON with one place changed (deleted where value is `...`)."""
    data: Any = json.loads(json.dumps(FILE.to_dict()))
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return dict(data)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), 1, "schema 1; this .* Make a new plan: rowtune search zoo:unet .*64 --budget 10000"),
        (("schema",), 3, "schema 3"),
        (("decisions", "layout"), "nchw", "layout is one of"),
        (("decisions", "dtype"), "int8", "dtype is one of"),
        (("decisions", "step_in_backward"), 1, "step_in_backward is true or false"),
        (("decisions", "max_grad_error"), "0.1", "max_grad_error is a number"),
        (("decisions", "stores"), {}, "unknown key 'stores'"),
        (("decisions", "segments", 0, "store"), "disk", "store is one of"),
        (("decisions", "segments", 0, "store"), "fp16", "the plan allows no error"),
        (("schema",), ..., "schema None"),
        (("surprise",), 1, "unknown key 'surprise'"),
        (("loss",), ..., "missing key 'loss'"),
        (("budget_bytes",), "8GB", "budget_bytes"),
        (("budget_bytes",), -1, "budget_bytes"),
        (("budget_bytes",), True, "budget_bytes"),
        (("model", "kind"), "pickle", "model.kind"),
        (("model", "args"), [], "args"),
        (("inputs", 0, "shape"), [1, 3, 0, 4], "shape"),
        (("inputs", 0, "shape"), [1, 3, 4.5, 4], "shape"),
        (("inputs", 0, "dtype"), "nn", "dtype"),
        (("inputs", 0, "extra"), 1, "an input"),
        (("decisions", "segments", 0, "policy"), "magic", "policy"),
        (("decisions", "segments", 0, "band_rows"), 0, "band_rows"),
        (("decisions", "segments", 0, "band_rows"), -4, "band_rows"),
        (("decisions", "segments", 0, "band_rows"), 2.5, "band_rows"),
        (("decisions", "segments", 0, "halo"), "none", "halo"),
        (("decisions", "segments", 0, "first"), ..., "segment"),
        (("decisions", "segments"), {}, "segments"),
        (("decisions", "axis"), 0, "axis"),
        (("decisions",), None, "decisions"),
        (("measured", "peak_bytes"), "much", "measured.peak_bytes"),
        (("measured", "peak_bytes"), -1, "measured.peak_bytes"),
        (("measured", "mood"), 1, "unknown key 'mood'"),
        (("front", 0, "decisions", "segments", 0, "halo"), 3, "halo"),
        (("front", 0, "peak_bytes"), ..., "front"),
        (("seed",), "x", "seed"),
        (("device",), None, "device"),
        (("versions",), [], "versions"),
    ],
)
def test_whatever_is_wrong_is_named(tmp_path: Path, path: tuple[Any, ...], value: Any, says: str) -> None:
    target = tmp_path / "plan.json"
    target.write_text(json.dumps(edit(path, value)))
    with pytest.raises(PlanError, match=says) as caught:
        load_plan(target)
    assert "\n" not in str(caught.value) and str(target) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"schema": NaN}',
        pickle.dumps({"schema": 2}),
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_no_plan(tmp_path: Path, content: bytes) -> None:
    target = tmp_path / "plan.json"
    target.write_bytes(content)
    with pytest.raises(PlanError):
        load_plan(target)


def test_a_truncated_plan_is_refused_at_every_length(tmp_path: Path) -> None:
    text = dumps(FILE.to_dict())
    target = tmp_path / "plan.json"
    for length in range(0, len(text) - 1, 37):
        target.write_text(text[:length])
        with pytest.raises(PlanError):
            load_plan(target)


def test_a_failed_write_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    save_plan(FILE, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_plan(replace(FILE, budget_bytes=5), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_infinities_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_plan(replace(FILE, measured={"step_seconds": float("inf")}), tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_the_model_is_found_beside_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(FILE.problem, model=Source("onnx", "net.onnx"))
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "plan.json"
    save_plan(replace(FILE, problem=problem), path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"net\.onnx"):
        load_plan(path)
    (tmp_path / "deep" / "net.onnx").write_bytes(b"")
    assert Path(load_plan(path).problem.model.text) == tmp_path / "deep" / "net.onnx"
