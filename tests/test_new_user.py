"""From a network in one's own file to trained weights in one's own ONNX file, by the README's commands."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import masks

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NETWORK = '''
"""My network, and how it goes into a file."""
import torch
from torch import nn


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, image):
        wide = self.down(image)
        deep = self.deep(nn.functional.max_pool2d(wide, 2))
        deep = nn.functional.interpolate(deep, scale_factor=2.0)
        return self.head(torch.cat((wide, deep), 1))


def export(path):
    torch.manual_seed(1)
    torch.onnx.export(
        Mine().train(), (torch.randn(1, 3, 32, 24),), path, dynamo=False, do_constant_folding=False,
        training=torch.onnx.TrainingMode.TRAINING, input_names=["image"],
    )
'''
COUNT = 60  # images, and steps of an epoch
TRAIN = ("run", "plan.json", "--data", "pictures", "--epochs", "2", "--lr", "0.02", "--schedule", "cosine")


def rowtune(folder: Path, *words: str, code: int = 0) -> str:
    """A command as a user types it; what it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "rowtune", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout


def killed(folder: Path, *words: str, after: int) -> str:
    """SIGTERM once the command has said that step `after` is done; what it said from then on.

    Its stderr is a pipe that holds some fifty lines: it cannot come to its end before they are read.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "rowtune", *words],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    assert process.stderr is not None
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    said = b""
    while f"step {after}/".encode() not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    rest = process.communicate()[1].decode()
    assert process.returncode == 130, rest
    return rest


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="no small pipes on this system")
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    (tmp_path / "my_network.py").write_text(NETWORK)
    masks(tmp_path / "pictures", count=COUNT, size=(32, 24))
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_network  # type: ignore[import-not-found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        my_network.export(tmp_path / "mine.onnx")

    found = json.loads(rowtune(tmp_path, "search", "mine.onnx", "--budget", "70%", "--trials", "2", "--json"))
    assert found["status"] == "ok" and found["peak_bytes"] <= found["budget_bytes"]
    assert found["max_relative_error"] < 1e-3 and found["peak_bytes"] < found["plain_peak_bytes"]

    whole = rowtune(tmp_path, *TRAIN, "--checkpoint", "whole", "--json")
    said = killed(tmp_path, *TRAIN, "--checkpoint", "kept", "--metrics", "m.jsonl", after=3)
    assert "Traceback" not in said and "--resume goes on" in said
    at = len((tmp_path / "m.jsonl").read_text().splitlines())
    assert 3 <= at < 2 * COUNT, "it was in the middle"
    rest = rowtune(
        tmp_path, *TRAIN, "--checkpoint", "kept", "--metrics", "m.jsonl", "--resume",
        "--save", "trained.onnx", "--json",
    )  # fmt: skip
    first, second = json.loads(whole), json.loads(rest)
    assert first["steps"] == second["steps"] == 2 * COUNT and first["loss"] == second["loss"]
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 2 * COUNT + 1))
    assert sum(line["loss"] for line in lines[-20:]) < sum(line["loss"] for line in lines[:20])
    last = f"step-{2 * COUNT:08d}/weights.safetensors"
    one, other = load_file(tmp_path / "whole" / last), load_file(tmp_path / "kept" / last)
    assert one.keys() == other.keys() and all(torch.equal(one[k], v) for k, v in other.items())

    same_network(my_network.Mine(), tmp_path / "trained.onnx", other)
    rowtune(tmp_path, "report", "plan.json", "--html", "page.html", "-q")
    if BROWSER is not None:
        dom = drawn(tmp_path / "page.html", tmp_path / "profile")
        assert 'data-ready="yes"' in dom and 'class="strip"' in dom
        for label in ("memory over the step", "memory and time of every plan measured"):
            assert f'aria-label="{label}"' in dom
        assert dom.count("<circle") >= 2


def same_network(net: torch.nn.Module, trained: Path, weights: dict[str, torch.Tensor]) -> None:
    """onnxruntime on the trained file computes what my own class does with the trained weights."""
    import onnxruntime

    untouched = {k: v.clone() for k, v in net.state_dict().items()}
    missing = net.load_state_dict(weights, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    assert not torch.equal(net.state_dict()["head.weight"], untouched["head.weight"])
    image = torch.rand(1, 3, 32, 24)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(trained, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net.eval()(image).numpy()
    np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


def drawn(page: Path, profile: Path) -> str:
    """The page's elements after its scripts ran, without the scripts."""
    shown = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
         "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        check=True, capture_output=True, text=True, timeout=120, env={**os.environ},
    )  # fmt: skip
    return re.sub(r"<script.*?</script>", "", shown.stdout, flags=re.S)
