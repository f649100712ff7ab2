"""`rowtune run` as it is typed: data, checkpoints and weights, signals to a process, what is shown."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training import MODELS, masks, write_plan
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.cli.screen import Screen
from rowtune.cli.train_display import TrainDisplay, clock, curve, sparkline
from rowtune.train.options import StepReport, ValReport

SLOW = """
import time
from pathlib import Path
import torch
from rowtune.train.folder import FolderSet, Need
from rowtune.train.layout import read_layout

class Slow(FolderSet):  # the same pictures, from a disk that takes its time
    def __getitem__(self, i):
        time.sleep(0.2)
        return super().__getitem__(i)

def pictures():
    need = Need((3, 16, 12), (3, 16, 12), "cross_entropy", True, torch.float32)
    return Slow(read_layout(Path("pictures"), "--data"), need)
"""


def call(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["run", *words, "--json"])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("run")
    (path / "run_models.py").write_text(MODELS)
    (path / "slow_disk.py").write_text(SLOW)
    masks(path / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        patch.setenv("OMP_NUM_THREADS", "1")
        write_plan(path / "plan.json", "run_models:Pixels", "1x3x16x12")
        yield path


WANTED = [
    *("plan.json", "--data", "pictures", "--val", "pictures", "--epochs", "2", "--schedule", "cosine"),
    *("--clip", "1", "--ema", "0.9"),
]


def test_a_killed_process_goes_on_where_it_was(folder: Path) -> None:
    """SIGTERM, as a machine that is taken away sends it: exit code 130, a checkpoint, and the same end."""
    whole = call(*WANTED, "--save", "whole.safetensors", "--metrics", "whole.jsonl")
    assert whole["status"] == "ok" and whole["steps"] == 10 and "mean_iou" in whole["validation"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was
    slow = ["slow_disk:pictures" if word == "pictures" else word for word in WANTED[:3]] + WANTED[3:]
    words = [
        sys.executable,
        "-m",
        "rowtune.cli",
        "run",
        *slow,
        "--checkpoint",
        "kept",
        "--metrics",
        "m.jsonl",
    ]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 100
        while not (folder / "m.jsonl").exists() or len((folder / "m.jsonl").read_text().splitlines()) < 2:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err and "--resume goes on" in err
    rest = call(
        *WANTED, "--checkpoint", "kept", "--metrics", "m.jsonl", "--resume", "--save", "rest.safetensors"
    )
    assert rest["steps"] == 10 and rest["loss"] == whole["loss"] and rest["validation"] == whole["validation"]
    first, second = load_file("whole.safetensors"), load_file("rest.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], v) for k, v in second.items())
    lines = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    again = CliRunner().invoke(app, ["run", *WANTED, "--checkpoint", "kept"])
    assert again.exit_code == 2 and "--resume" in again.stderr and "--force" in again.stderr


def test_a_trained_onnx_file_comes_out(folder: Path) -> None:
    import onnxruntime
    import run_models  # type: ignore[import-not-found]

    net = run_models.Pixels().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.randn(1, 3, 16, 12),), "net.onnx", dynamo=False, do_constant_folding=False,
            training=torch.onnx.TrainingMode.TRAINING, input_names=["image"],
        )  # fmt: skip
    write_plan(folder / "onnx.json", "net.onnx", "1x3x16x12")
    words = ["onnx.json", "--data", "pictures", "--epochs", "2", "--lr", "0.1"]
    call(*words, "--save", "trained.onnx")
    call(*words, "--save", "trained.pt")
    state = torch.load("trained.pt", weights_only=True)
    assert float(state["n.running_mean"].abs().sum()) > 0
    net.load_state_dict(state, strict=False)
    image = torch.rand(1, 3, 16, 12)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession("trained.onnx", options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net.eval()(image).numpy()
    np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], expected, rtol=1e-4, atol=1e-5)
    assert "the model itself" in call(*words, "--save", "net.onnx", "--force", code=2)["error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--save", "w.onnx"], "the model is run_models:Pixels; save .safetensors or .pt"),
        (["--save", "w.txt"], "ends in .safetensors, .pt or .onnx"),
        (["--epochs", "2"], "--epochs needs --data"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--checkpoint-every", "2"], "--checkpoint-every needs --checkpoint"),
        (["--checkpoint", "no/such"], "cannot be made"),
        (["--ema", "1"], "just below 1"),
        (["--schedule", "linear"], "constant, cosine, step"),
        (["--data", "pictures/images"], "a folder of images has class folders"),
        (["--data", "pictures", "--val", "nowhere"], "--val nowhere does not exist"),
        (["--metrics", "no/such.jsonl"], "there is no folder"),
    ],
)
def test_what_makes_no_sense_is_said_before_training(folder: Path, words: list[str], said: str) -> None:
    found = call("plan.json", *words, code=2)
    assert said in found["error"] and found["status"] == "error"


def test_a_full_disk_is_found_before_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowtune.tune.output.shutil.disk_usage", lambda path: type("", (), {"free": 10})())
    assert "10 B left" in call("plan.json", "--checkpoint", "full", code=2)["error"]


def test_a_folder_that_cannot_be_written_is_found_before_training(folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o555)
    for words in (["--checkpoint", "locked"], ["--metrics", "locked/m.jsonl"], ["--save", "locked/w.pt"]):
        assert "read-only" in call("plan.json", *words, code=2)["error"]


def test_lines_where_there_is_no_terminal(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["run", *WANTED])
    assert shown.exit_code == 0
    assert "step 10/10  loss " in shown.stderr and " images/s  lr " in shown.stderr
    assert "epoch 2  validation: loss " in shown.stderr and "mean IoU" in shown.stderr
    assert "inside the budget (a step" in shown.stdout and "mean_iou" in shown.stdout
    assert "loss" not in CliRunner().invoke(app, ["run", *WANTED, "-q"]).stderr


def step(number: int, loss: float, peak: int | None = 4 * 10**6) -> StepReport:
    return StepReport(number, 40, loss, 0.25, peak, 0.01, 1 + number // 11, 4, 8.0, 0.5)


def test_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (60, 110):
        screen = Screen()
        out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        object.__setattr__(screen, "err", out)
        display = TrainDisplay(screen, 5 * 10**6)
        out.print(display.render())
        with display:
            for i in range(20):
                display.update(step(i + 1, 2.0 - i / 10, None if i == 0 else 4 * 10**6))
            display.update(ValReport(20, 1, 1.0, {"mean_iou": 0.25}, 1.0, 6 * 10**6))
            display.update(ValReport(20, 2, 0.9, {"mean_iou": 0.5}, 1.0, 6 * 10**6))
        shown = out.file.getvalue()  # type: ignore[attr-defined]
        for text in ("20/40", "epoch 2/4", "left", "8 images/s", "gradient 0.5", "6.00 MB of 5.00 MB", "120%",
                     "mean IoU 50.00%", "best in epoch 2", "0.1"):  # fmt: skip
            assert text in shown, text
        assert max(len(line) for line in shown.replace("\r", "\n").splitlines()) <= width + 20  # and escapes


def test_curves() -> None:
    falling = curve([(i / 10, 10.0 - i) for i in range(10)], 10, 2)
    assert [len(line) for line in falling] == [10, 10]
    assert falling[0].rstrip() and not falling[0][5:].strip() and not falling[1][:3].strip()
    assert curve([], 5, 1) == [" " * 5] and curve([(0.0, float("nan"))], 5, 1) == [" " * 5]
    assert curve([(0.0, 1.0)], 3, 1)[0].strip()
    assert sparkline([1.0, float("inf"), 3.0]) == "▁█" and len(sparkline(range(1000), 20)) == 20
    assert sparkline([]) == "" and sparkline([1.0, 1.0]) == "▄▄"
    assert [clock(s) for s in (45, 187, 8100)] == ["45 s", "3:07", "2:15:00"]
