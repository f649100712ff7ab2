"""`rowtune fit`: does it fit, and how large could it be?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from rowtune.cli import options
from rowtune.cli.screen import BAD, GOOD, Screen, facts, plain_table

if TYPE_CHECKING:
    from rowtune.tune.fit import Fit


def command(
    model: options.Model,
    budget: options.Budget,
    over: Annotated[
        str, typer.Option("--over", metavar="DIMS", help="Grown together: H,W or N (batch) or D, W ...")
    ] = "H,W",
    shape: options.Shapes = None,
    model_arg: options.ModelArgs = None,
    dtype: options.Dtype = "",
    loss: options.LossName = "",
    optimizer: options.OptimizerName = "",
    reserve: options.Reserve = "",
    host_budget: options.HostBudget = "",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Of the processor, to look for the smallest plans.")
    ] = 120.0,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Run a real step of rowtune's plan at its largest size.")
    ] = False,
    device: options.Device = "auto",
    device_profile: options.DeviceProfile = "",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Say whether training fits a budget, and how large image, volume or batch could be.

    Predicted without running the model: for plain PyTorch, for the best checkpointing, and for rowtune; with
    --host-budget also for rowtune with so much of the host's memory.
    """
    from rowtune.importers.source import parse_source
    from rowtune.tune.device import resolve_device
    from rowtune.tune.fit import fit
    from rowtune.tune.profiles import chosen, known
    from rowtune.tune.sizes import parse_budget, parse_size
    from rowtune.tune.step import define

    screen = Screen(as_json, quiet, verbose)
    size = parse_budget(budget)
    kept = parse_size(reserve, "--reserve") if reserve else 0
    here = resolve_device(device)
    host = parse_size(host_budget, "--host-budget") if host_budget else 0
    profile = chosen(device_profile) if device_profile else known(here)
    source = parse_source(model, model_arg or ())
    screen.opening(source)
    work = define(source, shape or (), dtype=dtype, device=here, loss=loss, optimizer=optimizer, seed=seed)
    from rowtune.tune.reference import plain_peak

    limit = (int(size * plain_peak(work)) if isinstance(size, float) else size) - kept
    with screen.err.status("predicting ...") as status:
        found = fit(
            work, limit, over, profile, lambda text: status.update(f"predicting {text}"), seconds, host
        )
    result = as_dict(found, limit, over, profile is not None)
    if confirm:
        result["confirmed"] = _confirmed(work, found[-1], limit, over)
    _show(screen, found, result, [str(spec) for spec in work.problem.inputs])
    screen.json(result)
    return 0 if found[-1].here.plan is not None else 4


def as_dict(found: list[Fit], limit: int, over: str, timed: bool) -> dict[str, Any]:
    """The JSON of fit."""
    # Without a profile of the device times say nothing by themselves.
    ways = {
        f.way: {
            "fits": f.here.plan is not None,
            "least_bytes": f.here.peak_bytes,
            "seconds": f.here.seconds if timed else None,
            "largest": None if f.largest is None else list(f.largest),
            "largest_bytes": None if f.there is None else f.there.peak_bytes,
        }
        for f in found
    }
    return {
        "status": "ok" if found[-1].here.plan else "infeasible",
        "limit_bytes": limit,
        "over": over,
        **ways,
    }


def _confirmed(work: Any, ours: Fit, limit: int, over: str) -> dict[str, Any]:
    """A real step at the largest size."""
    from dataclasses import replace

    from rowtune.tune.fit import resized
    from rowtune.tune.supervisor import Worker

    if ours.largest is None or ours.there is None or ours.there.plan is None:
        return {"status": "none"}
    problem = replace(work.problem, inputs=resized(work, over, ours.largest))
    with Worker(problem, limit) as worker:
        result = worker.measure(ours.there.plan, timeout=3600.0)
    return {"status": result.status, "reason": result.reason, "peak_bytes": result.peak_bytes,
            "step_seconds": result.step_seconds}  # fmt: skip


def _show(screen: Screen, found: list[Fit], result: dict[str, Any], inputs: list[str]) -> None:
    from rowtune.tune.sizes import format_both, format_bytes, format_seconds

    limit = result["limit_bytes"]
    screen.out.print(facts([("inputs", ", ".join(inputs)), ("budget", format_both(limit))]))
    table = plain_table(
        ("", "left"), ("takes at least", "right"), ("", "left"), ("step", "right"),
        (f"largest {result['over']}", "right"), ("times plain's", "right"),
    )  # fmt: skip
    plain = _volume(found[0].largest)
    for f in found:
        fits = f.here.plan is not None
        volume = _volume(f.largest)
        table.add_row(
            f.way,
            format_bytes(f.here.peak_bytes),
            Text("fits" if fits else "too large", GOOD if fits else BAD),
            f"~{format_seconds(seconds)}" if (seconds := result[f.way]["seconds"]) else "-",
            "x".join(map(str, f.largest)) if f.largest else "none",
            f"{volume / plain:.1f}x" if plain and volume else "-",
        )
    screen.out.print()
    screen.out.print(table)
    confirmed = result.get("confirmed")
    if confirmed:
        peak, step = confirmed.get("peak_bytes"), confirmed.get("step_seconds")
        text = f"{format_bytes(peak)}, {format_seconds(step)} a step" if peak else confirmed.get("reason", "")
        screen.out.print()
        screen.out.print(facts([("confirmed", f"{confirmed['status']}: {text}")]))


def _volume(lengths: tuple[int, ...] | None) -> int:
    total = 1
    for n in lengths or ():
        total *= n
    return total if lengths else 0
