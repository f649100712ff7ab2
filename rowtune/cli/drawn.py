"""A plan as a strip, and memory over a step, drawn with characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from rowtune.cli.screen import BAD, MARKS, SOFT
from rowtune.tune.sizes import format_bytes

if TYPE_CHECKING:
    from rowtune.report.page import Curve, Memory, Stretch

FILL = {"rows": "═", "checkpoint": "─", "keep": "█"}
EIGHTHS = " ▁▂▃▄▅▆▇█"
LEFT, HEIGHT = 10, 12


def strip(segments: Sequence[Stretch], width: int) -> Text:
    """The segments along the network, as wide as their share of the feature maps (at least two cells)."""
    outer = [s for s in segments if s.depth == 0]
    shares = [s.share if s.share is not None else 1 / len(outer) for s in outer]
    room = max(width - 1 - 3 * len(outer), 0)
    text = Text("│", SOFT, no_wrap=True, overflow="crop")
    for s, share in zip(outer, shares, strict=True):
        cells = 2 + int(room * share)
        label = f" {s.policy}{f' {s.band_rows}' if s.band_rows else ''} "
        text.append((label if len(label) <= cells else "").center(cells, FILL[s.policy]), MARKS[s.policy][1])
        text.append("│", SOFT)
    return text


def memory_chart(memory: Memory, limit: int, width: int) -> Text:
    """Bytes alive over the calls of a step: plain's as a shade behind the plan's, the limit as a line."""
    cells = max(width - LEFT - 2, 16)
    plan, plain = _columns(memory.plan, cells), _columns(memory.plain, cells)
    top = max(memory.plan.peak_bytes, memory.plain.peak_bytes, limit) * 1.04
    limit_row = int(limit / top * HEIGHT)
    text = Text(no_wrap=True, overflow="crop")
    for row in reversed(range(HEIGHT)):
        marked = row == limit_row
        label = format_bytes(limit) if marked else format_bytes((row + 0.5) / HEIGHT * top)
        shown = marked or (row % 4 == 1 and abs(row - limit_row) > 1)
        text.append(f"{label if shown else '':>{LEFT}}", BAD if marked else SOFT)
        text.append(" ┤" if shown else " │", SOFT)
        for column in range(cells):
            text.append(*_cell(plan[column], plain[column], row, top, marked))
        text.append("\n")
    text.append(" " * (LEFT + 1) + "└" + "─" * cells + "\n", SOFT)
    text.append(" " * (LEFT + 2))
    text.append("█", MARKS["rows"][1])
    text.append(f" the plan ({_calls(memory.plan)})   ", SOFT)
    text.append("░", "yellow")
    text.append(f" plain PyTorch ({_calls(memory.plain)})   ", SOFT)
    text.append("┄", BAD)
    text.append(" budget", SOFT)
    return text


def _calls(curve: Curve) -> str:
    if curve.backward_at >= 1:
        return f"{curve.calls} calls, backward within forward"
    return f"{curve.calls} calls, backward from {curve.backward_at:.0%}"


def _cell(plan: float, plain: float, row: int, top: float, limit: bool) -> tuple[str, str]:
    here = plan / top * HEIGHT - row
    if here >= 1:
        return "█", MARKS["rows"][1]
    if here > 0 and not limit:
        return EIGHTHS[max(1, int(here * 8))], MARKS["rows"][1]
    if limit:
        return "┄", BAD
    return ("░", "yellow") if plain / top * HEIGHT - row > 0.5 else (" ", "")


def _columns(curve: Curve, cells: int) -> list[float]:
    """The most alive in each column; where no call lies, as in the column before."""
    found: list[float] = [-1.0] * cells
    for at, size in curve.points:
        column = min(int(at * cells), cells - 1)
        found[column] = max(found[column], size)
    last = float(curve.points[0][1]) if curve.points else 0.0
    filled = []
    for most in found:
        last = most if most >= 0 else last
        filled.append(last)
    return filled
