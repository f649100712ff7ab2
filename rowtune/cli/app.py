"""`rowtune`: the commands, and what an error becomes: one line on stderr and an exit code.

Nothing here imports torch; a command does when it runs.
"""

from __future__ import annotations

import functools
import inspect as inspect_module
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rowtune import __version__
from rowtune.cli import calibrate, demo, fit, inspect, report, run, search, verify
from rowtune.cli import config as config_file
from rowtune.errors import RowtuneError

INTERRUPTED = 130
LONGEST = 1200
"""Characters of an error's line."""


def guarded(command: Callable[..., int | None]) -> Callable[..., None]:
    """Run a command, with flags from files; every failure is one line, never a traceback (-v shows it)."""

    @functools.wraps(command)
    def wrapper(
        ctx: typer.Context, config: Path | None = None, save_config: Path | None = None, **flags: Any
    ) -> None:
        verbose, as_json = bool(flags.get("verbose")), bool(flags.get("as_json"))
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            if save_config is not None:
                config_file.save_config(ctx, save_config)
            code = command(**flags) or 0
        except RowtuneError as error:
            code = _fail(str(error), error.exit_code, as_json, verbose)
        except KeyboardInterrupt:
            code = _fail("interrupted", INTERRUPTED, as_json, False)
        except BrokenPipeError:  # the reader of our output left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except Exception as error:
            hint = "" if verbose else " (-v shows where)"
            code = _fail(f"{type(error).__name__}: {error}{hint}", 1, as_json, verbose)
        raise typer.Exit(code)

    return _with_files(wrapper, command)


def _with_files(wrapper: Callable[..., None], command: Callable[..., int | None]) -> Callable[..., None]:
    """The wrapper, with the command's flags for typer to read, and those that every command has."""
    own = inspect_module.signature(command, eval_str=True)
    keyword = inspect_module.Parameter.KEYWORD_ONLY
    more = [
        inspect_module.Parameter("config", keyword, default=None, annotation=config_file.Config),
        inspect_module.Parameter("save_config", keyword, default=None, annotation=config_file.SaveConfig),
        inspect_module.Parameter("ctx", keyword, annotation=typer.Context),
    ]
    parameters = [*own.parameters.values(), *more]
    wrapper.__signature__ = own.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _fail(message: str, code: int, as_json: bool, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    line = " ".join(message.split())
    if len(line) > LONGEST:  # what a file holds may stand in it
        line = f"{line[: LONGEST - 200]} ... {line[-150:]}"
    print(f"rowtune: {line}", file=sys.stderr)
    if as_json:
        status = {4: "infeasible", INTERRUPTED: "interrupted"}.get(code, "error")
        print(json.dumps({"status": status, "exit_code": code, "error": line}))
    return code


def _version(value: bool) -> None:
    if value:
        print(f"rowtune {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train convolutional networks that do not fit: exactly, under a memory budget."""


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(_root)
app.command("fit")(guarded(fit.command))
app.command("inspect")(guarded(inspect.command))
app.command("search")(guarded(search.command))
app.command("run")(guarded(run.command))
app.command("report")(guarded(report.command))
app.command("verify")(guarded(verify.command))
app.command("calibrate")(guarded(calibrate.command))
app.command("demo")(guarded(demo.command))


def main() -> None:
    """Entry point of `rowtune` and `python main.py`."""
    # OpenMP's threads spin for milliseconds between operators. On a machine that does anything else as well,
    # that makes many small operators ten times slower; read once, when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Bands of many sizes come and go: with segments that can grow CUDA's allocator keeps less in reserve.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    app()
