"""What a search shows: the front, what is measured and why, and time left."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from test_tune_study import Bench, Space, task

from rowtune.cli.screen import Screen
from rowtune.cli.search_display import SearchDisplay
from rowtune.tune.study import search
from rowtune.tune.task import Progress
from rowtune.tune.telling import Pace, why


def shown(terminal: bool, **changes: Any) -> tuple[str, list[Progress], list[str]]:
    """What was printed, all progress, and the live display at each moment."""
    screen = Screen()
    out = io.StringIO()
    object.__setattr__(screen, "err", Console(file=out, force_terminal=terminal, width=130))
    said: list[Progress] = []
    frames: list[str] = []
    with SearchDisplay(screen, 50_000) as display:

        def update(progress: Progress) -> None:
            display.update(progress)
            said.append(progress)
            page = Console(file=io.StringIO(), width=130)
            page.print(display.render())
            frames.append(page.file.getvalue())  # type: ignore[attr-defined]

        search(task(Bench(), progress=update, **changes))
    return out.getvalue(), said, frames


def test_the_front_what_runs_and_why() -> None:
    _, said, frames = shown(True, trials=12)
    running = [(p, f) for p, f in zip(said, frames, strict=True) if p.decisions is not None]
    assert len(running) >= 12 and all(p.why and p.running.startswith("predicted ") for p, _ in running)
    for progress, frame in running:
        assert "now  rows" in frame and progress.why[:40] in frame
    last = frames[-1]
    fronts = [p.front for p in said if p.front]
    assert "front" in last and "★" in last and last.count("%, ") >= len(fronts[-1]) > 1
    for front in fronts:
        peaks, times = [r.peak_bytes or 0 for r in front], [r.step_seconds or 0 for r in front]
        assert peaks == sorted(peaks) and times == sorted(times, reverse=True)
    assert "over budget" not in last and "12/12 trials" in last


def test_plain_lines_where_there_is_no_terminal() -> None:
    text, _, _ = shown(False, trials=5)
    lines = text.splitlines()
    assert lines[0].startswith("plain  plain PyTorch  500 kB, 900 ms over budget")
    tried = [line for line in lines if line.startswith("trial ")]
    assert len(tried) == 6 and "best so far" in text and "(the best by prediction with a " in text
    assert "\x1b" not in text


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("rowtune.tune.telling.time.monotonic", lambda: clock[0])
    pace = Pace()
    assert pace.left(0, 10, float("inf")) is None and pace.left(0, 10, 60.0) == 60.0
    pace.begin(4)
    clock[0] += 20
    assert pace.left(5, 10, float("inf")) is None  # one trial says little
    assert pace.left(6, 10, float("inf")) == 40.0  # ten seconds each
    assert pace.left(6, 10, 15.0) == 15.0 and pace.left(12, 10, 15.0) == 0.0


def test_why() -> None:
    knobs = Space.knobs
    assert why({"a": 1, "b": 1, "halo": "sweep"}, knobs) == "the best plan by prediction"
    assert why({"a": 4, "b": 1, "halo": "cache"}, knobs) == "the best by prediction with a 4, halo cache"
