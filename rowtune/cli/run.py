"""`rowtune run`: train with a plan, inside its budget."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rowtune.cli import options
from rowtune.cli.progress import TrainDisplay
from rowtune.cli.screen import Screen, facts
from rowtune.errors import UsageError

if TYPE_CHECKING:
    from rowtune.plan.file import PlanFile
    from rowtune.tune.train import Trained


class EngineName(StrEnum):
    """What runs rows segments."""

    listed = "listed"
    traced = "traced"


EXIT = {"ok": 0, "over_budget": 4, "interrupted": 130}


def command(
    plan: options.PlanPath = Path("plan.json"),
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="MODULE:FACTORY", help="Returns a DataLoader or Dataset of (input, target)."
        ),
    ] = "",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps; 10 on synthetic data.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over --data; 1 by default.")] = None,
    optimizer: options.OptimizerName = "",
    lr: Annotated[float | None, typer.Option("--lr", min=0.0, help="Another learning rate.")] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the weights here, as safetensors.")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Train on when the loss is infinite or not a number.")
    ] = False,
    engine: Annotated[
        EngineName,
        typer.Option("--engine", help="listed: run recorded calls; traced: run the schedule itself."),
    ] = EngineName.listed,
    verify_every: Annotated[
        int, typer.Option("--verify-every", min=0, help="Compare both engines every so many steps; 0: never.")
    ] = 0,
    shape: options.Shapes = None,
    device: options.Device = "auto",
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train with a plan, on synthetic data or your own."""
    screen = Screen(as_json, quiet, verbose)
    file = read_plan(plan)
    if save is not None:
        from rowtune.tune.output import check_writable

        check_writable(save, "--save")
        if save.exists() and not force:
            raise UsageError(f"--save {save} exists: give --force to replace it, or another name")
    from rowtune.tune.train import Options

    wanted = Options(steps, epochs, data, optimizer, lr, save, keep_going, engine.value, verify_every)
    trained = train_shown(screen, file, wanted, device, shape or [])
    screen.json({**asdict(trained), "weights": str(trained.weights) if trained.weights else None})
    return EXIT[trained.status]


def read_plan(path: Path) -> PlanFile:
    """The plan; UsageError where there is no such file."""
    if not path.is_file():
        raise UsageError(f"there is no plan {path}: rowtune search MODEL --budget SIZE -o {path} makes one")
    from rowtune.plan.file import load_plan

    return load_plan(path)


def train_shown(screen: Screen, file: PlanFile, wanted: object, device: str, shapes: list[str]) -> Trained:
    """Train with a live display, then say how it went."""
    from rowtune.tune.sizes import format_bytes
    from rowtune.tune.train import Options, open_plan, train

    assert isinstance(wanted, Options)
    screen.opening(file.problem.model)
    work, predicted = open_plan(file, device, shapes)
    limit = file.budget_bytes - file.reserve_bytes
    if screen.verbose:
        screen.notes(work.loaded.notes)
    problem = work.problem
    spec = wanted.optimizer or problem.optimizer
    screen.err.print(
        facts(
            [
                ("model", f"{problem.model}  {', '.join(map(str, problem.inputs))}"),
                ("training", f"{problem.loss}, {spec}, {wanted.data or 'synthetic data'}, {problem.device}"),
                ("predicted", f"{format_bytes(predicted)} of {format_bytes(limit)}"),
            ]
        )
    )
    with TrainDisplay(screen, limit) as display:
        trained = train(file, work, wanted, display.update)
    _say(screen, trained, limit)
    if trained.weights != wanted.save and trained.weights is not None:
        screen.note(f"{wanted.save} could not be written; the weights are in {trained.weights}")
    return trained


def _say(screen: Screen, trained: Trained, limit: int) -> None:
    from rowtune.tune.sizes import format_bytes, format_seconds

    peak = f"{format_bytes(trained.peak_bytes)} of {format_bytes(limit)}"
    verdict = "over the budget" if trained.status == "over_budget" else "inside the budget"
    lines = [
        ("steps", f"{trained.steps}, {format_seconds(trained.step_seconds)} each"),
        ("loss", "-" if trained.loss is None else f"{trained.loss:.5g}"),
        ("peak", f"{peak}: {verdict}" if trained.peak_bytes else "not measured"),
    ]
    if trained.weights is not None:
        lines.append(("weights", str(trained.weights)))
    screen.out.print(facts(lines))
