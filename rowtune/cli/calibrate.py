"""`rowtune calibrate`: time the calls of a model's plans on this device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rowtune.cli import options
from rowtune.cli.screen import Screen, facts

if TYPE_CHECKING:
    from rowtune.cost.profile import Profile


def command(
    model: options.Model,
    shape: options.Shapes = None,
    model_arg: options.ModelArgs = None,
    dtype: options.Dtype = "",
    device: options.Device = "auto",
    loss: options.LossName = "",
    seconds: Annotated[
        float, typer.Option("--seconds", min=1.0, help="Of timing; the calls that matter most come first.")
    ] = 60.0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the device's profile here as well.")
    ] = None,
    force: options.Force = False,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Time the calls of a model's plans on this device, for predictions of step times.

    Searches do so by themselves, for a shorter while; what was timed is kept for all later ones.
    """
    from rowtune.importers.source import parse_source
    from rowtune.tune.device import resolve_device
    from rowtune.tune.output import check_writable
    from rowtune.tune.profiles import profile_path
    from rowtune.tune.step import define

    screen = Screen(as_json, quiet, verbose)
    source = parse_source(model, model_arg or ())
    here = resolve_device(device)
    if out is not None:
        check_writable(out)
        _check_new(out, force)
    screen.opening(source)
    work = define(source, shape or (), dtype=dtype, device=here, loss=loss, seed=seed)
    screen.err.print(f"[dim]timing the calls of its plans, {seconds:.0f} s at most ...[/]")
    calls, profile = timed(work, seconds)
    if out is not None:
        from rowtune.plan.file import dumps, write_text

        write_text(out, dumps(profile.to_dict()) + "\n")
    found = summary(profile, calls) | {"cache": str(profile_path(here))}
    screen.out.print(
        facts(
            [
                ("device", profile.device),
                ("calls", f"{calls:,} signatures in the plans that a search begins with"),
                ("families", f"{found['families']:,}, timed at {found['points']:,} sizes"),
                ("host", f"{profile.call_seconds * 1e6:.1f} microseconds a call"),
                ("kept in", found["cache"] + (f" and {out}" if out else "")),
            ]
        )
    )
    screen.json(found)


def timed(work: Any, seconds: float) -> tuple[int, Profile]:
    """(signatures in the plans that a search begins with, the profile with their times)."""
    from rowtune.cost.candidates import first
    from rowtune.cost.table import Table, within
    from rowtune.tune.profiles import calibration
    from rowtune.tune.supervisor import Worker

    table = Table(work.graph)
    table.add(first(table), within(seconds))
    calls = table.work()
    with Worker(work.problem) as worker:
        found: Profile = calibration(work.problem.device, worker.calibrate)(calls, seconds)
    return len(calls), found


def summary(profile: Profile, calls: int) -> dict[str, Any]:
    """The JSON of calibrate."""
    return {
        "status": "ok",
        "device": profile.device,
        "threads": profile.threads,
        "torch": profile.torch,
        "signatures": calls,
        "families": len(profile.curves),
        "points": sum(map(len, profile.curves.values())),
        "call_seconds": profile.call_seconds,
    }


def _check_new(path: Path, force: bool) -> None:
    from rowtune.errors import UsageError

    if path.exists() and not force:
        raise UsageError(f"{path} exists already: give --force to replace it, or another -o")
