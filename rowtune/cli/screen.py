"""Where words, tables and JSON go: progress to stderr, results to stdout, or one JSON object instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rowtune.report.finite import finite

if TYPE_CHECKING:
    from rowtune.problem import Source

# Colours by meaning, the same in every table and chart.
GOOD, BAD, SOFT, ACCENT = "green", "red", "dim", "cyan"
MARKS = {"keep": ("k", "yellow"), "checkpoint": ("c", "magenta"), "rows": ("•", "cyan")}


@dataclass(frozen=True)
class Screen:
    """`out` is for results, `err` for progress; with `as_json` results are only the one object."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    out: Console = field(init=False)
    err: Console = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "err", Console(file=sys.stderr, quiet=self.quiet, highlight=False))
        out = (
            Console(file=sys.stderr, quiet=True)
            if self.as_json
            else Console(file=sys.stdout, highlight=False)
        )
        object.__setattr__(self, "out", out)

    def note(self, text: str) -> None:
        """A line of progress."""
        self.err.print(f"[{SOFT}]•[/] {escape(text)}", soft_wrap=True)

    def notes(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.note(text)

    def opening(self, source: Source) -> None:
        """Said before a model is loaded, while there is still time to think again."""
        from rowtune.importers.source import PT2_WARNING

        if source.kind == "pt2":
            self.note(PT2_WARNING)
        self.err.print("[dim]importing and tracing the model ...[/]")

    def json(self, value: dict[str, Any]) -> None:
        """The one object, where asked for; infinities and nan become null."""
        if self.as_json:
            print(json.dumps(finite(value)))


class Silent(Screen):
    """Of several processes that do the same, one speaks; the others have this."""

    def __post_init__(self) -> None:
        for name in ("out", "err"):
            object.__setattr__(self, name, Console(file=sys.stderr, quiet=True))


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and values in two columns, without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style=SOFT, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else escape(value))
    return table


def plain_table(*columns: tuple[str, str]) -> Table:
    """A table with a rule under its head and nothing else; columns are (name, left or right)."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table
