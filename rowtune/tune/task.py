"""What a search is given, what it says while it runs, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from rowtune.plan.plan import Plan
from rowtune.tune.measurement import Contender, Effort, Measurement, Timing
from rowtune.tune.records import Record, RecordFile
from rowtune.tune.shared import Shared


class Space(Protocol):
    """A fixed tuple of categorical knobs, and the plan that their values stand for."""

    @property
    def knobs(self) -> Sequence[Any]: ...

    def plan(self, values: dict[str, Any]) -> Plan: ...

    def guesses(self) -> Sequence[dict[str, Any]]: ...


class Costs(Protocol):
    @property
    def peak_bytes(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def peak_at(self) -> str: ...

    @property
    def program(self) -> str: ...


class Situation(NamedTuple):
    """How far a search is: the largest predicted peak that will fit, what was measured, seconds left."""

    most: float
    plain: Record | None
    records: Sequence[Record]
    left: float


@dataclass(frozen=True)
class Progress:
    """Shown while searching: after each trial, and (record None) when something begins to run: `running` says
    what is expected of it, `decisions` are its plan's, `why` is what is asked of it. `front` is the Pareto
    set of all that was measured so far; `left` the seconds that trials may still take, None where unknown."""

    measured: int
    trials: int
    seconds: float
    record: Record | None
    best: Record | None
    running: str = ""
    front: tuple[Record, ...] = ()
    plain: Record | None = None
    decisions: Mapping[str, Any] | None = None
    why: str = ""
    left: float | None = None


@dataclass(frozen=True)
class Task:
    """All that a search needs. `limit` is the budget in bytes less the `reserve`; `trials` counts plans
    measured in the whole study, earlier runs of it included. `measure` is told which step time is worth more
    than one step. `race` times plans that take turns; `threads` are other numbers of threads worth a try.
    `may` says which plans, measured in an earlier search, may win this one; `inherited` are those that were
    measured in another study, by digest, and are no trials of this one.
    `shared` is where other processes work on the same study; `started` is called when they may begin, `ended`
    when there is nothing left for them to do.
    `tell` is told how far the search is before the first plan is asked for and after each measurement, and
    says whether settings may stand for other plans now. `least` is the plan that is predicted to take least:
    it is tried before a search says that none fits."""

    space: Space
    predict: Callable[[Plan], Costs]
    measure: Callable[[Plan | None, Effort, float, float], Measurement]
    records: RecordFile
    limit: int
    reserve: int = 0
    overhead: Callable[[], int] = lambda: 0
    race: Callable[[Sequence[Contender], int, float], list[Timing | None]] | None = None
    threads: tuple[int, ...] = ()
    trials: int = 40
    timeout: float = math.inf
    trial_timeout: float = 1800.0
    seed: int = 0
    may: Callable[[Plan], bool] = lambda _: True
    inherited: frozenset[str] = frozenset()
    shared: Shared | None = None
    started: Callable[[], None] = lambda: None
    ended: Callable[[], None] = lambda: None
    tell: Callable[[Situation], bool] = field(default=lambda _: False)
    least: Callable[[], Plan] | None = None
    progress: Callable[[Progress], None] = field(default=lambda _: None)


@dataclass(frozen=True)
class SearchResult:
    """The winner and the evidence. `plain` is None where plain PyTorch could not be measured."""

    best: Record
    front: tuple[Record, ...]
    plain: Record | None
    records: tuple[Record, ...]
    measured: int
    interrupted: bool = False
