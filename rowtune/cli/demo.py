"""`rowtune demo`: the whole path on one real network, in a few minutes on a laptop.

A U-Net is exported to ONNX as anyone would, searched under a quarter of what plain PyTorch takes, trained a
few steps with the plan found, and reported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rowtune.cli import options
from rowtune.cli.page import show_page
from rowtune.cli.report import read_page
from rowtune.cli.run import read_plan, train_shown
from rowtune.cli.screen import Screen
from rowtune.cli.search import as_dict, find_shown

FOLDER = Path("rowtune-demo")
SIZE, BASE, DEPTH, SHARE = 384, 16, 3, 0.25


def command(
    budget: Annotated[str, typer.Option("--budget", help="As for search.")] = "25%",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Plans to measure.")] = 12,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps with the plan.")] = 8,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds of search.")] = 75.0,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Export a U-Net to ONNX, search it under a tight budget, train, report: in ./rowtune-demo."""
    from rowtune.tune.output import check_writable
    from rowtune.tune.sizes import parse_budget

    screen = Screen(as_json, quiet, verbose)
    size = parse_budget(budget)
    check_writable(FOLDER if not FOLDER.exists() else FOLDER / "plan.json")
    FOLDER.mkdir(exist_ok=True)
    model, plan = FOLDER / "unet.onnx", FOLDER / "plan.json"
    _heading(screen, 1, f"export a U-Net ({SIZE}x{SIZE} input) to {model}")
    export(model, seed)

    from rowtune.importers.source import parse_source
    from rowtune.train.options import Options
    from rowtune.tune.find import Request
    from rowtune.tune.step import define

    _heading(screen, 2, f"rowtune search {model} --budget {budget} -o {plan}")
    work = define(parse_source(str(model)), seed=seed)
    request = Request(work, size, plan, trials, timeout, seed, fresh=True, force=True)
    found = find_shown(screen, request, default_loss=True, default_optimizer=True)
    _heading(screen, 3, f"rowtune run {plan} --steps {steps}")
    trained = train_shown(screen, read_plan(plan), Options(steps=steps), "auto", [])
    _heading(screen, 4, f"rowtune report {plan}")
    show_page(screen, read_page(screen, read_plan(plan), plan, False))
    screen.json(
        {**as_dict(found, plan), "status": trained.status, "steps": trained.steps, "loss": trained.loss}
    )
    return 0 if trained.status == "ok" else 4


def _heading(screen: Screen, number: int, text: str) -> None:
    screen.err.print(f"\n[bold cyan]{number}[/] [bold]{text}[/]")


def export(path: Path, seed: int) -> None:
    """The zoo's norm-free U-Net as an .onnx file, by torch's own exporter."""
    import warnings

    import torch

    from rowtune import zoo

    model = zoo.build("unet", base=BASE, depth=DEPTH, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(path),
            input_names=["image"],
            dynamo=False,
            opset_version=17,
        )
