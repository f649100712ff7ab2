"""`rowtune run`: train with a plan, inside its budget."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rowtune.cli import options
from rowtune.cli import run_flags as flags
from rowtune.cli.screen import Screen, Silent, facts
from rowtune.cli.train_display import TrainDisplay
from rowtune.errors import UsageError
from rowtune.train.launch import joined, launched

if TYPE_CHECKING:
    from rowtune.plan.file import PlanFile
    from rowtune.train.options import Options, Trained
    from rowtune.tune.step import Workload


EXIT = {"ok": 0, "over_budget": 4, "interrupted": 130}


def command(
    plan: options.PlanPath = Path("plan.json"),
    data: flags.Data = "",
    val: flags.Val = "",
    fit: flags.Fit = None,
    workers: flags.Workers = 0,
    shape: options.Shapes = None,
    budget: flags.FrontBudget = "",
    steps: flags.Steps = None,
    epochs: flags.Epochs = None,
    optimizer: options.OptimizerName = "",
    lr: flags.Lr = None,
    schedule: flags.Schedule = "constant",
    warmup: flags.Warmup = 0,
    clip: flags.Clip = 0.0,
    accumulate: flags.Accumulate = 1,
    ema: flags.Ema = 0.0,
    seed: flags.RunSeed = None,
    keep_going: flags.KeepGoing = False,
    save: flags.Save = None,
    checkpoint: flags.Checkpoint = None,
    checkpoint_every: flags.CheckpointEvery = 0,
    resume: flags.Resume = False,
    metrics: flags.Metrics = None,
    tensorboard: flags.Tensorboard = None,
    force: options.Force = False,
    engine: flags.Engine = flags.EngineName.listed,
    verify_every: flags.VerifyEvery = 0,
    check_error_every: flags.CheckErrorEvery = 100,
    host_budget: options.HostBudget = "",
    fsdp: flags.Fsdp = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Train with a plan, on random data or your own; under torchrun, in several processes."""
    team = launched()
    screen = Screen(as_json, quiet, verbose) if team.rank == 0 else Silent()
    with joined(team):
        file = chosen_plan(plan, budget, save, force)
        from rowtune.train.options import Options, Shard
        from rowtune.tune.sizes import parse_size

        wanted = Options(
            steps=steps, epochs=epochs, data=data, val=val, fit=fit.value if fit else "", workers=workers,
            optimizer=optimizer, lr=lr, schedule=schedule, warmup=warmup, clip=clip, accumulate=accumulate,
            ema=ema, save=save, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume,
            metrics=metrics, tensorboard=tensorboard, force=force, keep_going=keep_going,
            engine=engine.value, verify_every=verify_every, shard=Shard(team.rank, team.size),
            fsdp=fsdp, check_error_every=check_error_every,
            host_budget=parse_size(host_budget, "--host-budget") if host_budget else None,
        )  # fmt: skip
        trained = train_shown(
            screen, file, wanted, team.device(device, file.problem.device), shape or [], seed
        )
        files = {"weights": trained.weights, "checkpoint": trained.checkpoint}
        screen.json({**asdict(trained), **{k: str(v) if v else None for k, v in files.items()}})
        return EXIT[trained.status]


def chosen_plan(path: Path, budget: str, save: Path | None, force: bool) -> PlanFile:
    """The plan, that of the front for a budget where one is given; and --save has a place to go."""
    file = read_plan(path)
    if budget:
        from rowtune.plan.file import at_budget

        file = at_budget(file, budget_within(file, path, budget))
    if save is not None:
        from rowtune.tune.output import check_writable

        check_writable(save, "--save")
        if save.exists() and not force:
            raise UsageError(f"--save {save} exists: give --force to replace it, or another name")
    return file


def budget_within(file: PlanFile, path: Path, text: str) -> int:
    """Bytes of --budget, which may be a share of what plain PyTorch took when the plan was searched."""
    from rowtune.tune.sizes import parse_budget

    size = parse_budget(text)
    if isinstance(size, int):
        return size
    plain = file.measured.get("plain_peak_bytes")
    if not plain:
        raise UsageError(
            f"--budget {text}: {path} does not say what plain PyTorch takes (it did not fit, or nothing was "
            "measured); give a size such as 8GB or 8GiB"
        )
    return int(size * plain)


def read_plan(path: Path) -> PlanFile:
    """The plan; UsageError where there is no such file."""
    if not path.is_file():
        raise UsageError(f"there is no plan {path}: rowtune search MODEL --budget SIZE -o {path} makes one")
    from rowtune.plan.file import load_plan

    return load_plan(path)


def train_shown(
    screen: Screen, file: PlanFile, wanted: Options, device: str, shapes: list[str], seed: int | None = None
) -> Trained:
    """Train with a live display, then say how it went."""
    from rowtune.train.launch import together
    from rowtune.train.loop import train
    from rowtune.train.opened import open_plan

    screen.opening(file.problem.model)
    work, predicted = open_plan(file, device, shapes, seed)
    limit = file.budget_bytes - file.reserve_bytes
    if screen.verbose:
        screen.notes(work.loaded.notes)
    screen.err.print(facts(_before(file, work, wanted, predicted)))
    with TrainDisplay(screen, limit) as display:
        trained = train(file, together(work), wanted, display.update)
    _say(screen, trained, limit)
    screen.notes(trained.notes)
    if trained.weights != wanted.save and trained.weights is not None:
        screen.note(f"{wanted.save} could not be written; the weights are in {trained.weights}")
    if trained.status == "interrupted" and trained.checkpoint is not None:
        screen.note("the same command with --resume goes on from there")
    return trained


def _before(file: PlanFile, work: Workload, wanted: Options, predicted: int) -> list[tuple[str, str]]:
    """What is known before the first step."""
    from rowtune.tune.sizes import format_bytes, format_of

    problem, count = work.problem, wanted.shard.of
    spec = wanted.optimizer or problem.optimizer
    where = problem.device if count == 1 else f"{count} processes, on {problem.device.partition(':')[0]}"
    said = format_of(predicted, file.budget_bytes - file.reserve_bytes)
    said += " in each" if count > 1 else ""
    if wanted.ema:
        size = sum(t.numel() * t.itemsize for t in work.module.state_dict().values())
        said += f", and {format_bytes(size)} for the average of the weights"
    rows = [
        ("model", f"{problem.model}  {', '.join(map(str, problem.inputs))}"),
        ("training", f"{problem.loss}, {spec}, {wanted.data or 'random data'}, {where}"),
        ("predicted", said),
    ]
    if file.predicted_for:
        rows.append(
            ("plan", f"predicted for {file.predicted_for}, never measured; `search --from` does that")
        )
    return rows


def _say(screen: Screen, trained: Trained, limit: int) -> None:
    from rowtune.tune.sizes import format_bytes, format_of, format_seconds

    most = max(trained.peak_bytes or 0, trained.val_peak_bytes or 0)
    peak = format_of(most, limit)
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
