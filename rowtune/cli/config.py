"""`--config FILE.toml` and `--save-config FILE.toml`: a command's flags from a file, and into one.

A file has a table for each command, with its flags without the dashes; what is typed counts more:

    [search]
    model = "zoo:unet"
    budget = "8GB"
    shape = ["1x3x512x512"]

    [run]
    data = "pictures/"
    epochs = 10
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from rowtune.errors import UsageError, meant

SPOKEN = ("config", "save_config", "as_json", "quiet", "verbose", "force")
"""Not saved: they are about one run of a command."""


def read_config(path: Path, command: str, known: Collection[str] = ()) -> dict[str, Any]:
    """A command's table of a file; empty where there is none. `known` are the commands that there are.

    Raises:
        UsageError: the file cannot be read, or is not tables of commands.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from error
    except ValueError as error:  # also what is no UTF-8
        raise UsageError(f"--config {path} is no TOML: {' '.join(str(error).split())}") from error
    loose = [key for key, value in data.items() if not isinstance(value, dict)]
    if loose:
        raise UsageError(
            f"--config {path}: {loose[0]} stands outside a table; flags stand in their command's, as in "
            f"[{command}]"
        )
    odd = [key for key in data if known and key not in known]
    if odd:
        raise UsageError(f"--config {path}: there is no command {odd[0]!r}{meant(odd[0], known)}")
    return dict(data.get(command, {}))


def _commands(ctx: typer.Context) -> list[str]:
    return list(getattr(ctx.parent.command, "commands", ())) if ctx.parent else []


def _load(ctx: typer.Context, value: Path | None) -> Path | None:
    """Flags of the file become defaults, before any other flag is looked at."""
    if value is None or ctx.resilient_parsing:
        return value
    try:
        table = read_config(value, ctx.info_name or "", _commands(ctx))
        ctx.default_map = {**(ctx.default_map or {}), **_named(ctx, table, value)}
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    return value


def _named(ctx: typer.Context, table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Values by the names of a command's parameters; UsageError for a flag that it has not, or a value of
    another kind."""
    known = flags(ctx)
    found = {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"--config {path}: {ctx.info_name} has no flag {key!r}{meant(key, known)}")
        kinds, wanted = known[key].takes
        if type(value) not in kinds:
            raise UsageError(f"--config {path}: {key} is {wanted}, not {value!r}")
        found[known[key].parameter] = value
    return found


class Flag(NamedTuple):
    """A parameter's name in Python, and what a file may say: types, and their name for people."""

    parameter: str
    takes: tuple[tuple[type, ...], str]


MANY = (list,), "a list"
TRUTH = (bool,), "true or false"
ONE = (str, int, float), "a text or a number"


def flags(ctx: typer.Context) -> dict[str, Flag]:
    """A command's parameters by what they are called in a file."""
    found = {}
    for param in ctx.command.params:
        if param.name in ("config", "save_config"):
            continue
        long = [name for name in param.opts if name.startswith("--")]
        takes = (
            MANY if getattr(param, "multiple", False) else TRUTH if getattr(param, "is_flag", False) else ONE
        )
        found[long[0].removeprefix("--") if long else str(param.name)] = Flag(str(param.name), takes)
    return found


def save_config(ctx: typer.Context, path: Path) -> None:
    """Add a command's table to a file, with the flags that were given.

    Raises:
        UsageError: the file has such a table, is no file of tables, or cannot be written.
    """
    command = str(ctx.info_name)
    if path.exists() and read_config(path, command):
        raise UsageError(f"--save-config {path} has a table [{command}]: remove it, or give another name")
    lines = [f"[{command}]"]
    for key, flag in flags(ctx).items():
        source = ctx.get_parameter_source(flag.parameter)
        if flag.parameter not in SPOKEN and source is not None and source.name != "DEFAULT":
            lines.append(f"{key} = {_toml(ctx.params[flag.parameter])}")
    before = "\n" if path.exists() and path.stat().st_size else ""
    try:
        with open(path, "a", encoding="utf-8") as out:
            out.write(before + "\n".join(lines) + "\n")
    except OSError as error:
        raise UsageError(f"--save-config {path}: {error.strerror or error}") from error


def _toml(value: Any) -> str:
    """Numbers, truths, texts and lists of them; JSON writes these as TOML does, but for DEL."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return json.dumps(str(value)).replace("\x7f", "\\u007f")


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.toml", is_eager=True, callback=_load,
        help="Take flags from this file's table of this command; those typed count more.",
    ),
]  # fmt: skip
SaveConfig = Annotated[
    Path | None,
    typer.Option("--save-config", metavar="FILE.toml", help="Add this command's flags to a file, and go on."),
]
