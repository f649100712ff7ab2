"""`rowtune report`: what was tried, what was chosen, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rowtune.cli import options
from rowtune.cli.compared import show_comparison
from rowtune.cli.page import show_page
from rowtune.cli.run import read_plan
from rowtune.cli.screen import Screen
from rowtune.errors import UsageError

if TYPE_CHECKING:
    from rowtune.plan.file import PlanFile
    from rowtune.report.page import Page

NO_MODEL = "the model was not opened (--no-model): no memory over the step"


def command(
    plan: options.PlanPath = Path("plan.json"),
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write it as one page for a browser; needs no network."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="PLAN", help="Show another plan and its study beside this one."),
    ] = None,
    no_model: Annotated[
        bool,
        typer.Option(
            "--no-model",
            help="Read files only: the plan's model is not opened (none of its code runs), and memory over "
            "the step is left out.",
        ),
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Pack what a bug report needs into this zip archive; no weights."),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what was tried, what was chosen, and why; what to try next."""
    screen = Screen(as_json, quiet, verbose)
    file = read_plan(plan)
    if html is not None:
        _check_html(html, force)
    if bundle is not None:
        from rowtune.cli.bundle import write_bundle

        write_bundle(screen, plan, file, bundle, force)
    page = read_page(screen, file, plan, no_model)
    if compare is None:
        show_page(screen, page)
        shown = page.to_dict()
    else:
        from rowtune.report.compare import compared

        both = compared(page, read_page(screen, read_plan(compare), compare, no_model))
        show_comparison(screen, both)
        shown = both.to_dict()
    if html is not None:
        from rowtune.report.html import write_html

        write_html(shown, html)
        screen.note(f"{html}: open it in a browser")
    screen.json(shown)


def _check_html(path: Path, force: bool) -> None:
    from rowtune.tune.output import check_writable

    check_writable(path, "--html")
    if path.exists() and not force and "rowtune" not in path.read_bytes()[:400].decode("utf-8", "replace"):
        raise UsageError(
            f"--html {path} exists and is no report: give --force to replace it, or another name"
        )


def read_page(screen: Screen, file: PlanFile, path: Path, no_model: bool) -> Page:
    """The report's content, from the plan, the records beside it and its model."""
    from rowtune.report.build import make_page, read_study
    from rowtune.report.step import Unknown, step_cost

    records, note = read_study(file, path)
    if note:
        screen.note(note)
    if no_model:
        return make_page(file, records, str(path), Unknown(NO_MODEL))
    screen.opening(file.problem.model)
    with screen.err.status("recording a step of the plan, and one of plain PyTorch ..."):
        step = step_cost(file)
    return make_page(file, records, str(path), step)
