"""How a search and a training run end when something is against them: nothing good is lost."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.tune.device import full_precision
from rowtune.tune.measurement import failure
from rowtune.tune.optimizers import parse_optimizer
from rowtune.tune.output import check_writable, keep
from rowtune.tune.records import Record, RecordFile
from rowtune.tune.verify import outcome

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))

def explodes():
    x, y = torch.randn(1, 3, 32, 16), torch.randn(1, 2, 32, 16)
    return [(x, y), (x, y), (x * float("inf"), y), (x, y)]
"""
NET = ["ending_model:net", "--shape", "1x3x32x16", "--loss", "mse", "--device", "cpu"]


def call(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return json.loads(result.stdout), result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("endings")
    (path / "ending_model.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("OMP_NUM_THREADS", "1")
        call("search", *NET, "--budget", "90%", "--trials", "2")
        yield path


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_loss_that_is_no_number_stops_and_saves_nothing(folder: Path) -> None:
    run = ["run", "plan.json", "--data", "ending_model:explodes", "--save", "good.safetensors", "--force"]
    (folder / "good.safetensors").write_bytes(b"last good weights")
    failed, _ = call(*run, code=6)
    assert "nan at step 3" in failed["error"] and "--keep-going" in failed["error"]
    assert (folder / "good.safetensors").read_bytes() == b"last good weights"
    kept, _ = call(*run, "--keep-going")
    assert kept["steps"] == 4 and kept["loss"] is None and kept["weights"] == "good.safetensors"


def test_a_full_disk_is_found_before_training_and_costs_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["run", "plan.json", "--steps", "2", "--save", "w.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr("rowtune.tune.output.shutil.disk_usage", lambda path: type("", (), {"free": 10})())
        failed, _ = call(*run, code=2)
        assert "10 B left" in failed["error"]
    with monkeypatch.context() as patch:  # it filled up while training
        from safetensors import torch as library

        real = library.save_file
        patch.setattr(library, "save_file", lambda d, p: full() if Path(p).parent == Path() else real(d, p))
        made, said = call(*run)
    assert made["weights"] != "w.safetensors" and Path(made["weights"]).stat().st_size > 1000
    assert "could not be written" in said and not (folder / "w.safetensors").exists()


def test_a_full_disk_costs_a_search_neither_its_trials_nor_its_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rowtune.tune.find as finding

    real = finding.save_plan
    monkeypatch.setattr(finding, "save_plan", lambda f, p: full() if p.parent == Path() else real(f, p))
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda p, *a, **k: full() if "records" in str(p) and a[:1] == ("a",)
        else real_open(p, *a, **k)
    )  # fmt: skip
    made, said = call("search", *NET, "--budget", "90%", "--trials", "2", "-o", "lost.json")
    assert made["status"] == "ok" and made["plan"] != "lost.json" and Path(made["plan"]).is_file()
    assert "not in the records" in said and "could not be written" in said


def test_where_nothing_can_be_written_the_reason_is_said(tmp_path: Path) -> None:
    from rowtune.errors import UsageError

    with pytest.raises(UsageError, match=r"the plan could not .*nor elsewhere: .*No space left"):
        keep(tmp_path / "plan.json", full, "the plan")
    with pytest.raises(UsageError, match="are needed"):
        check_writable(tmp_path / "plan.json", size=1 << 60)


def test_report_survives_damaged_records(folder: Path) -> None:
    whole, _ = call("report", "plan.json")
    records = folder / "plan.records.jsonl"
    lines = records.read_text().splitlines()
    for damaged in (["garbage", *lines[1:]], [lines[0], '{"half": ', *lines[1:]], ["", lines[1]]):
        records.write_text("\n".join(damaged) + "\n")
        made, _ = call("report", "plan.json")
        assert made["measured"] == whole["measured"]
    records.write_text("\n".join([lines[0], "garbage", *lines[1:]]) + "\n")
    made, said = call("report", "plan.json")
    assert made["trials"] == whole["trials"] and "1 damaged line" in said
    records.write_text("\n".join(lines) + "\n")


def test_a_record_that_cannot_be_written_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, {"study": 1})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)  # the line may be there in part
        file.append(Record("a", "ok", peak_bytes=1, step_seconds=1.0))
    assert [r.digest for r in file.records] == ["a"] and "No space left" in file.unwritten
    file.append(Record("b", "ok", peak_bytes=1, step_seconds=1.0))
    assert [r.digest for r in RecordFile(path, {"study": 1}).records] == ["b"]


def test_a_budget_below_the_state_is_refused_before_any_trial(folder: Path) -> None:
    failed, _ = call("search", *NET, "--budget", "4kB", "--optimizer", "adam", "-o", "no.json", code=4)
    assert "parameters, gradients and the optimizer's state" in failed["error"]
    assert not (folder / "no.json").exists() and not (folder / "no.records.jsonl").exists()
    result = CliRunner().invoke(app, ["search", *NET, "--budget", "90%", "--trials", "2"])
    assert "of parameters, gradients, optimizer:" in result.stderr


def test_the_number_of_threads_found_is_used(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "threads.json").write_text(json.dumps(plan | {"threads": 3}))
    before = torch.get_num_threads()
    try:
        call("run", "threads.json", "--steps", "1")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    del plan["threads"]  # a plan of an earlier rowtune
    (folder / "threads.json").write_text(json.dumps(plan))
    call("run", "threads.json", "--steps", "1")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_way_of_saying_out_of_memory(text: str) -> None:
    assert failure(RuntimeError(text)).status == "oom"


@pytest.mark.parametrize("text", ["sgd", "sgd:momentum=0.9", "adam", "adamw", "rmsprop"])
def test_optimizers_step_without_a_temporary_as_large_as_all_parameters(text: str) -> None:
    weights = [nn.Parameter(torch.ones(8)) for _ in range(3)]
    (group,) = parse_optimizer(text).make(weights).param_groups
    assert group["fused"] if "fused" in group and text != "rmsprop" else group["foreach"] is False
    (asked,) = (
        parse_optimizer(text + (",foreach=true" if ":" in text else ":foreach=true"))
        .make(weights)
        .param_groups
    )
    assert asked["foreach"] and not asked.get("fused")


def test_verifying_touches_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """fork_rng without a list of devices makes a context on every card there is."""
    seen: list[Any] = []
    real = torch.random.fork_rng

    def watched(devices: Any = None, **more: Any) -> Any:
        seen.append(devices)
        return real(devices, **more)

    monkeypatch.setattr("torch.random.fork_rng", watched)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return ((x * self.weight - targets) ** 2).sum()

    model = Loss()
    outcome(model, model, (torch.ones(3),), torch.zeros(3))
    assert seen == [[]]


def test_precision_is_put_back_after_an_error() -> None:
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), full_precision():
        assert not torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 == before
