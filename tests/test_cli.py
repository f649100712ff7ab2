"""The command line on a small network: search, run, report, verify, inspect, and what each prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.plan.file import load_plan, save_plan
from rowtune.plan.uniform import uniform_plan
from rowtune.train.opened import open_plan

MODEL = ["zoo:unet", "--model-arg", "base=4", "--model-arg", "depth=1", "--shape", "1x3x64x16"]
DATA = """
import torch
from torch.utils.data import DataLoader, TensorDataset

class Flip(torch.nn.Module):
    def forward(self, x):
        return x.flip(2)

def upside_down():
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    return torch.nn.Sequential(conv, Flip(), torch.nn.ReLU())

def pairs():
    x = torch.randn(6, 3, 64, 16)
    return TensorDataset(x, (x[:, 0] > 0).long())

def loader():
    return DataLoader(pairs(), batch_size=1)

def wrong_channels():
    return [(torch.randn(1, 5, 64, 16), torch.zeros(1, 64, 16, dtype=torch.long))]

def empty():
    return []


def big():
    return [(torch.randn(4, 3, 64, 32), torch.zeros(4, 64, 32, dtype=torch.long))] * 2
"""


def call(*words: str, code: int = 0) -> Any:
    """Run a command with --json; the one object it prints."""
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("cli")
    (path / "cli_data.py").write_text(DATA)
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(path)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers: tiny networks, busy machines
    torch.set_num_threads(1)
    yield path
    torch.set_num_threads(threads)
    del os.environ["OMP_NUM_THREADS"]
    os.chdir(before)


@pytest.fixture(scope="module")
def searched(folder: Path) -> Any:
    return call("search", *MODEL, "--budget", "80%", "--trials", "2", "--seed", "1", "--device", "cpu")


def test_search_says_what_it_found(folder: Path, searched: Any) -> None:
    keys = {
        "status",
        "plan",
        "peak_bytes",
        "step_seconds",
        "plain_peak_bytes",
        "plain_step_seconds",
        "trials",
    }
    assert keys <= set(searched)
    assert searched["status"] == "ok" and searched["trials"] == 2
    assert 0 < searched["peak_bytes"] <= searched["budget_bytes"] < searched["plain_peak_bytes"]
    assert searched["max_relative_error"] < 1e-3
    plan = json.loads((folder / searched["plan"]).read_text())
    assert plan["measured"]["peak_bytes"] == searched["peak_bytes"]
    assert plan["loss"] == searched["loss"] == "cross_entropy" and "momentum=0.9" in plan["optimizer"]


def test_the_same_search_again_runs_nothing(folder: Path, searched: Any) -> None:
    records = (folder / "plan.records.jsonl").read_bytes()
    assert (
        call("search", *MODEL, "--budget", "80%", "--trials", "2", "--seed", "1", "--device", "cpu")
        == searched
    )
    assert (folder / "plan.records.jsonl").read_bytes() == records


def test_run_stays_within_the_budget_and_learns(folder: Path, searched: Any) -> None:
    made = call("run", "plan.json", "--steps", "6", "--lr", "0.05")
    assert made["status"] == "ok" and made["steps"] == 6
    assert made["peak_bytes"] == searched["peak_bytes"] and made["budget_bytes"] == searched["budget_bytes"]
    first = call("run", "plan.json", "--steps", "1")
    assert made["loss"] < first["loss"] and made["step_seconds"] > 0


def test_run_says_when_the_budget_is_broken(folder: Path, searched: Any) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["budget_bytes"] = 1000
    (folder / "tight.json").write_text(json.dumps(plan))
    assert call("run", "tight.json", "--steps", "2", code=4)["status"] == "over_budget"


def test_run_on_data_and_save(folder: Path, searched: Any) -> None:
    from safetensors.torch import load_file

    made = call("run", "plan.json", "--data", "cli_data:loader", "--epochs", "2", "--save", "w.safetensors")
    assert made["steps"] == 12 and made["weights"] == "w.safetensors"
    from rowtune import zoo

    state = zoo.build("unet", base=4, depth=1).state_dict()
    assert {k: v.shape for k, v in load_file("w.safetensors").items()} == {
        k: v.shape for k, v in state.items()
    }
    assert call("run", "plan.json", "--data", "cli_data:pairs", "--steps", "8")["steps"] == 8


def test_run_on_larger_batches_measures_them(folder: Path, searched: Any) -> None:
    made = call("run", "plan.json", "--data", "cli_data:big", code=4)
    assert made["status"] == "over_budget" and made["peak_bytes"] > searched["peak_bytes"]


def test_run_replaces_weights_only_when_told(folder: Path, searched: Any) -> None:
    (folder / "kept.safetensors").write_text("precious")
    failed = call("run", "plan.json", "--save", "kept.safetensors", code=2)
    assert "--force" in failed["error"] and (folder / "kept.safetensors").read_text() == "precious"
    call("run", "plan.json", "--steps", "1", "--save", "kept.safetensors", "--force")
    assert (folder / "kept.safetensors").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--data", "cli_data:nothing"], 2),
        (["--data", "cli_data:empty"], 2),
        (["--data", "cli_data:wrong_channels"], 3),
        (["--epochs", "2"], 2),
        (["--steps", "0"], 2),
        (["--optimizer", "magic"], 2),
        (["--save", "no/such/folder.safetensors"], 2),
        (["--device", "cuda:7"], 2),
    ],
)
def test_run_refuses(folder: Path, searched: Any, words: list[str], code: int) -> None:
    assert call("run", "plan.json", *words, code=code)["status"] == "error"


def test_run_compares_its_engines(folder: Path, searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = call("search", *MODEL, "--budget", "50%", "--trials", "3", "--device", "cpu", "-o", "rows.json")
    assert any(
        s["policy"] == "rows" for s in json.loads((folder / "rows.json").read_text())["decisions"]["segments"]
    )
    made = call("run", "rows.json", "--steps", "4", "--verify-every", "2")
    traced = call("run", "rows.json", "--steps", "4", "--engine", "traced")
    assert made["loss"] == traced["loss"] and rows["status"] == "ok"
    from rowtune.runtime.lists.rewrites import shared

    broken = lambda listing: listing.with_calls(c for c in listing.calls if "add_" not in c.name)  # noqa: E731
    monkeypatch.setattr("rowtune.runtime.lists.rewrites.REWRITES", (shared.rewrite, broken))
    failed = call("run", "rows.json", "--steps", "2", "--verify-every", "1", code=7)
    assert "engines" in failed["error"] and "--engine traced" in failed["error"]


def test_report_packs_a_bundle(folder: Path, searched: Any) -> None:
    import zipfile

    call("report", "plan.json", "--bundle", "bug.zip")
    with zipfile.ZipFile(folder / "bug.zip") as archive:
        assert {"plan.json", "versions.json", "calls.json"} < set(archive.namelist())
        assert json.loads(archive.read("calls.json"))["calls"]
        assert json.loads(archive.read("versions.json"))["torch"] == torch.__version__
    assert "--force" in call("report", "plan.json", "--bundle", "bug.zip", code=2)["error"]


def test_verify(folder: Path, searched: Any) -> None:
    made = call("verify", "plan.json")
    assert made["status"] == "ok" and made["max_relative_error"] < 1e-3
    assert {"loss", "head.weight"} <= set(made["checked"])
    assert call("verify", "plan.json", "--dtype", "float64")["max_relative_error"] < 1e-10


def test_report_shows_what_was_tried(folder: Path, searched: Any) -> None:
    made = call("report", "plan.json")
    assert made["measured"]["peak_bytes"] == searched["peak_bytes"] and made["front"]
    assert sum(t["status"] in ("ok", "slow") for t in made["trials"]) >= 2
    for columns in ("80", "120"):
        shown = CliRunner().invoke(app, ["report"], env={"COLUMNS": columns})
        assert shown.exit_code == 0
        # Commands to copy are not broken.
        lines = [line for line in shown.stdout.splitlines() if not line.startswith("    rowtune ")]
        assert max(map(len, lines)) <= int(columns)
        assert any("★" in line for line in lines) and any("┊" in line for line in lines)
        assert "budget" in shown.stdout and "plain PyTorch" in shown.stdout


def test_report_without_its_records_shows_the_front(folder: Path, searched: Any) -> None:
    (folder / "alone").mkdir()
    (folder / "alone" / "plan.json").write_text((folder / "plan.json").read_text())
    made = call("report", "alone/plan.json")
    assert len(made["trials"]) == sum(not m.get("predicted") for m in made["front"])


def test_inspect(folder: Path) -> None:
    made = call("inspect", *MODEL)
    assert made["inputs"] == [{"name": "input", "shape": [1, 3, 64, 16], "dtype": "float32"}]
    assert made["parameters"] > 100 and made["norm_layers"] == 0 and made["segments"] and made["opaque"] == []
    normed = call("inspect", "zoo:unet_bn", *MODEL[1:])
    assert normed["norm_layers"] > 0 and normed["opaque"] == []
    assert normed["segments"][0]["barriers"] == normed["norm_layers"]
    stopped = call("inspect", "cli_data:upside_down", "--shape", "1x3x64x16", "--loss", "mse")
    (found,) = stopped["opaque"]
    assert found["operator"] == "flip" and found["reason"] and 0.2 < found["share"] < 0.5


def test_inspect_lists_the_calls_of_a_step(folder: Path, searched: Any) -> None:
    made = call("inspect", "plan.json", "--calls")
    state = searched["peak_bytes"] - searched["activation_bytes"]
    assert made["activation_bytes"] == pytest.approx(searched["activation_bytes"], rel=0.01)
    assert made["peak_bytes"] <= searched["activation_bytes"] + state
    assert any(c["op"] == "aten::convolution_backward" for c in made["calls"])
    shown = CliRunner().invoke(app, ["inspect", "plan.json", "--calls"])
    assert shown.exit_code == 0 and "aten::convolution" in shown.stdout and "alive then" in shown.stdout
    assert call("inspect", "missing.json", "--calls", code=2)["status"] == "error"


def test_inspect_says_what_runs_from_lists(
    folder: Path, searched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = load_plan(Path("plan.json"))
    rows = uniform_plan(open_plan(file)[0].graph, "rows", 8)
    save_plan(replace(file, plan=rows), Path("rows.json"))
    for segment in call("inspect", "rows.json")["segments"]:
        assert segment["policy"] == "rows" and segment["runs"] == "from a list" and not segment["why"]
    monkeypatch.setattr("rowtune.runtime.lists.tracer.MOST_CALLS", 3)
    traced = call("inspect", "rows.json")["segments"][0]
    assert traced["runs"] == "traced each time" and traced["why"] == "more than 3 calls"
    shown = CliRunner().invoke(app, ["inspect", "rows.json"])
    assert shown.exit_code == 0 and "more than 3 calls" in shown.stdout


def test_nothing_fits(folder: Path) -> None:
    made = call("search", *MODEL, "--budget", "2kB", "--trials", "3", "-o", "no.json", code=4)
    assert made["status"] == "infeasible" and "--budget" in made["error"]
    assert not (folder / "no.json").exists()


def test_help_and_import_do_not_load_torch() -> None:
    code = "import sys, rowtune.cli.app; assert not {'torch', 'optuna', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo_goes_the_whole_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SIZE", 64), ("BASE", 4), ("DEPTH", 1)):
        monkeypatch.setattr(f"rowtune.cli.demo.{name}", value)
    made = call("demo", "--trials", "2", "--steps", "3", "--budget", "75%")
    assert made["status"] == "ok" and made["steps"] == 3 and made["peak_bytes"] <= made["budget_bytes"]
    assert {p.name for p in (folder / "rowtune-demo").iterdir()} == {
        "unet.onnx",
        "plan.json",
        "plan.records.jsonl",
    }
    assert call("verify", "rowtune-demo/plan.json")["status"] == "ok"
    shown = CliRunner().invoke(app, ["demo", "--trials", "1", "--steps", "1", "--budget", "75%"])
    assert shown.exit_code == 0, shown.output
    # The report finds the model that the plan names.
    assert "Memory over the step" in shown.output and "there is no file" not in shown.output


def start_search(folder: Path, out: str) -> subprocess.Popen[str]:
    words = [
        sys.executable,
        "-m",
        "rowtune.cli",
        "search",
        *MODEL,
        "--budget",
        "80%",
        "--trials",
        "200",
        "-o",
        out,
    ]
    words += ["--device", "cpu"]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_records(path: Path, lines: int) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end:
        if path.exists() and len(path.read_text().splitlines()) > lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {lines} records")


def test_a_kill_in_mid_search_loses_no_finished_trial(folder: Path) -> None:
    process = start_search(folder, "killed.json")
    records = folder / "killed.records.jsonl"
    try:
        wait_for_records(records, 4)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = [json.loads(line) for line in records.read_text().splitlines()[1:] if line.endswith("}")]
    ran = [r for r in before if r["status"] != "rejected" and r["digest"] != "plain"]
    assert ran and not (folder / "killed.json").exists()
    trials = str(len(ran) + 1)
    made = call(
        "search", *MODEL, "--budget", "80%", "--trials", trials, "-o", "killed.json", "--device", "cpu"
    )
    after = [json.loads(line) for line in records.read_text().splitlines()[1:]]
    assert after[: len(before)] == before and len(ran) <= made["trials"] <= int(trials)
    quick = [r["digest"] for r in after if r["effort"] == "quick"]
    assert len(quick) == len(set(quick))


def test_an_interrupt_writes_the_best_so_far(folder: Path) -> None:
    process = start_search(folder, "stopped.json")
    try:
        wait_for_records(folder / "stopped.records.jsonl", 5)
    finally:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err + out
    plan = json.loads((folder / "stopped.json").read_text())
    assert plan["measured"]["peak_bytes"] <= plan["budget_bytes"]


def test_inspect_lists_every_output(tmp_path: Path) -> None:
    """An ONNX file may have heads that the loss leaves out: nothing is dropped silently."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3, stride=2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(self.body(x))
            return y, self.side(y)

    path = str(tmp_path / "two.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Two(), (torch.randn(1, 3, 16, 8),), path, dynamo=False)
    found = call("inspect", path, "--loss", "mse")
    assert found["outputs"] == [[1, 4, 16, 8], [1, 2, 7, 3]] and found["loss_output"] == 0
    assert (
        "the model has 2 outputs; the loss is on the first (1x4x16x8) and leaves out the others"
        in found["notes"]
    )
    shown = CliRunner().invoke(app, ["inspect", path]).output
    assert "1x4x16x8, 1x2x7x3" in shown and "(on the first output)" in shown
