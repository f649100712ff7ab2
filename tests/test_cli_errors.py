"""Bad input of every kind: one clear line, the right exit code, and nothing that exists destroyed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rowtune.cli.app import app

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(x)

class Branches(Net):
    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x

def net(): return Net()
def other(): return nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
def branches(): return Branches()
def frozen(): return Net().requires_grad_(False)
def fails(): raise OSError("disk on fire")
def number(): return 7
"""
PLAN = {
    "schema": 2,
    "model": {"kind": "factory", "source": "cli_factories:net", "args": {}},
    "inputs": [{"name": "x", "shape": [1, 3, 16, 16], "dtype": "float32"}],
    "dtype": "",
    "device": "cpu",
    "loss": "mse",
    "optimizer": "sgd:lr=0.01",
    "seed": 0,
    "fingerprint": "",
    "budget_bytes": 1000000,
    "reserve_bytes": 0,
    "decisions": {"segments": [{"first": "conv2d", "last": "loss", "policy": "keep"}], "axis": 2},
    "predicted": {},
    "measured": {},
    "front": [],
    "study": "",
    "versions": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("errors")
    (path / "cli_factories.py").write_text(FACTORIES)
    (path / "text.onnx").write_text("this is not ONNX")
    (path / "empty.onnx").write_bytes(b"")
    (path / "broken.pt2").write_bytes(b"PK\x03\x04")
    (path / "notes.txt").write_text("notes")
    (path / "precious.json").write_text('{"my": "settings"}')
    (path / "deaf").mkdir()
    (path / "deaf").chmod(0o555)
    before = Path.cwd()
    os.chdir(path)
    from rowtune.importers.source import parse_source
    from rowtune.tune.step import define

    PLAN["fingerprint"] = define(parse_source("cli_factories:net"), ["1x3x16x16"]).graph.fingerprint
    (path / "plan.json").write_text(json.dumps(PLAN))
    yield path
    (path / "deaf").chmod(0o755)
    os.chdir(before)
    sys.modules.pop("cli_factories", None)


def refused(words: list[str], code: int) -> str:
    """The one line on stderr of a command that fails with this code."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    assert "Traceback" not in result.output
    return result.stderr


NET = ["cli_factories:net", "--shape", "1x3x16x16"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        # 2: usage
        (["search", "zoo:unet"], 2, "--budget"),
        (["search", "missing.onnx", "--budget", "1GB"], 2, "missing.onnx"),
        (["search", "zoo:nosuch", "--budget", "1GB"], 2, "nosuch"),
        (["search", *NET, "--budget", "lots"], 2, "8GiB"),
        (["search", *NET, "--budget", "0%"], 2, "0%"),
        (["search", *NET, "--budget", "-3GB"], 2, "8GiB"),
        (["search", *NET, "--budget", "1e40GB"], 2, "2^60"),
        (["search", "cli_factories:net", "--budget", "1GB"], 2, "--shape"),
        (["search", "cli_factories:net", "--shape", "1xx3", "--budget", "1GB"], 2, "NxCxHxW"),
        (["search", *NET, "--budget", "1GB", "-o", "deaf/plan.json"], 2, "read-only"),
        (["search", *NET, "--budget", "1GB", "-o", "nowhere/plan.json"], 2, "no folder"),
        (["search", *NET, "--budget", "1GB", "-o", "deaf"], 2, "folder"),
        (["search", *NET, "--budget", "1GB", "-o", "precious.json"], 2, "--force"),
        (["search", *NET, "--budget", "1GB", "--loss", "hinge"], 2, "hinge"),
        (["search", *NET, "--budget", "1GB", "--optimizer", "sgd:speed=3"], 2, "speed"),
        (["search", *NET, "--budget", "1GB", "--optimizer", "lion"], 2, "lion"),
        (["search", *NET, "--budget", "1GB", "--device", "tpu"], 2, "--device"),
        (["search", *NET, "--budget", "1GB", "--device", "cuda:63"], 2, "cuda:63"),
        (["search", *NET, "--budget", "1GB", "--reserve", "2GB"], 2, "--reserve"),
        (["search", *NET, "--budget", "1GB", "--trials", "0"], 2, "--trials"),
        (["search", *NET, "--budget", "1GB", "--dtype", "int4"], 2, "--dtype"),
        (["search", *NET, "--budget", "1GB", "--frobnicate"], 2, "--frobnicate"),
        (["inspect", "zoo:unet", "--model-arg", "legs=4"], 2, "legs"),
        (["inspect", "notafile"], 2, "notafile"),
        (["run", "missing.json"], 2, "missing.json"),
        (["verify", "missing.json"], 2, "missing.json"),
        (["report", "missing.json"], 2, "missing.json"),
        (["dance"], 2, "dance"),
        # 3: a model that cannot be imported or trained
        (["inspect", "text.onnx"], 3, "text.onnx"),
        (["inspect", "empty.onnx"], 3, "empty.onnx"),
        (["inspect", "broken.pt2"], 3, "broken.pt2"),
        (["inspect", "notes.txt"], 3, "notes.txt"),
        (["inspect", "cli_factories:fails", "--shape", "1x3x8x8"], 3, "disk on fire"),
        (["inspect", "cli_factories:number", "--shape", "1x3x8x8"], 3, "nn.Module"),
        (["inspect", "cli_factories:absent", "--shape", "1x3x8x8"], 3, "absent"),
        (["inspect", "cli_factories:branches", "--shape", "1x3x8x8"], 3, "torch.export"),
        (["inspect", "cli_factories:frozen", "--shape", "1x3x8x8"], 3, "nothing to train"),
        (["inspect", "cli_factories:net", "--shape", "1x5x8x8"], 3, "1x5x8x8"),
        # 5: plans
        (["run", "precious.json"], 5, "precious.json"),
        (["run", "notes.txt"], 5, "notes.txt"),
        (["verify", "precious.json"], 5, "precious.json"),
        (["report", "precious.json"], 5, "precious.json"),
    ],
)
def test_bad_input(folder: Path, words: list[str], code: int, says: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    error = refused(words, code)
    assert says in error
    ours = [line for line in error.splitlines() if line.startswith("rowtune: ")]
    assert len(ours) == 1 or "Usage:" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 99}, "schema 99"),
        ({"fingerprint": "0123456789abcdef"}, "search again"),
        ({"model": {"kind": "factory", "source": "cli_factories:other", "args": {}}}, "search again"),
        ({"device": "cuda:5"}, "cuda:5"),
        ({"decisions": {"segments": [{"first": "conv2d", "last": "missing", "policy": "keep"}]}}, "missing"),
        ({"decisions": {"segments": [{"first": "nonsense", "last": "loss", "policy": "keep"}]}}, "nonsense"),
        ({"decisions": {"segments": [{"first": "conv2d", "last": "loss", "policy": "rows"}]}}, "band_rows"),
        ({"decisions": {"segments": []}}, "conv2d"),
        ({"budget_bytes": -5}, "budget_bytes"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_plan_for_something_else(folder: Path, change: dict[str, Any], says: str) -> None:
    path = folder / "edited.json"
    path.write_text(json.dumps({**PLAN, **change}))
    for command in ("run", "verify"):
        assert says in refused([command, "edited.json"], 5)
    path.unlink()


def test_json_errors_are_one_object(folder: Path) -> None:
    result = CliRunner().invoke(app, ["run", "missing.json", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["status"] == "error"


def test_verbose_shows_where(folder: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "cli_factories:fails", "--shape", "1x3x8x8", "-v"])
    assert result.exit_code == 3 and "Traceback" in result.stderr


def test_a_bug_is_one_line_and_exit_code_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("rowtune.importers.source.parse_source", bug)
    assert "ZeroDivisionError: division by zero (-v" in refused(["inspect", "zoo:unet"], 1)


def test_the_plan_in_the_way_of_another_model_stays(folder: Path) -> None:
    before = (folder / "plan.json").read_bytes()
    error = refused(["search", "cli_factories:other", "--shape", "1x3x16x16", "--budget", "1GB"], 2)
    assert "another model" in error and (folder / "plan.json").read_bytes() == before
