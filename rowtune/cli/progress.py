"""What live displays share; the search's is in search_display.py, training's in train_display.py."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import RenderableType
from rich.live import Live

from rowtune.cli.screen import GOOD, SOFT, Screen

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
