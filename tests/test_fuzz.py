"""Some of the damaged files that benchmarks/fuzz.py makes by the thousand, and those that found faults."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HOME = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz", HOME)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


@pytest.fixture(scope="module")
def folder(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        fuzz.make(path)
        yield path
    sys.modules.pop("fuzz_net", None)


@pytest.mark.parametrize(
    ("kind", "seeds"), [("plan", range(30_000, 30_100)), ("model", range(30_000, 30_040))]
)
def test_damaged_files(fuzz: Any, folder: Path, kind: str, seeds: Any) -> None:
    """No traceback, no hang, nothing overwritten; most are refused, for what they are."""
    found = [fuzz.tried(folder, kind, seed, seconds=0) for seed in seeds]  # without an alarm
    assert [v for v in found if v.kind != "fine"] == []
    assert sum(v.code == {"plan": 5, "model": 3}[kind] for v in found) > len(found) / 2


FAULTS = {"plan": (45, 99, 201, 245, 260, 3123, 5083, 5323, 5499, 20136), "model": (1244, 2607)}


@pytest.mark.parametrize("kind", FAULTS)
def test_those_that_found_something(fuzz: Any, folder: Path, kind: str) -> None:
    found = [fuzz.tried(folder, kind, seed, seconds=0) for seed in FAULTS[kind]]
    assert [v for v in found if v.kind != "fine"] == []


def test_what_is_wrong_is_seen(fuzz: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that writes over a file, and one that fails in a way it should not."""

    def overwriting(*_: object) -> None:
        (folder / "precious.txt").write_text("yours")

    monkeypatch.setattr("rowtune.plan.file.load_plan", overwriting)
    assert fuzz.tried(folder, "plan", 1, seconds=0).kind == "overwritten"
    (folder / "precious.txt").write_text("mine")

    def failing(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("rowtune.plan.file.load_plan", failing)
    assert fuzz.tried(folder, "plan", 1, seconds=0).kind == "undocumented"
