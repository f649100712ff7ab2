"""`rowtune verify`: a plan's loss, gradients and buffers against the plain network's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rowtune.cli import options
from rowtune.cli.run import read_plan
from rowtune.cli.screen import Screen, facts
from rowtune.errors import UsageError


def command(
    plan: options.PlanPath = Path("plan.json"),
    dtype: Annotated[str, typer.Option("--dtype", help="float64 for a check to the last digits.")] = "",
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Check a plan's gradients against the plain network's."""
    if dtype not in ("", "float32", "float64"):
        raise UsageError(f"verify's --dtype is float32 or float64, not {dtype!r}")
    screen = Screen(as_json, quiet, verbose)
    file = read_plan(plan)
    import torch

    from rowtune.train.opened import open_plan
    from rowtune.tune.measure import Bench

    screen.opening(file.problem.model)
    work, _ = open_plan(file, device)
    screen.err.print("[dim]running the plan and the plain network ...[/]")
    check = Bench(work.problem).check(file.plan, getattr(torch, dtype) if dtype else None)
    status = "ok" if check.ok else "wrong"
    lines = [
        ("verdict", "exact" if check.ok else "NOT exact: please report this plan"),
        ("largest error", f"{check.max_relative_error:.2e} at {check.worst} ({check.dtype})"),
        ("checked", f"loss, {len(check.checked) - 1} gradients and buffers on {check.inputs}"),
    ]
    screen.out.print(facts(lines + ([("note", check.note)] if check.note else [])))
    if screen.verbose:
        screen.out.print(", ".join(check.checked), style="dim")
    screen.json(
        {
            "status": status,
            "max_relative_error": check.max_relative_error,
            "worst": check.worst,
            "dtype": check.dtype,
            "inputs": check.inputs,
            "checked": list(check.checked),
        }
    )
    return 0 if check.ok else 1
