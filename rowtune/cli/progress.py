"""Live displays: something on a terminal, and the search. Training is in train_display.py."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rowtune.cli.charts import gauge
from rowtune.cli.screen import BAD, GOOD, SOFT, Screen, plain_table
from rowtune.report.words import policies

if TYPE_CHECKING:
    from rowtune.tune.records import Record
    from rowtune.tune.task import Progress

STATUS_STYLE = {"ok": GOOD, "over": "yellow", "slow": SOFT, "rejected": SOFT}


class Shown:
    """Something live on a terminal, or a line at a time elsewhere."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.live: Live | None = None

    def __enter__(self) -> Any:
        if self.screen.err.is_terminal and not self.screen.quiet:
            self.live = Live(console=self.screen.err, refresh_per_second=8, get_renderable=self.render)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def render(self) -> RenderableType:
        raise NotImplementedError


class SearchDisplay(Shown):
    """Trials as they end, the best so far, and its peak against the budget."""

    def __init__(self, screen: Screen, limit: int) -> None:
        super().__init__(screen)
        self.limit = limit
        self.rows: list[tuple[int, Record]] = []
        self.rejected = 0
        self.now: Progress | None = None

    def update(self, progress: Progress) -> None:
        self.now = progress
        record = progress.record
        if record is None:
            return
        if record.status == "rejected":
            self.rejected += 1
            return
        self.rows.append((progress.measured, record))
        if self.live is None:
            self.screen.err.print(self._line(progress.measured, progress.trials, record), soft_wrap=True)

    def _line(self, number: int, trials: int, record: Record) -> Text:
        head = f"trial {number}/{trials}" if record.decisions else "plain"
        status, text = self._verdict(record)
        return Text.assemble(f"{head}  {policies(record.decisions)}  ", (text, STATUS_STYLE.get(status, BAD)))

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
        table = plain_table(("trial", "right"), ("plan", "left"), ("result", "left"))
        for number, record in self.rows[-8:]:
            status, text = self._verdict(record)
            final = record.effort != "quick"
            label = "final" if final and record.decisions else str(number) if record.decisions else "plain"
            table.add_row(label, policies(record.decisions), Text(text, STATUS_STYLE.get(status, BAD)))
        return Group(table, Text(), self._bar(self.now), self._best(self.now))

    def _bar(self, now: Progress) -> Table:
        grid = Table.grid(padding=(0, 2))
        count = f"{now.measured}/{now.trials} trials"
        more = f"{self.rejected} rejected unrun" if self.rejected else ""
        bar = ProgressBar(total=now.trials, completed=now.measured, width=24)
        grid.add_row(bar, count, f"{now.seconds:.0f} s", Text(more, SOFT), Text(now.running, SOFT))
        return grid

    def _best(self, now: Progress) -> RenderableType:
        from rowtune.tune.sizes import format_bytes, format_seconds

        if now.best is None:
            return Text(f"nothing fits {format_bytes(self.limit)} yet", SOFT)
        peak = now.best.peak_bytes or 0
        text = f"  {format_bytes(peak)} of {format_bytes(self.limit)}, "
        text += f"{format_seconds(now.best.step_seconds)} a step"
        return Text.assemble(gauge(peak, self.limit), text, ("  best so far", SOFT))
