"""rowtune.search, rowtune.load and rowtune.apply in a Python program of one's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import unmeasured
from torch import nn
from typer.testing import CliRunner

import rowtune
from rowtune.cli.app import app
from rowtune.errors import InfeasibleError, PlanError, UsageError
from rowtune.graph.losses import parse
from rowtune.plan.file import save_plan
from rowtune.tune.own import spelled
from rowtune.tune.study import Interrupted


class Net(nn.Module):
    """Defined here, where the measuring process never looks."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.norm(self.one(x)).relu())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("LEAST", "MOST"):
        monkeypatch.setattr(f"rowtune.tune.space.{name}", 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield


def function(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).pow(2).mean()


def test_import_does_not_load_torch() -> None:
    code = (
        "import sys, rowtune; names = dir(rowtune), rowtune.__version__; "
        "assert not {'torch', 'optuna', 'onnx'} & set(sys.modules); "
        "rowtune.search, rowtune.load; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_searched_loaded_and_applied(tmp_path: Path) -> None:
    """The weights stay the caller's, gradients are plain PyTorch's, and the command line knows the plan."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 32, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out, told = tmp_path / "plan.json", []
    loss = nn.CrossEntropyLoss(ignore_index=1)
    found = rowtune.search(
        model, (x,), "110%", loss=loss, out=out, trials=1, device="cpu", progress=told.append
    )
    assert told and found.problem.loss == "cross_entropy:ignore_index=1"
    assert 0 < found.measured["peak_bytes"] <= found.budget_bytes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "plan.pt2", "plan.records.jsonl"}
    loaded = rowtune.load(str(out))
    assert loaded.plan == found.plan and loaded.fingerprint == found.fingerprint

    target = torch.randint(0, 2, (2, 32, 16))
    value = rowtune.apply(model, loaded, loss=loss)(x, targets=target)
    value.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = loss(model(x), target)
    plain.backward()
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(ours, model.parameters(), strict=True))

    ran = CliRunner().invoke(app, ["run", str(out), "--steps", "1", "--device", "cpu", "-q"])
    assert ran.exit_code == 0, ran.output
    with pytest.raises(PlanError, match="fingerprint"):
        rowtune.apply(nn.Sequential(nn.Conv2d(3, 2, 1)), loaded)(x)


def test_without_a_file_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("rowtune.tune.own.find", unmeasured.find)
    found = rowtune.search(Net(), (torch.randn(1, 3, 16, 16),), "110%", trials=1, device="cpu")
    assert not list(tmp_path.glob("rowtune-*/*")) and str(found.problem.model) == "Net"
    save_plan(found, tmp_path / "kept.json")
    assert rowtune.load(tmp_path / "kept.json").plan == found.plan
    ran = CliRunner().invoke(app, ["run", str(tmp_path / "kept.json")])
    assert ran.exit_code == 3 and "rowtune.apply" in ran.output
    told = CliRunner().invoke(app, ["report", str(tmp_path / "kept.json")])
    assert told.exit_code == 0 and "no memory over the step" in told.output


def test_ctrl_c_before_anything_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr("rowtune.tune.own.find", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rowtune.search(Net(), (torch.randn(1, 3, 16, 16),), "2MB", out=tmp_path / "p.json", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_failed_search_leaves_no_model(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError):
        rowtune.search(Net(64), (torch.randn(1, 3, 16, 16),), 1000, out=tmp_path / "p.json", device="cpu")
    assert not (tmp_path / "p.pt2").exists() and not (tmp_path / "p.json").exists()


def test_a_file_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p.pt2").write_text("precious")
    with pytest.raises(UsageError, match="force=True"):
        rowtune.search(Net(), (torch.randn(1, 3, 16, 16),), "2MB", out=tmp_path / "p.json")
    assert (tmp_path / "p.pt2").read_text() == "precious"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (None, ""),
        ("mse", "mse"),
        (nn.MSELoss(reduction="sum"), "mse:reduction=sum"),
        (nn.SmoothL1Loss(beta=0.5), "smooth_l1:beta=0.5"),
        (nn.BCEWithLogitsLoss(), "bce_with_logits"),
        (nn.CrossEntropyLoss(reduction="sum"), "cross_entropy:reduction=sum"),
        (function, "test_own:function"),
    ],
)
def test_losses_as_they_are_spelled(loss: Any, text: str) -> None:
    assert spelled(loss) == text
    if isinstance(loss, nn.Module):
        output, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
        target = torch.randint(0, 3, (2, 4, 4)) if isinstance(loss, nn.CrossEntropyLoss) else target
        assert parse(text)(output, target) == pytest.approx(loss(output, target).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda a, b: (a - b).mean(), "module of its own"),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), "with weight"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "with label_smoothing"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), "pos_weight"),
        (7, "loss is a name"),
        (nn.MSELoss, "loss is a name"),
    ],
)
def test_losses_that_cannot_be(loss: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        spelled(loss)


X = torch.randn(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("model", "inputs", "budget", "words"),
    [
        (Net(), (X,), "8 bananas", "8GB"),
        (Net(), (X,), 0, "above 0"),
        (Net(), (X,), True, "above 0"),
        (Net(), (3,), "1GB", "tuple of tensors"),
        (Net(), (), "1GB", "tuple of tensors"),
        ("zoo:unet", (X,), "1GB", "nn.Module"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=None)), (X,), "1GB", "momentum=None"),
    ],
)
def test_arguments_that_make_no_sense(model: Any, inputs: Any, budget: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        rowtune.search(model, inputs, budget, device="cpu")
