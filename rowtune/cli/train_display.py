"""The live display of training: how far, how well, how fast, and how much of the budget."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rowtune.cli.charts import gauge
from rowtune.cli.progress import Shown
from rowtune.cli.screen import ACCENT, BAD, SOFT, Screen

if TYPE_CHECKING:
    from rowtune.train.options import Report, StepReport, ValReport

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 48, 4
STOPPING = "stopping after this step; once more stops at once, without a checkpoint"


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve in one line: means of as many stretches as there are cells, from the lowest to the highest."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    cells = min(width, len(finite))
    ends = [round(i * len(finite) / cells) for i in range(cells + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    low, high = min(means), max(means)
    if high == low:
        return BLOCKS[3] * cells
    return "".join(BLOCKS[min(7, int((m - low) / (high - low) * 8))] for m in means)


DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a braille cell: its left column and its right one, from the top."""


def curve(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """A line through (x from 0 to 1, y) in braille dots, `height` lines of `width` cells: the mean of what
    falls on a column of dots, joined to its neighbours."""
    columns: dict[int, list[float]] = {}
    for x, y in points:
        if math.isfinite(y):
            columns.setdefault(min(2 * width - 1, max(0, int(x * 2 * width))), []).append(y)
    cells = [[0] * width for _ in range(height)]
    if not columns:
        return [" " * width] * height
    means = {x: sum(ys) / len(ys) for x, ys in sorted(columns.items())}
    low, high = min(means.values()), max(means.values())
    scale = (4 * height - 1) / (high - low) if high > low else 0.0
    rows = {x: round((high - y) * scale) if scale else 2 * height for x, y in means.items()}
    for (x, row), (to, goal) in itertools.pairwise([*rows.items(), list(rows.items())[-1]]):
        last = row
        for at in range(x, max(to, x + 1)):
            now = round(row + (goal - row) * (at - x) / max(1, to - x))
            for dot in range(min(last, now), max(last, now) + 1):
                cells[dot // 4][at // 2] |= DOTS[at % 2][dot % 4]
            last = now
    return ["".join(chr(0x2800 + bits) if bits else " " for bits in line) for line in cells]


def scores(report: ValReport) -> str:
    """A validation's loss and metrics in a few words."""
    shown = [f"loss {report.loss:.5g}"]
    for name, value in report.metrics.items():
        text = f"{value:.2f} dB" if name == "psnr" else f"{value:.2%}"
        shown.append(f"{NAMES.get(name, name)} {text}")
    return ", ".join(shown)


NAMES = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "psnr": "PSNR"}


class TrainDisplay(Shown):
    """Steps, loss and validations as they come, and the peak against the budget."""

    def __init__(self, screen: Screen, limit: int) -> None:
        super().__init__(screen)
        self.limit = limit
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.now: StepReport | None = None
        self.error: float | None = None
        self.validations: list[ValReport] = []
        self.began = time.monotonic()
        self.rates: list[float] = []
        self.before = 0
        self.stopping = False
        self.changed: Text | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.transient = self.now is None  # nothing was shown that is worth keeping
        super().__exit__(kind, error, trace)

    def update(self, report: Report) -> None:
        from rowtune.train.options import MadeExact, SteppedDown, StepReport, Stopping

        if isinstance(report, StepReport):
            self.before = self.before if self.losses else report.step - 1
            self.losses.append(report.loss)
            self.steps.append(report.step)
            self.rates = [*self.rates[-19:], report.images_per_second]
            self.now = report
            self.error = self.error if report.gradient_error is None else report.gradient_error
            line = self._line(report)
        elif isinstance(report, SteppedDown | MadeExact):
            line = Text(str(report))
            self.changed = line
        elif isinstance(report, Stopping):
            self.stopping = True
            line = Text(STOPPING)
        else:
            self.validations.append(report)
            line = Text(f"epoch {report.epoch}  validation: {scores(report)}")
        if self.live is None:
            with contextlib.suppress(RuntimeError):  # a signal came while another line was printed
                self.screen.err.print(line, soft_wrap=True)

    def _line(self, report: StepReport) -> Text:
        from rowtune.tune.sizes import format_bytes, format_seconds

        of = f"/{report.steps}" if report.steps else ""
        peak = f"  peak {format_bytes(report.peak_bytes)}" if report.peak_bytes else ""
        if report.gradient_error is not None:
            peak += f"  gradients off by {report.gradient_error:.2g}"
        return Text(
            f"step {report.step}{of}  loss {report.loss:.5g}  {format_seconds(report.seconds)}"
            f"  {report.images_per_second:.3g} images/s  lr {report.lr:.3g}{peak}"
        )

    def render(self) -> RenderableType:
        if self.now is None:
            return Text("first step ...", SOFT)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style=SOFT, no_wrap=True, min_width=7)
        grid.add_column(no_wrap=True)
        width = max(16, min(WIDTH, self.screen.err.width - 36))
        grid.add_row("steps", self._progress(self.now, width))
        grid.add_row("loss", self._curve(self.now, width))
        grid.add_row("speed", self._speed(self.now))
        grid.add_row("memory", self._memory(self.now, width))
        if self.changed is not None:
            grid.add_row("plan", Text(self.changed.plain, BAD, overflow="fold", no_wrap=False))
        if self.stopping:
            grid.add_row("", Text(STOPPING, BAD))
        if self.validations:
            grid.add_row("val", self._validation())
        return Group(Text(), grid)

    def _progress(self, now: StepReport, width: int) -> RenderableType:
        row = Table.grid(padding=(0, 2))
        count = f"{now.step}/{now.steps}" if now.steps else str(now.step)
        of = f"/{now.epochs}" if now.epochs else ""
        bar: RenderableType = ProgressBar(
            now.steps or 1, now.step if now.steps else 0, width, complete_style=ACCENT
        )
        row.add_row(bar, count, Text(f"epoch {now.epoch}{of}", SOFT), Text(self._left(now), SOFT))
        return row

    def _left(self, now: StepReport) -> str:
        """How long it will take, validations and checkpoints included, once there is something to go by."""
        here = now.step - self.before
        if not now.steps or here < 3:
            return ""
        return f"{clock((now.steps - now.step) * (time.monotonic() - self.began) / here)} left"

    def _curve(self, now: StepReport, width: int) -> Text:
        """The loss below the bar of the steps, and on the same scale; its range to the right."""
        first, last = self.before, now.steps or max(now.step, self.before + 1)
        points = [
            ((step - first - 1) / max(1, last - first), loss)
            for step, loss in zip(self.steps, self.losses, strict=True)
        ]
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        labels = [
            (f"{max(finite):.5g}" if finite else "", SOFT), (f"{now.loss:.5g}", "bold"), ("", ""),
            (f"{min(finite):.5g}" if finite else "", SOFT),
        ]  # fmt: skip
        text = Text(no_wrap=True)
        for i, (line, label) in enumerate(zip(curve(points, width, HEIGHT), labels, strict=True)):
            text.append("\n" if i else "").append(line, ACCENT).append("  ").append(*label)
        return text

    def _speed(self, now: StepReport) -> Text:
        from rowtune.tune.sizes import format_seconds

        rate = sum(self.rates) / len(self.rates)
        parts = [f"{rate:.3g} images/s", f"{format_seconds(now.seconds)} a step", f"lr {now.lr:.3g}"]
        if now.gradient_norm is not None:
            parts.append(f"gradient {now.gradient_norm:.3g}")
        if self.error is not None:
            parts.append(f"gradients off by {self.error:.2g}")
        return Text("   ".join(parts))

    def _memory(self, now: StepReport, width: int) -> Text:
        from rowtune.tune.sizes import format_bytes

        if now.peak_bytes is None:
            return Text(f"measured in the next step; budget {format_bytes(self.limit)}", SOFT)
        most = max([now.peak_bytes, *(v.peak_bytes or 0 for v in self.validations)])
        return Text.assemble(
            gauge(most, self.limit, width), f"  {format_bytes(most)} of {format_bytes(self.limit)}"
        )

    def _validation(self) -> Text:
        """The last one, and what the main metric was before."""
        last = self.validations[-1]
        main = next(iter(last.metrics), None)
        past = [v.metrics[main] if main else -v.loss for v in self.validations]
        text = Text(f"{scores(last)}")
        if len(past) > 1:
            text.append(f"  {sparkline(past, 16)}", ACCENT)
            best = max(range(len(past)), key=past.__getitem__)
            text.append(f"  best in epoch {self.validations[best].epoch}", SOFT)
        return text


def clock(seconds: float) -> str:
    """45 s, 3:07, 2:15:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
