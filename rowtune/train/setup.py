"""What is known of a run before its first step: flags that go together, room on the disk, how many steps."""

from __future__ import annotations

import math
from typing import Any

from rowtune.cost.predict import predict
from rowtune.errors import UsageError
from rowtune.plan.file import PlanFile
from rowtune.train import checkpoint, ranks
from rowtune.train.data import Feed, open_data, synthetic
from rowtune.train.options import Options
from rowtune.train.schedule import parse_schedule
from rowtune.tune.host import half_of_free, on_host
from rowtune.tune.optimizers import OptimizerSpec
from rowtune.tune.output import ROOM, check_writable
from rowtune.tune.step import Workload

FOREVER = 1 << 60


def check(options: Options) -> None:
    """Flags that make no sense, before anything is loaded."""
    for flag, value in (("--steps", options.steps), ("--epochs", options.epochs)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is at least 1, not {value}")
    if not options.data and options.epochs is not None:
        raise UsageError("--epochs needs --data; synthetic data has no end: give --steps")
    if options.accumulate < 1:
        raise UsageError(f"--accumulate is at least 1, not {options.accumulate}")
    if not 0 <= options.ema < 1:
        raise UsageError(f"--ema is a decay from 0 (none) to just below 1, as 0.999, not {options.ema}")
    if options.clip < 0:
        raise UsageError(f"--clip is the largest norm of the gradient, above 0, not {options.clip}")
    if options.checkpoint is None and (options.resume or options.checkpoint_every):
        flag = "--resume" if options.resume else "--checkpoint-every"
        raise UsageError(f"{flag} needs --checkpoint DIR, where the checkpoints are")
    parse_schedule(options.schedule, options.warmup)


def check_host(file: PlanFile, work: Workload, options: Options) -> None:
    """InfeasibleError for a plan that keeps more on the host than it may."""
    if any(s.store == "host" for s in file.plan.segments):
        limit = half_of_free() if options.host_budget is None else options.host_budget
        on_host(predict(work.graph, file.plan, work.optimizer), limit)


def open_checkpoints(options: Options, size: int) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, and room for more: of several ranks the first looks, for all. UsageError
    for one that nobody asked for."""
    return ranks.from_first(_open(options, size) if ranks.rank() == 0 else None)


def _open(options: Options, size: int) -> checkpoint.Checkpoint | None:
    folder = options.checkpoint
    if folder is None:
        return None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--checkpoint {folder} is a file; give a folder")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"--checkpoint {folder} cannot be made: {error.strerror}") from error
    check_writable(folder / "state", "--checkpoint", size + ROOM)
    newest = checkpoint.newest(folder)
    if newest is not None and options.resume:
        return checkpoint.load(newest)
    if newest is not None and not options.force:
        raise UsageError(
            f"--checkpoint {folder} has a run of {int(newest.name[5:])} steps: give --resume to go on with "
            "it, or --force to begin anew"
        )
    return None


def feed_of(work: Workload, options: Options) -> tuple[Feed, int, int | None]:
    """The batches, how many epochs of them, and how many steps that makes, None where nobody knows."""
    if not options.data:
        return synthetic(work, options.shard), 1, options.steps or 10
    feed, _ = open_data(options.data, work, fit=options.fit, workers=options.workers, shard=options.shard)
    epochs = options.epochs or (1 if options.steps is None else FOREVER)
    if feed.batches is None:
        return feed, epochs, options.steps
    whole = epochs * math.ceil(feed.batches / options.accumulate)
    return feed, epochs, whole if options.steps is None else min(whole, options.steps)


def settings(
    file: PlanFile, work: Workload, options: Options, spec: OptimizerSpec, feed: Feed
) -> dict[str, Any]:
    """What must not change between a run and its resumption; names as a person knows them."""
    return {
        checkpoint.PROCESSES: ranks.count(),
        "the model's fingerprint": file.fingerprint,
        "the inputs": ", ".join(map(str, work.problem.inputs)),
        "the loss": work.problem.loss,
        "the batches of an epoch": feed.batches,
        "--optimizer": str(spec),
        "--schedule": options.schedule,
        "--warmup": options.warmup,
        "--clip": options.clip,
        "--accumulate": options.accumulate,
        "--ema": options.ema,
        "--seed": work.problem.seed,
    }
