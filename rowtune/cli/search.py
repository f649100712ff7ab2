"""`rowtune search`: find the fastest exact plan that fits a budget, by measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rowtune.cli import options
from rowtune.cli.progress import SearchDisplay
from rowtune.cli.screen import Screen, facts

if TYPE_CHECKING:
    from rowtune.tune.find import Found, Request

INTERRUPTED = 130
# A step that had the processor for less than this share of its time waited for others.
BUSY = 0.8


def command(
    model: options.Model,
    budget: options.Budget,
    shape: options.Shapes = None,
    model_arg: options.ModelArgs = None,
    dtype: options.Dtype = "",
    device: options.Device = "auto",
    loss: options.LossName = "",
    optimizer: options.OptimizerName = "",
    savers: options.Savers = "",
    reserve: options.Reserve = "",
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Plans to measure, earlier runs included.")
    ] = 40,
    timeout: Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds; 0 for no limit.")] = 0.0,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the plan goes.")] = Path("plan.json"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier trials of this study.")] = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Find the fastest exact plan that fits a budget, by measuring.

    Trials are kept beside the plan: the same command again goes on where it stopped.
    """
    from rowtune.importers.source import parse_source
    from rowtune.tune.find import Request, records_path
    from rowtune.tune.output import check_writable
    from rowtune.tune.savers import parse
    from rowtune.tune.sizes import parse_budget, parse_size

    screen = Screen(as_json, quiet, verbose)
    size = parse_budget(budget)
    allowed = parse(savers)
    kept = parse_size(reserve, "--reserve") if reserve else 0
    source = parse_source(model, model_arg or ())
    check_writable(out)
    check_writable(records_path(out))
    from rowtune.tune.device import resolve_device
    from rowtune.tune.step import define

    screen.opening(source)
    work = define(
        source,
        shape or (),
        dtype=dtype,
        device=resolve_device(device),
        loss=loss,
        optimizer=optimizer,
        seed=seed,
    )
    limit = timeout or float("inf")
    request = Request(work, size, out, trials, limit, seed, kept, fresh, force, allowed)
    found = find_shown(screen, request, default_loss=not loss, default_optimizer=not optimizer)
    screen.json(as_dict(found, found.path))
    return INTERRUPTED if found.result.interrupted else 0


def find_shown(screen: Screen, request: Request, *, default_loss: bool, default_optimizer: bool) -> Found:
    """Search with a live display, then say what was found."""
    from rowtune.importers.source import PT2_WARNING
    from rowtune.tune.find import budget_bytes, find
    from rowtune.tune.study import Interrupted

    problem = request.work.problem
    screen.notes(note for note in request.work.loaded.notes if note != PT2_WARNING)
    budget = budget_bytes(request)
    screen.err.print(
        facts(
            [
                ("model", f"{problem.model}  {', '.join(map(str, problem.inputs))}"),
                ("device", problem.device),
                ("loss", problem.loss + (" (default)" if default_loss else "")),
                ("optimizer", problem.optimizer + (" (default)" if default_optimizer else "")),
                ("state", _state(request, budget - request.reserve)),
            ]
        )
    )
    try:
        with SearchDisplay(screen, budget - request.reserve) as display:
            found = find(request, display.update)
    except Interrupted:
        raise KeyboardInterrupt from None
    _say(screen, found)
    if found.unwritten:
        screen.note(f"some trials are not in the records ({found.unwritten})")
    if found.path != request.out:
        screen.note(f"{request.out} could not be written; the plan is in {found.path}")
    return found


def _state(request: Request, limit: int) -> str:
    from rowtune.tune.find import check_state, state_bytes
    from rowtune.tune.sizes import format_bytes

    check_state(request.work, limit)
    size = state_bytes(request.work)
    return f"{format_bytes(size)} of parameters, gradients, optimizer: {size / limit:.0%} of the budget"


def _say(screen: Screen, found: Found) -> None:
    from rowtune.tune.sizes import format_bytes, format_seconds

    m, budget, out = found.file.measured, found.file.budget_bytes, found.path
    lines = [
        (
            "plan",
            f"{out}" + (" (best so far: the search was interrupted)" if found.result.interrupted else ""),
        ),
        (
            "peak",
            f"{format_bytes(m['peak_bytes'])} of {format_bytes(budget)} ({m['peak_bytes'] / budget:.0%})",
        ),
        ("step", format_seconds(m["step_seconds"])),
    ]
    if m["plain_peak_bytes"]:
        time, peak = m["step_seconds"] / m["plain_step_seconds"], m["peak_bytes"] / m["plain_peak_bytes"]
        plain = f"{format_bytes(m['plain_peak_bytes'])}, {format_seconds(m['plain_step_seconds'])} a step"
        lines.append(("plain", f"{plain}: the plan takes {peak:.0%} of the memory and {time:.2f}x the time"))
    else:
        lines.append(("plain", "does not fit on this machine"))
    if m["max_relative_error"] is not None:
        lines.append(("gradients", f"equal to plain's within {m['max_relative_error']:.1e}"))
    if found.file.threads:
        lines.append(("threads", f"{found.file.threads}: faster than torch's own number"))
    screen.out.print(facts(lines))
    used = m.get("cpu_seconds")
    if found.file.problem.device == "cpu" and used is not None and used < BUSY * m["step_seconds"]:
        screen.note(
            f"the machine was busy: of a step's {format_seconds(m['step_seconds'])} this process worked "
            f"{format_seconds(used)}; times and the choice between plans may be off"
        )
    screen.note(f"next: rowtune run {out}   rowtune report {out}")


def as_dict(found: Found, out: Path) -> dict[str, Any]:
    """The JSON of search."""
    m = found.file.measured
    records = found.result.records
    return {
        "status": "interrupted" if found.result.interrupted else "ok",
        "plan": str(out),
        "peak_bytes": m["peak_bytes"],
        "step_seconds": m["step_seconds"],
        "plain_peak_bytes": m["plain_peak_bytes"],
        "plain_step_seconds": m["plain_step_seconds"],
        "trials": found.result.measured,
        "rejected": sum(r.status == "rejected" for r in records),
        "slow": sum(r.status == "slow" for r in records),
        "failed": sum(r.status not in ("ok", "slow", "rejected") for r in records),
        "budget_bytes": found.file.budget_bytes,
        "predicted_peak_bytes": found.file.predicted["peak_bytes"],
        "activation_bytes": m["activation_bytes"],
        "allocator_peak_bytes": m["allocator_peak_bytes"],
        "max_relative_error": m["max_relative_error"],
        "loss": found.file.problem.loss,
        "optimizer": found.file.problem.optimizer,
    }
