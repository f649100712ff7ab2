"""Training: a run that is interrupted and goes on is the run that was not; schedules, averages, budgets."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training import MODELS, masks, plan_file, workload

from rowtune.errors import UsageError
from rowtune.train.loop import train
from rowtune.train.options import Options, Report, StepReport, Stopping, Trained, ValReport
from rowtune.train.schedule import parse_schedule

DATA = """
import random
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

class Noise(Dataset):
    '''Items that are drawn from every generator there is.'''
    def __len__(self):
        return 5
    def __getitem__(self, i):
        x = torch.rand(3, 16, 12) + random.random() + np.random.rand()
        return x.float(), (x.sum(0) > 3).long() + (i > 2)

def dataset():
    return Noise()

def loader():
    return DataLoader(Noise(), batch_size=2, shuffle=True)

def own_generator():
    return DataLoader(Noise(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(7))

class Stopping(Noise):
    # The machine is taken away while the run is validated, the first time.
    def __getitem__(self, i):
        import os, signal
        from pathlib import Path
        if i == 1 and Path("stop").exists():
            Path("stop").unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.full((3, 16, 12), i / 5), torch.zeros(16, 12, dtype=torch.long)

def stopping():
    return Stopping()

def endless():
    while True:
        yield torch.zeros(2, 3, 16, 12), torch.zeros(2, 16, 12, dtype=torch.long)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("train")
    (path / "train_models.py").write_text(MODELS)
    (path / "train_data.py").write_text(DATA)
    masks(path / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        yield path


def run(wanted: Options, watch: Callable[[Report], None] | None = None, **more: Any) -> tuple[Trained, Any]:
    """Train the network for pixels; what was said, and the weights."""
    work = workload("train_models:Pixels", "2x3x16x12")
    said: list[Report] = []

    def hear(report: Report) -> None:
        if not isinstance(report, Stopping):
            said.append(report)
        if watch is not None:
            watch(report)

    trained = train(plan_file(work, **more), work, wanted, hear)
    return trained, (said, {k: v.clone() for k, v in work.module.state_dict().items()})


def losses(said: list[Report]) -> list[float]:
    return [r.loss for r in said]


def interrupt(at: int, number: int) -> Callable[[Report], None]:
    """Ctrl-C or SIGTERM after a step."""
    import os

    def watch(report: Report) -> None:
        if report.step == at and isinstance(report, StepReport):
            os.kill(os.getpid(), number)

    return watch


FULL = Options(
    epochs=3, data="pictures", val="pictures", optimizer="adam:lr=0.01", schedule="cosine", warmup=2,
    clip=0.5, accumulate=2, ema=0.9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "at"),
    [
        (FULL, 1),
        (replace(FULL, accumulate=1, schedule="step", val=""), 3),
        (replace(FULL, accumulate=1, data="train_data:dataset", ema=0.0, clip=0.0), 4),
        (replace(FULL, accumulate=1, data="train_data:loader", val="train_data:loader"), 5),
        (replace(FULL, accumulate=1, data="train_data:own_generator"), 4),
        (Options(steps=6, optimizer="sgd:lr=0.05,momentum=0.9"), 4),
    ],
)
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(
    folder: Path, tmp_path: Path, wanted: Options, at: int
) -> None:
    import signal

    whole, (said, weights) = run(replace(wanted, checkpoint=tmp_path / "a", metrics=tmp_path / "a.jsonl"))
    torch.manual_seed(99)  # a new process is in any state
    files = {"checkpoint": tmp_path / "b", "metrics": tmp_path / "b.jsonl"}
    first, (before, _) = run(replace(wanted, **files), interrupt(at, signal.SIGTERM))
    assert first.status == "interrupted" and first.steps == at and whole.status == "ok"
    second, (after, resumed) = run(replace(wanted, **files, resume=True))
    assert second.steps == whole.steps and after
    assert losses(before + after) == losses(said)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    for name in ("weights", "ema") if wanted.ema else ("weights",):
        pair = [load_file(t.checkpoint / f"{name}.safetensors") for t in (whole, second) if t.checkpoint]
        assert all(torch.equal(pair[0][k], v) for k, v in pair[1].items()) and len(pair) == 2
    lines = [[_timeless(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in "ab"]
    assert lines[0] == lines[1] and len(lines[0]) == len(said)


def _timeless(line: str) -> Any:
    found = json.loads(line)
    return {k: v for k, v in found.items() if k not in ("seconds", "images_per_second", "peak_bytes")}


def test_a_validation_that_is_interrupted_is_made_again(folder: Path, tmp_path: Path) -> None:
    wanted = Options(epochs=2, data="pictures", val="train_data:stopping")
    _, (said, _) = run(wanted)
    wanted = replace(wanted, checkpoint=tmp_path / "kept", metrics=tmp_path / "m.jsonl")
    (folder / "stop").touch()
    first, (before, _) = run(wanted)
    assert first.status == "interrupted" and [type(r) for r in before] == [StepReport] * 2
    _, (after, _) = run(replace(wanted, resume=True))
    assert losses(before + after) == losses(said) and isinstance(after[0], ValReport)
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == len(said)


def test_a_second_signal_does_not_wait(folder: Path, tmp_path: Path) -> None:
    import os
    import signal

    def twice(report: Report) -> None:
        if report.step == 2 and isinstance(report, StepReport):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(Options(steps=9, checkpoint=tmp_path), twice)
    assert signal.getsignal(signal.SIGINT) is before and list(tmp_path.iterdir()) == []


def test_a_kill_costs_the_steps_since_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Nothing is asked when a process dies: what counts is what is on the disk."""
    wanted = Options(epochs=2, data="pictures", checkpoint=tmp_path, checkpoint_every=3)
    whole, (said, weights) = run(replace(wanted, checkpoint=None, checkpoint_every=0))

    def die(report: Report) -> None:
        if report.step == 4:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run(wanted, die)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    second, (after, resumed) = run(replace(wanted, resume=True))
    assert losses(after) == losses(said)[3:]
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    third, (nothing, _) = run(replace(wanted, resume=True))
    assert third.steps == second.steps == whole.steps == 4 and nothing == []
    longer, (more, _) = run(replace(wanted, resume=True, epochs=3))
    assert longer.steps == 6 and [r.step for r in more] == [5, 6]


def test_no_line_is_written_twice(folder: Path, tmp_path: Path) -> None:
    """The last checkpoint is of before a validation whose line is written, or of half a step's line."""
    wanted = Options(
        epochs=2, data="pictures", val="pictures", checkpoint=tmp_path / "kept", checkpoint_every=2,
        metrics=tmp_path / "m.jsonl",
    )  # fmt: skip

    def die(report: Report) -> None:
        if isinstance(report, ValReport):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run(wanted, die)
    with open(tmp_path / "m.jsonl", "a") as out:
        out.write('{"step": 3, "lo')
    run(replace(wanted, resume=True))
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(line["step"], "val_loss" in line) for line in lines] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)
    ]  # fmt: skip


def test_a_checkpoint_that_cannot_be_written_keeps_the_one_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    wanted = Options(steps=4, checkpoint=tmp_path, checkpoint_every=2)
    from rowtune.train import checkpoint

    real, calls = checkpoint.write_torch, itertools.count()

    def full(path: Path, value: object) -> None:
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(checkpoint, "write_torch", full)
    trained, _ = run(wanted)
    assert trained.steps == 4 and trained.checkpoint == tmp_path / "step-00000002"
    assert "step 4 could not be written" in trained.notes[0] and "No space left" in trained.notes[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_what_cannot_be_gone_on_with_is_refused(folder: Path, tmp_path: Path) -> None:
    wanted = Options(steps=2, checkpoint=tmp_path)
    run(wanted)
    with pytest.raises(UsageError, match=r"has a run of 2 steps: give --resume .*--force"):
        run(wanted)
    with pytest.raises(UsageError, match="made with --accumulate 1, this run has 2"):
        run(replace(wanted, resume=True, accumulate=2))
    with pytest.raises(UsageError, match="--resume needs --checkpoint"):
        run(Options(resume=True))
    (state,) = tmp_path.glob("step-*/state.pt")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UsageError, match="is damaged"):
        run(replace(wanted, resume=True))
    again, _ = run(replace(wanted, force=True))
    assert again.steps == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(replace(wanted, checkpoint=tmp_path / "file"))


def test_two_batches_to_a_step_are_one_of_twice_the_size(folder: Path) -> None:
    """Of equal images, through a network without batch statistics."""
    made = []
    for shape, accumulate in (("2x3x8x6", 1), ("1x3x8x6", 2)):
        work = workload("train_models:Twice", shape, "mse")
        with torch.no_grad():
            for weight in work.module.parameters():
                weight.fill_(0.01)
        image = torch.arange(144.0).reshape(1, 3, 8, 6) / 144
        again = torch.nn.functional.interpolate(image, scale_factor=2.0)
        batch = ((image.repeat(int(shape[0]), 1, 1, 1),), again.repeat(int(shape[0]), 1, 1, 1))
        object.__setattr__(work, "batch", lambda device, now=batch: now)
        trained = train(plan_file(work), work, Options(steps=3, accumulate=accumulate, lr=0.5))
        made.append((trained.loss, work.module.state_dict()["a.weight"]))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-6)
    torch.testing.assert_close(made[0][1], made[1][1])


def test_a_gradient_is_clipped_and_the_average_is_what_is_saved(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "w.safetensors"
    _, (said, weights) = run(Options(steps=3, clip=1e-3, optimizer="sgd:lr=1", ema=0.5, save=saved))
    norms = [r.gradient_norm for r in said if isinstance(r, StepReport)]
    assert all(n is not None and n > 1e-3 for n in norms)
    _, (_, start) = run(Options(steps=1, optimizer="sgd:lr=0"))
    moved = sum(float((weights[k] - start[k]).square().sum()) for k in ("a.weight", "b.weight"))
    assert 0 < math.sqrt(moved) < 3e-3
    history = []
    for steps in (1, 2, 3):
        _, (_, now) = run(Options(steps=steps, clip=1e-3, optimizer="sgd:lr=1"))
        history.append(now["a.weight"])
    average = history[0] * 0.25 + history[1] * 0.25 + history[2] * 0.5
    torch.testing.assert_close(load_file(saved)["a.weight"], average)


@pytest.mark.parametrize(
    ("text", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("step:every=2,gamma=0.5", 1, [1 / 2, 1, 1, 0.5, 0.5, 0.25]),
        ("step", 0, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine:floor=0.5", 0, None),
        ("cosine", 2, None),
    ],
)
def test_rates(folder: Path, text: str, warmup: int, expected: list[float] | None) -> None:
    _, (said, _) = run(Options(steps=6, schedule=text, warmup=warmup, optimizer="sgd:lr=0.5"))
    rates = [r.lr / 0.5 for r in said if isinstance(r, StepReport)]
    if expected is None:  # torch's own
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        low = 0.5 if "floor" in text else 0.0
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6 - warmup, eta_min=low)
        expected = [(i + 1) / (warmup + 1) for i in range(warmup)]
        for _ in range(6 - warmup):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            cosine.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["linear", "cosine:every=3", "step:every=x", "step:every=1.5", "step:gamma=-1", "cosine:floor"]
)
def test_a_schedule_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--schedule"):
        parse_schedule(text)


def test_a_schedule_without_an_end_needs_steps(folder: Path) -> None:
    with pytest.raises(UsageError, match="give --steps"):
        run(Options(data="train_data:endless", epochs=1, schedule="cosine"))
    trained, (said, _) = run(Options(data="train_data:endless", steps=3, schedule="cosine", val="pictures"))
    assert trained.steps == 3 and isinstance(said[-1], ValReport)


def test_validation_changes_nothing_and_counts_against_the_budget(folder: Path) -> None:
    bare, (said, weights) = run(Options(epochs=2, data="train_data:loader"))
    seen, (more, same) = run(Options(epochs=2, data="train_data:loader", val="train_data:loader"))
    steps = [r for r in more if isinstance(r, StepReport)]
    assert losses(steps) == losses(said) and len(more) == len(steps) + 2  # type: ignore[arg-type]
    assert all(torch.equal(same[k], v) for k, v in weights.items())
    assert seen.val_peak_bytes and bare.val_peak_bytes is None
    assert set(seen.validation or {}) == {"loss", "mean_iou", "pixel_accuracy"}
    tight, _ = run(Options(epochs=1, data="pictures", val="pictures"), budget=seen.val_peak_bytes - 1)
    assert tight.status == "over_budget"


def test_a_validation_is_banded_as_the_plan_is(folder: Path) -> None:
    peaks, scores = [], []
    for rows in (4, 0):
        work = workload("train_models:Pixels", "1x3x256x32")
        trained = train(plan_file(work, rows), work, Options(steps=1, data="pictures", val="pictures"))
        peaks.append(trained.val_peak_bytes or 0)
        scores.append(trained.validation)
    given = 256 * 32 * (3 * 4 + 8 + 3 * 4)  # input, target and output
    assert peaks[0] - given < 0.6 * (peaks[1] - given)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_network_that_trains_on_in_eval_is_not_validated(folder: Path) -> None:
    import train_models  # type: ignore[import-not-found]

    exported = torch.export.export(train_models.Pixels().train(), (torch.randn(2, 3, 16, 12),))
    torch.export.save(exported, "training.pt2")
    work = workload("training.pt2", "2x3x16x12")
    with pytest.raises(UsageError, match=r"in eval\(\) the model still writes to n\.\w+ \(a \.pt2 file"):
        train(plan_file(work), work, Options(data="pictures", val="pictures"))
    assert train(plan_file(work), work, Options(data="pictures")).status == "ok"


def test_the_average_is_in_the_peak(folder: Path) -> None:
    sizes = [run(Options(steps=2, ema=ema))[0].peak_bytes for ema in (0.0, 0.9)]
    work = workload("train_models:Pixels", "2x3x16x12")
    state = sum(t.numel() * t.itemsize for t in work.module.state_dict().values())
    assert sizes[0] and sizes[1] and state <= sizes[1] - sizes[0] <= state + 64


def test_frozen_norms_stay_frozen_after_a_validation(folder: Path) -> None:
    work = workload("train_models:Pixels", "2x3x16x12")
    work.module.n.eval()  # type: ignore[union-attr, operator]
    from rowtune.runtime.module import apply
    from rowtune.train.validate import evaluating

    runner = apply(work.module, plan_file(work).plan, "cross_entropy")
    with evaluating(runner):
        assert not work.module.training and not work.module.drop.training  # type: ignore[union-attr]
    assert work.module.training and runner.training and work.module.drop.training  # type: ignore[union-attr]
    assert not work.module.n.training  # type: ignore[union-attr]


def test_metrics_are_lines_of_json(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    trained, _ = run(Options(epochs=2, data="pictures", val="pictures", clip=1.0, metrics=path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    steps, validations = lines[:2], [lines[2], lines[5]]
    assert all(line["loss"] > 0 and line["lr"] == 0.01 and line["gradient_norm"] > 0 for line in steps)
    assert lines[1]["peak_bytes"] == trained.peak_bytes and lines[0]["images_per_second"] > 0
    assert validations[1]["mean_iou"] == (trained.validation or {})["mean_iou"]
    with pytest.raises(UsageError, match=r"--metrics .* exists"):
        run(Options(steps=1, metrics=path))


def test_tensorboard_where_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        run(Options(steps=1, tensorboard=tmp_path))
    told: list[Any] = []
    board = SimpleNamespace(add_scalar=lambda *a: told.append(a), close=lambda: told.append("closed"))
    fake = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)  # type: ignore[arg-type]
    run(Options(steps=2, data="pictures", val="pictures", tensorboard=tmp_path))
    names = {t[0] for t in told[:-1]}
    assert {"train/loss", "train/lr", "val/loss", "val/mean_iou"} <= names and told[-1] == "closed"


def test_a_seed_makes_a_run(folder: Path) -> None:
    def first(seed: int) -> Tensor:
        work = workload("train_models:Pixels", "2x3x16x12", seed=seed)
        train(plan_file(work), work, Options(steps=2, data="pictures"))
        return work.module.state_dict()["a.weight"]

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))
