"""The live display of a search: the front so far, what is being measured and why, and time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rowtune.cli.charts import gauge
from rowtune.cli.progress import STATUS_STYLE, Shown
from rowtune.cli.screen import ACCENT, BAD, GOOD, SOFT, Screen, plain_table
from rowtune.cli.train_display import clock
from rowtune.report.words import policies

if TYPE_CHECKING:
    from rowtune.tune.records import Record
    from rowtune.tune.task import Progress

FRONT, LAST = 8, 3
"""Points of the front and trials that are shown."""


class SearchDisplay(Shown):
    """The front, the last trials, and what runs now; elsewhere than on a terminal a line for each trial."""

    def __init__(self, screen: Screen, limit: int) -> None:
        super().__init__(screen)
        self.limit = limit
        self.rows: list[tuple[int, Record]] = []
        self.rejected = 0
        self.now: Progress | None = None
        self.why = ""

    def update(self, progress: Progress) -> None:
        why, self.why = self.why, progress.why
        self.now = progress
        record = progress.record
        if record is None:
            return
        if record.status == "rejected":
            self.rejected += 1
            return
        self.rows.append((progress.measured, record))
        if self.live is None:
            self.screen.err.print(self._line(progress, record, why), soft_wrap=True)

    def _line(self, now: Progress, record: Record, why: str) -> Text:
        head = f"trial {now.measured}/{now.trials}" if record.decisions else "plain"
        status, text = self._verdict(record)
        best = now.best is not None and now.best.digest == record.digest
        end = Text.assemble(("  best so far" if best else "", GOOD), (f"  ({why})" if why else "", SOFT))
        line = Text.assemble(f"{head}  {policies(record.decisions)}  ", (text, STATUS_STYLE.get(status, BAD)))
        return Text.assemble(line, end)

    def _verdict(self, record: Record) -> tuple[str, str]:
        from rowtune.tune.sizes import format_bytes, format_seconds

        if not record.ok:
            return record.status, f"{record.status}: {record.reason}"
        over = (record.peak_bytes or 0) > self.limit
        size, time = format_bytes(record.peak_bytes), format_seconds(record.step_seconds)
        return ("over" if over else "ok"), f"{size}, {time}" + (" over budget" if over else "")

    def render(self) -> RenderableType:
        if self.now is None:
            return Text("starting the worker ...", SOFT)
        parts: list[RenderableType] = [self._front(self.now), Text()] if self.now.front else []
        parts += [self._last(), Text()] if self.rows else []
        return Group(*parts, *self._running(self.now), self._bar(self.now), self._best(self.now))

    def _front(self, now: Progress) -> Table:
        """Of all that was measured what nothing beats in both memory and time, the smallest first; of many
        those next to the budget."""
        from rowtune.tune.sizes import format_bytes, format_seconds

        table = plain_table(
            ("", "left"), ("front", "left"), ("peak", "right"), ("step", "right"), ("of plain's", "right")
        )
        inside = sum((r.peak_bytes or 0) <= self.limit for r in now.front)
        first = max(0, min(inside - FRONT // 2, len(now.front) - FRONT))
        for record in now.front[first : first + FRONT]:
            best = now.best is not None and record.digest == now.best.digest
            style = GOOD if best else SOFT if (record.peak_bytes or 0) > self.limit else ""
            table.add_row(
                "★" if best else "", policies(record.decisions), format_bytes(record.peak_bytes),
                format_seconds(record.step_seconds), _of_plain(record, now.plain), style=style,
            )  # fmt: skip
        return table

    def _last(self) -> Table:
        table = plain_table(("trial", "right"), ("plan", "left"), ("result", "left"))
        for number, record in self.rows[-LAST:]:
            status, text = self._verdict(record)
            final = record.effort != "quick"
            label = "final" if final and record.decisions else str(number) if record.decisions else "plain"
            table.add_row(label, policies(record.decisions), Text(text, STATUS_STYLE.get(status, BAD)))
        return table

    def _running(self, now: Progress) -> list[Text]:
        """What runs now, and why."""
        if not now.running:
            return []
        if now.decisions is None:
            return [Text.assemble(("now  ", SOFT), (now.running, ACCENT))]
        plan = Text.assemble(("now  ", SOFT), (policies(now.decisions), ACCENT), (f"  {now.running}", SOFT))
        return [plan, Text(f"     {now.why}", SOFT)]

    def _bar(self, now: Progress) -> Table:
        grid = Table.grid(padding=(0, 2))
        count = f"{now.measured}/{now.trials} trials"
        left = "" if now.left is None else f"at most {clock(now.left)} left"
        more = f"{self.rejected} rejected unrun" if self.rejected else ""
        bar = ProgressBar(total=now.trials, completed=now.measured, width=24)
        grid.add_row(bar, count, clock(now.seconds), left, Text(more, SOFT))
        return grid

    def _best(self, now: Progress) -> RenderableType:
        from rowtune.tune.sizes import format_bytes, format_seconds

        if now.best is None:
            return Text(f"nothing fits {format_bytes(self.limit)} yet", SOFT)
        peak = now.best.peak_bytes or 0
        text = f"  {format_bytes(peak)} of {format_bytes(self.limit)}, "
        text += f"{format_seconds(now.best.step_seconds)} a step"
        return Text.assemble(gauge(peak, self.limit), text, ("  best so far", SOFT))


def _of_plain(record: Record, plain: Record | None) -> str:
    if plain is None or not plain.ok:
        return ""
    size = (record.peak_bytes or 0) / (plain.peak_bytes or 1)
    time = (record.step_seconds or 0.0) / (plain.step_seconds or 1.0)
    return f"{size:.0%}, {time:.2f}x"
