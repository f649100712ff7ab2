"""`rowtune run`: train with a plan, inside its budget."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rowtune.cli import options
from rowtune.cli.screen import Screen, facts
from rowtune.cli.train_display import TrainDisplay
from rowtune.errors import UsageError

if TYPE_CHECKING:
    from rowtune.plan.file import PlanFile
    from rowtune.train.options import Trained


class EngineName(StrEnum):
    """What runs rows segments."""

    listed = "listed"
    traced = "traced"


class FitName(StrEnum):
    """How an image comes to the plan's size."""

    resize = "resize"
    crop = "crop"


EXIT = {"ok": 0, "over_budget": 4, "interrupted": 130}

DATA = (
    "A folder: one folder of images a class, or images/ and masks/, or input/ and target/; or "
    "module:factory, which returns a DataLoader or Dataset of (input, target). Random data by default."
)
FIT = (
    "resize: the whole image in the plan's size; crop: a piece of that size, at random (for --val in the "
    "middle). By default input/target pairs are cropped, all others resized."
)
SAVE = (
    "Write the weights: .safetensors, .pt, or .onnx, which is the plan's own file with the trained weights "
    "in it."
)

CHECK_ERROR = (
    "Measure how far gradients are off every so many steps, on the batch at hand, where stores round; "
    "0: never."
)


def command(
    plan: options.PlanPath = Path("plan.json"),
    data: Annotated[
        str,
        typer.Option("--data", metavar="FOLDER|MODULE:FACTORY", help=DATA, rich_help_panel="Data"),
    ] = "",
    val: Annotated[
        str,
        typer.Option(
            "--val",
            metavar="FOLDER|MODULE:FACTORY",
            rich_help_panel="Data",
            help="As --data: validated after every epoch, by accuracy, mean IoU or PSNR.",
        ),
    ] = "",
    fit: Annotated[FitName | None, typer.Option("--fit", help=FIT, rich_help_panel="Data")] = None,
    workers: Annotated[
        int,
        typer.Option("--workers", min=0, help="Processes that read images.", rich_help_panel="Data"),
    ] = 0,
    shape: options.Shapes = None,
    budget: Annotated[
        str,
        typer.Option(
            "--budget", metavar="SIZE", help="Train with the fastest plan of the file's front within this."
        ),
    ] = "",
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Training steps; 10 on random data.", rich_help_panel="Steps"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", help="Passes over --data; 1 by default.", rich_help_panel="Steps"),
    ] = None,
    optimizer: options.OptimizerName = "",
    lr: Annotated[
        float | None, typer.Option("--lr", min=0.0, help="Another learning rate.", rich_help_panel="Steps")
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            rich_help_panel="Steps",
            help="Of the learning rate, by step: constant, cosine (to 0, or to cosine:floor=0.01 of it) or "
            "step (step:every=1000,gamma=0.1; by default in thirds of the run).",
        ),
    ] = "constant",
    warmup: Annotated[
        int,
        typer.Option("--warmup", min=0, help="Steps in which the rate rises.", rich_help_panel="Steps"),
    ] = 0,
    clip: Annotated[
        float,
        typer.Option(
            "--clip", min=0.0, help="Largest norm of the gradient; 0: any.", rich_help_panel="Steps"
        ),
    ] = 0.0,
    accumulate: Annotated[
        int,
        typer.Option("--accumulate", min=1, help="Batches to an optimizer step.", rich_help_panel="Steps"),
    ] = 1,
    ema: Annotated[
        float,
        typer.Option(
            "--ema",
            metavar="DECAY",
            rich_help_panel="Steps",
            help="Keep an average of the weights, e.g. 0.999: it is what is validated and saved.",
        ),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            rich_help_panel="Steps",
            help="Of drawn weights, order, crops and dropout; the plan's own by default.",
        ),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            rich_help_panel="Steps",
            help="Train on when the loss is infinite or not a number.",
        ),
    ] = False,
    save: Annotated[Path | None, typer.Option("--save", help=SAVE, rich_help_panel="Files")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="DIR",
            rich_help_panel="Files",
            help="Keep the newest checkpoint here; Ctrl-C and SIGTERM write one as well.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            "--checkpoint-every",
            min=0,
            metavar="STEPS",
            rich_help_panel="Files",
            help="By default after every epoch.",
        ),
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel="Files",
            help="Go on from the newest checkpoint, bit for bit; begin where there is none.",
        ),
    ] = False,
    metrics: Annotated[
        Path | None,
        typer.Option(
            "--metrics",
            metavar="FILE.jsonl",
            rich_help_panel="Files",
            help="A line of JSON for every step and validation.",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            "--tensorboard",
            metavar="DIR",
            rich_help_panel="Files",
            help="Event files; needs the package tensorboard.",
        ),
    ] = None,
    force: options.Force = False,
    engine: Annotated[
        EngineName,
        typer.Option("--engine", help="listed: run recorded calls; traced: run the schedule itself."),
    ] = EngineName.listed,
    verify_every: Annotated[
        int, typer.Option("--verify-every", min=0, help="Compare both engines every so many steps; 0: never.")
    ] = 0,
    check_error_every: Annotated[
        int, typer.Option("--check-error-every", min=0, metavar="STEPS", help=CHECK_ERROR)
    ] = 100,
    host_budget: options.HostBudget = "",
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train with a plan, on random data or your own."""
    screen = Screen(as_json, quiet, verbose)
    file = read_plan(plan)
    from rowtune.tune.sizes import parse_size

    if budget:
        from rowtune.plan.file import at_budget

        file = at_budget(file, parse_size(budget))
    if save is not None:
        from rowtune.tune.output import check_writable

        check_writable(save, "--save")
        if save.exists() and not force:
            raise UsageError(f"--save {save} exists: give --force to replace it, or another name")
    from rowtune.train.options import Options

    wanted = Options(
        steps=steps, epochs=epochs, data=data, val=val, fit=fit.value if fit else "", workers=workers,
        optimizer=optimizer, lr=lr, schedule=schedule, warmup=warmup, clip=clip, accumulate=accumulate,
        ema=ema, save=save, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume,
        metrics=metrics, tensorboard=tensorboard, force=force, keep_going=keep_going, engine=engine.value,
        verify_every=verify_every, check_error_every=check_error_every,
        host_budget=parse_size(host_budget, "--host-budget") if host_budget else None,
    )  # fmt: skip
    trained = train_shown(screen, file, wanted, device, shape or [], seed)
    files = {"weights": trained.weights, "checkpoint": trained.checkpoint}
    screen.json({**asdict(trained), **{k: str(v) if v else None for k, v in files.items()}})
    return EXIT[trained.status]


def read_plan(path: Path) -> PlanFile:
    """The plan; UsageError where there is no such file."""
    if not path.is_file():
        raise UsageError(f"there is no plan {path}: rowtune search MODEL --budget SIZE -o {path} makes one")
    from rowtune.plan.file import load_plan

    return load_plan(path)


def train_shown(
    screen: Screen, file: PlanFile, wanted: object, device: str, shapes: list[str], seed: int | None = None
) -> Trained:
    """Train with a live display, then say how it went."""
    from rowtune.train.loop import train
    from rowtune.train.opened import open_plan
    from rowtune.train.options import Options
    from rowtune.tune.sizes import format_bytes

    assert isinstance(wanted, Options)
    screen.opening(file.problem.model)
    work, predicted = open_plan(file, device, shapes, seed)
    limit = file.budget_bytes - file.reserve_bytes
    if screen.verbose:
        screen.notes(work.loaded.notes)
    problem = work.problem
    spec = wanted.optimizer or problem.optimizer
    rows = [
        ("model", f"{problem.model}  {', '.join(map(str, problem.inputs))}"),
        ("training", f"{problem.loss}, {spec}, {wanted.data or 'random data'}, {problem.device}"),
        ("predicted", f"{format_bytes(predicted)} of {format_bytes(limit)}"),
    ]
    if wanted.ema:
        size = sum(t.numel() * t.itemsize for t in work.module.state_dict().values())
        rows[2] = ("predicted", f"{rows[2][1]}, and {format_bytes(size)} for the average of the weights")
    if file.predicted_for:
        rows.append(
            ("plan", f"predicted for {file.predicted_for}, never measured; `search --from` does that")
        )
    screen.err.print(facts(rows))
    with TrainDisplay(screen, limit) as display:
        trained = train(file, work, wanted, display.update)
    _say(screen, trained, limit)
    screen.notes(trained.notes)
    if trained.weights != wanted.save and trained.weights is not None:
        screen.note(f"{wanted.save} could not be written; the weights are in {trained.weights}")
    if trained.status == "interrupted" and trained.checkpoint is not None:
        screen.note("the same command with --resume goes on from there")
    return trained


def _say(screen: Screen, trained: Trained, limit: int) -> None:
    from rowtune.tune.sizes import format_bytes, format_seconds

    most = max(trained.peak_bytes or 0, trained.val_peak_bytes or 0)
    peak = f"{format_bytes(most)} of {format_bytes(limit)}"
    verdict = "over the budget" if trained.status == "over_budget" else "inside the budget"
    if trained.val_peak_bytes:
        verdict += f" (a step {format_bytes(trained.peak_bytes)}, a validation "
        verdict += f"{format_bytes(trained.val_peak_bytes)})"
    lines = [
        ("steps", f"{trained.steps}, {format_seconds(trained.step_seconds)} each"),
        ("loss", "-" if trained.loss is None else f"{trained.loss:.5g}"),
        ("peak", f"{peak}: {verdict}" if most else "not measured"),
    ]
    if trained.validation is not None:
        lines.insert(2, ("validation", ", ".join(f"{k} {v:.5g}" for k, v in trained.validation.items())))
    if trained.checkpoint is not None:
        lines.append(("checkpoint", str(trained.checkpoint)))
    if trained.weights is not None:
        lines.append(("weights", str(trained.weights)))
    screen.out.print(facts(lines))
