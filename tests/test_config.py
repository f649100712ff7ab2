"""Flags from a file and into one; words that were meant; colours; completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.cli.config import _toml

WORDS = ["zoo:unet", "--model-arg", "base=4", "--model-arg", "depth=1", "--shape", "1x3x64x16"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rowtune.tune.fit.least_peaks.__defaults__", (0.1,))
    yield tmp_path


def run(*words: str, code: int = 0) -> Any:
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert shown.exit_code == code, shown.output
    assert "Traceback" not in shown.output
    return shown


def test_saved_flags_run_the_same_command(here: Path) -> None:
    first = json.loads(run("inspect", *WORDS, "--seed", "3", "--save-config", "c.toml", "--json").stdout)
    assert tomllib.loads(Path("c.toml").read_text()) == {
        "inspect": {
            "model": "zoo:unet", "model-arg": ["base=4", "depth=1"], "shape": ["1x3x64x16"], "seed": 3,
        }
    }  # fmt: skip
    again = json.loads(run("inspect", "--config", "c.toml", "--json").stdout)
    # How small a plan may be is looked for as long as there is time.
    peaks = first.pop("predicted_peaks"), again.pop("predicted_peaks")
    assert peaks[0].keys() == peaks[1].keys() and peaks[0]["plain"] == peaks[1]["plain"]
    assert again == first


def test_what_is_typed_counts_more(here: Path) -> None:
    Path("c.toml").write_text(
        '[inspect]\nmodel = "zoo:unet"\nshape = ["1x3x64x16"]\nmodel-arg = ["base=4"]\n'
    )
    shown = json.loads(run("inspect", "--config", "c.toml", "--shape", "1x3x32x16", "--json").stdout)
    assert shown["inputs"][0]["shape"] == [1, 3, 32, 16]
    run("inspect", "zoo:edsr", "--config", "c.toml", code=2)  # edsr has no argument base


def test_a_file_of_several_commands(here: Path) -> None:
    """Each takes its own table; one is added to what was written by hand, and none is replaced."""
    Path("c.toml").write_text("# mine\n[run]\nsteps = 2\nkeep-going = true\n")
    run("inspect", *WORDS, "--config", "c.toml", "--save-config", "c.toml")
    text = Path("c.toml").read_text()
    assert text.startswith("# mine\n[run]\n") and set(tomllib.loads(text)) == {"run", "inspect"}
    shown = run("inspect", *WORDS, "--save-config", "c.toml", code=2)
    assert "has a table [inspect]" in shown.output and Path("c.toml").read_text() == text
    assert "there is no plan" in run("run", "--config", "c.toml", code=2).output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[inspect]\nsede = 3\nmodel = "zoo:unet"', "did you mean 'seed'?"),
        ("[inspct]\nseed = 3", "did you mean 'inspect'?"),
        ("seed = 3", "outside a table"),
        ("[inspect]\nseed = true", "a text or a number"),
        ('[inspect]\nshape = "1x3x64x64"', "shape is a list"),
        ("[inspect]\ncalls = 1", "true or false"),
        ('[inspect]\nseed = "many"', "Invalid value for '--seed'"),
        ("[inspect\n", "no TOML"),
        (None, "No such file"),
    ],
)
def test_files_that_make_no_sense(here: Path, text: str | None, words: str) -> None:
    if text is not None:
        Path("c.toml").write_text(text)
    shown = run("inspect", "zoo:unet", "--config", "c.toml", code=2)
    assert words in " ".join(shown.output.replace("│", " ").split())


def test_every_command_has_a_table_for_its_flags(here: Path) -> None:
    """search needs a budget: from the file it is as good as typed."""
    Path("c.toml").write_text('[search]\nmodel = "zoo:nothing"\nbudget = 8e9\ntrials = 3\ntimeout = 0.5\n')
    assert "no architecture named 'nothing'" in run("search", "--config", "c.toml", code=2).output


@pytest.mark.parametrize("value", ['a "quoted" \\ path\n', "Größe", True, 3, 0.5, ["a", "b"], "\x7f"])
def test_values_survive(value: Any) -> None:
    assert tomllib.loads(f"x = {_toml(value)}")["x"] == value


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["serach"], "search"),
        (["inspect", "zoo:unet", "--sed", "3"], "--seed"),
        (["inspect", "zoo:resnet5"], "resnet50"),
        (["inspect", "resnet50"], "zoo:resnet50"),
        (["inspect", "my_model.onx"], "my_model.onnx"),
        (["inspect", "zoo:unet", "--model-arg", "bas=4"], "base"),
        (["inspect", "zoo:unet", "--loss", "cross_entrpy"], "cross_entropy"),
        (["inspect", "zoo:unet", "--optimizer", "addam"], "adam"),
        (["inspect", "zoo:unet", "--optimizer", "sgd:momentm=1"], "momentum"),
        (["search", "zoo:unet", "--budget", "1GB", "--savers", "+offlod"], "offload"),
    ],
)
def test_did_you_mean(here: Path, words: list[str], meant: str) -> None:
    Path("my_model.onnx").write_bytes(b"")
    shown = run(*words, code=2)
    assert meant in shown.output
    assert "id you mean" in shown.output or "ossible options" in shown.output


def test_no_color(here: Path) -> None:
    """Colours are codes 30 and more; bold and dim are none."""
    words = [sys.executable, "-m", "rowtune.cli", "--help"]
    colours = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    colours.pop("NO_COLOR", None)
    colourful = subprocess.run(words, env=colours, capture_output=True, text=True, check=True).stdout
    plain = subprocess.run(
        words, env={**colours, "NO_COLOR": "1"}, capture_output=True, text=True, check=True
    ).stdout
    assert "\x1b[" in colourful and any(f"\x1b[{n}" in colourful for n in ("36", "1;36", "33", "1;33"))
    assert not any(f"\x1b[{more}3{n}m" in plain for n in range(8) for more in ("", "1;", "2;"))


@pytest.mark.parametrize(
    ("typed", "offered"), [("rowtune insp", "inspect"), ("rowtune search zoo:unet --budg", "--budget")]
)
def test_completion(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    made = subprocess.run(
        [Path(sys.executable).with_name("rowtune")],
        env={**os.environ, "_ROWTUNE_COMPLETE": "complete_bash", **words},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.stdout.split() == [offered], made.stderr
    assert "--install-completion" in run("--help").output
