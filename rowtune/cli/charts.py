"""Bars and the memory/time scatter, drawn with characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from rowtune.cli.screen import BAD, GOOD, SOFT
from rowtune.tune.sizes import format_bytes, format_seconds


class Point(NamedTuple):
    """A mark at a peak (bytes) and a step time (seconds). Later points are drawn over earlier ones."""

    peak: float
    seconds: float
    mark: str
    style: str


def gauge(value: float, full: float, width: int = 24) -> Text:
    """How much of `full` is taken: a bar that turns red past its end."""
    share = value / full if full else 0.0
    filled = min(width, max(0, round(share * width)))
    style = BAD if share > 1 else GOOD
    return Text.assemble(("━" * filled, style), ("─" * (width - filled), "bright_black"), f" {share:>4.0%}")


class _Axis:
    """Values to cells, on a log scale where they span more than a factor of five."""

    def __init__(self, values: Sequence[float], cells: int) -> None:
        low, high = min(values), max(values)
        self.log = low > 0 and high / low > 5
        self.cells = cells
        low, high = self._scale(low), self._scale(high)
        margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - margin, high + margin

    def _scale(self, value: float) -> float:
        return math.log(value) if self.log else value

    def cell(self, value: float) -> int:
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return min(self.cells - 1, max(0, int(share * self.cells)))

    def value(self, cell: int) -> float:
        at = self.low + (cell + 0.5) / self.cells * (self.high - self.low)
        return max(math.exp(at) if self.log else at, 0.0)


def scatter(points: Sequence[Point], budget: float | None, width: int, height: int = 14) -> Text:
    """Peak memory to the right, step time upwards, the budget as a dashed line."""
    left = 9
    across = _Axis([p.peak for p in points] + ([budget] if budget else []), max(16, width - left - 2))
    up = _Axis([p.seconds for p in points], height)
    cells: list[list[tuple[str, str]]] = [[(" ", "")] * across.cells for _ in range(height)]
    if budget:
        for row in cells:
            row[across.cell(budget)] = ("┊", BAD)
    for point in points:
        cells[height - 1 - up.cell(point.seconds)][across.cell(point.peak)] = (point.mark, point.style)
    text = Text(no_wrap=True)
    text.append(f"{'step':>{left}}\n", SOFT)
    for i, row in enumerate(cells):
        label = format_seconds(up.value(height - 1 - i)) if i % 4 == 1 else ""
        text.append(f"{label:>{left}} ", SOFT)
        text.append("┤" if label else "│", SOFT)
        for mark, style in row:
            text.append(mark, style)
        text.append("\n")
    text.append(" " * (left + 1) + "└" + "─" * across.cells + "\n", SOFT)
    text.append(" " * (left + 2) + _ticks(across), SOFT)
    if budget:
        text.append(
            "\n" + _label(across.cell(budget), across.cells, f"budget {format_bytes(budget)}", left + 2), BAD
        )
    return text


def _ticks(axis: _Axis) -> str:
    """Labels under the axis, as many as fit."""
    line = [" "] * axis.cells
    count = max(2, axis.cells // 18)
    for i in range(count):
        cell = round(i * (axis.cells - 10) / (count - 1)) if count > 1 else 0
        label = format_bytes(axis.value(cell))
        for j, letter in enumerate(label):
            if cell + j < axis.cells:
                line[cell + j] = letter
    return "".join(line)


def _label(cell: int, cells: int, text: str, left: int) -> str:
    start = min(max(0, cell - len(text) // 2), max(0, cells - len(text)))
    return " " * (left + start) + text


def legend(entries: Sequence[tuple[str, str, str]]) -> Text:
    """Marks and what they mean."""
    text = Text()
    for mark, style, meaning in entries:
        text.append(f"{mark} ", style)
        text.append(f"{meaning}   ", SOFT)
    return text
