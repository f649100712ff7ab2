"""Two reports side by side in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from rowtune.cli.charts import Point, legend, scatter
from rowtune.cli.drawn import memory_chart, strip
from rowtune.cli.page import WIDEST, heading
from rowtune.cli.screen import BAD, GOOD, Screen, plain_table

if TYPE_CHECKING:
    from rowtune.report.compare import Comparison
    from rowtune.report.page import Page

SIDES = (("1", "cyan"), ("2", "magenta"))


def show_comparison(screen: Screen, both: Comparison) -> None:
    """Figures, both studies in one scatter, and each plan along its network and over its step."""
    out = screen.out
    names = (both.one.plan, both.other.plan)
    out.print()
    table = plain_table(
        ("", "left"), *((f"{mark} {escape(n)}", "left") for (mark, _), n in zip(SIDES, names, strict=True))
    )
    for row in both.rows:
        cells = ((row.one, row.better == "one"), (row.other, row.better == "other"))
        table.add_row(row.name, *(Text(text, GOOD if better else "") for text, better in cells))
    out.print(table)
    if both.note:
        out.print(Text(both.note, "yellow"))
    pages = (both.one, both.other)
    width = min(out.width, WIDEST)
    points = [p for page, side in zip(pages, SIDES, strict=True) for p in _points(page, *side)]
    if points:
        heading(screen, "Memory and time of every plan measured")
        out.print(scatter(points, both.one.verdict.limit_bytes, width))
        words = [(mark, style, name) for (mark, style), name in zip(SIDES, names, strict=True)]
        out.print(legend([*words, ("P", BAD, "plain PyTorch"), ("┊", BAD, f"budget of {names[0]}")]))
    for page, (mark, _) in zip(pages, SIDES, strict=True):
        heading(screen, f"{mark} {page.plan}: {page.verdict.text}")
        out.print(strip(page.segments, width))
        if page.memory is not None:
            out.print(memory_chart(page.memory, page.verdict.limit_bytes, width))


def _points(page: Page, mark: str, style: str) -> list[Point]:
    """A study's plans under its number, the chosen one bold."""
    found = [t for t in page.trials if t.status == "ok" and t.peak_bytes and t.step_seconds]
    found.sort(key=lambda t: (t.kind == "plain", t.best, t.chosen))
    return [
        Point(
            t.peak_bytes or 0,
            t.step_seconds or 0.0,
            "P" if t.kind == "plain" else mark,
            BAD
            if t.kind == "plain"
            else f"bold {style}"
            if t.chosen
            else style
            if t.best
            else f"dim {style}",
        )
        for t in found
    ]
