"""What a training run is told, what it says while it runs, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rowtune.runtime.module import Engine

Fit = Literal["", "resize", "crop"]


class Shard(NamedTuple):
    """The part of the data that is this process's: of each `of` batches the one with number `rank`."""

    rank: int = 0
    of: int = 1


ALL = Shard()


@dataclass(frozen=True)
class Options:
    """Everything about a run that is not in the plan; the command line's flags have the same names.

    Attributes:
        fit: how images come to the plan's size; by default pairs are cropped and all others resized.
        ema: decay of the average of the weights, 0 for none; where there is one, it is what is validated and
            saved.
        checkpoint_every: steps; 0: at the end of every epoch.
        force: files of an earlier run may be replaced.
        engine: what runs rows segments (see `apply`); `verify_every` compares both ways.
        check_error_every: steps after which gradients are compared with exact ones, from the first step on,
            where a plan's stores round; 0: never.
        host_budget: bytes that the plan may keep in the host's memory; None: half of what is free.
        shard: which of the batches of `data` are this process's; all of them, by default.
        fsdp: weights, gradients and the optimizer's state lie in parts, one with each process.
    """

    steps: int | None = None
    epochs: int | None = None
    data: str = ""
    val: str = ""
    fit: Fit = ""
    workers: int = 0
    optimizer: str = ""
    lr: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    save: Path | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 0
    resume: bool = False
    metrics: Path | None = None
    tensorboard: Path | None = None
    force: bool = False
    keep_going: bool = False
    engine: Engine = "listed"
    verify_every: int = 0
    check_error_every: int = 100
    host_budget: int | None = None
    shard: Shard = ALL
    fsdp: bool = False


@dataclass(frozen=True)
class StepReport:
    """After each step. `peak_bytes` is known from the metered step on; `images_per_second` counts the reading
    of the batch as well, `seconds` do not. `gradient_error` is there after steps that measured it."""

    step: int
    steps: int | None
    loss: float
    seconds: float
    peak_bytes: int | None
    lr: float = 0.0
    epoch: int = 1
    epochs: int | None = None
    images_per_second: float = 0.0
    gradient_norm: float | None = None
    gradient_error: float | None = None


@dataclass(frozen=True)
class ValReport:
    """After each validation: the loss and the task's metrics, over all images of --val."""

    step: int
    epoch: int
    loss: float
    metrics: Mapping[str, float]
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Stopping:
    """A signal came: this step, or the validation after it, is the last. Said from the signal's handler."""

    step: int


@dataclass(frozen=True)
class SteppedDown:
    """Step `step`, or the validation after it, ran out of memory (`reason`) and is tried again with a smaller
    plan, which takes `peak_bytes` and `step_seconds` (None where nobody knows)."""

    step: int
    reason: str
    peak_bytes: int | None
    step_seconds: float | None

    def __str__(self) -> str:
        from rowtune.tune.sizes import format_bytes, format_seconds

        size, time = format_bytes(self.peak_bytes), format_seconds(self.step_seconds)
        return (
            f"step {self.step} ran out of memory ({self.reason}); nothing of it is lost: it is tried again "
            f"with the front's next plan, {size} and {time} a step, and so is all that follows"
        )


@dataclass(frozen=True)
class MadeExact:
    """On the batch of step `step` gradients were off by `error` in `worst`, more than `allowed`: it and all
    after it run by an exact plan of the front, which takes `peak_bytes` and `step_seconds`."""

    step: int
    error: float
    worst: str
    allowed: float
    peak_bytes: int | None
    step_seconds: float | None

    def __str__(self) -> str:
        from rowtune.tune.sizes import format_bytes, format_seconds

        size, time = format_bytes(self.peak_bytes), format_seconds(self.step_seconds)
        return (
            f"at step {self.step} gradients are off by {self.error:.2g} ({self.worst}), more than the "
            f"{self.allowed:g} that the plan allows: it and all that follow run by the front's fastest exact "
            f"plan, {size} and {time} a step"
        )


Changed = SteppedDown | MadeExact
"""The run goes on by another plan."""

Report = StepReport | ValReport | Stopping | Changed


@dataclass(frozen=True)
class Trained:
    """status: ok, over_budget or interrupted. `weights` is where they are, if they were to be saved;
    `peak_bytes` that of a step, `val_peak_bytes` that of a validation; `notes` what went wrong on the way."""

    status: str
    steps: int
    loss: float | None
    peak_bytes: int | None
    budget_bytes: int
    step_seconds: float | None
    weights: Path | None = None
    validation: Mapping[str, float] | None = None
    val_peak_bytes: int | None = None
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
