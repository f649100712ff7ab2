"""The exact programme: the fastest sequence of options under a limit, a shortest path over (cut, bytes kept).

Exact with respect to the table. An option is allowed where what segments before it have left, and what it
takes itself going forward and going back, with the gradients of all later parameters, is within the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rowtune.cost.table import Option, Restriction, Table
from rowtune.plan.plan import Plan

MOST_STATES = 96
"""States kept at a cut: more differ by next to nothing."""


class Path(NamedTuple):
    """Options from the first cut to the last."""

    seconds: float
    peak: int
    options: tuple[Option, ...]


class _State(NamedTuple):
    """How a cut was reached: bytes that options up to it left for backward, those tensors among them that
    cross the cut with their bytes, seconds, the peak so far, and the last option; `host` are bytes there."""

    kept: int
    held: frozenset[str]
    held_bytes: int
    seconds: float
    peak: int
    option: Option | None
    before: _State | None
    host: int = 0


def fastest(table: Table, limit: int, allowed: Restriction = lambda _: True) -> Path | None:
    """The fastest path whose peak, parameters and optimizer's state apart, is at most `limit`, and that keeps
    no more on the host than plans of the table may; None where there is none."""
    last = len(table.cuts) - 1
    leaving: list[list[Option]] = [[] for _ in table.cuts]
    for option in table.options:
        if allowed(option):
            leaving[option.start].append(option)
    states: list[list[_State]] = [[] for _ in table.cuts]
    states[0] = [_State(0, frozenset(), 0, 0.0, 0, None, None)]
    for cut in range(last):
        reached = _undominated(states[cut])
        for option in leaving[cut] if reached else ():
            step = _Step(table, option)
            for state in reached:
                at = step.after(state)
                if at.peak <= limit and at.host <= table.host_bytes:
                    states[option.stop].append(at)
    ended = min(states[last], key=lambda s: s.seconds, default=None)
    return None if ended is None else _path(ended)


class _Step:
    """An option, as far as it is the same for all states."""

    def __init__(self, table: Table, option: Option) -> None:
        self.option, self.seconds = option, table.seconds(option)
        self.entering = table.crossing(option.start)
        self.later = table.later_gradients[option.stop]
        self.leaving = frozenset(table.crossers(option.stop))
        self.passing = self.leaving & frozenset(table.crossers(option.start))
        self.sizes = table.sizes

    def after(self, state: _State) -> _State:
        """What is left once the option has run, after what was left before."""
        option = self.option
        base = state.kept - state.held_bytes
        forward = option.forward.given(state.held_bytes, self.entering)
        backward = option.backward.given(state.held_bytes, self.entering) + self.later
        fresh = [(name, size) for name, size in option.holds if name not in state.held]
        held = (state.held & self.passing) | {name for name, _ in option.holds if name in self.leaving}
        kept = state.kept + option.kept + sum(size for _, size in fresh)
        held_bytes = sum(self.sizes[name] for name in held)
        peak = max(state.peak, base + forward, base + backward)
        seconds, host = state.seconds + self.seconds, state.host + option.host_bytes
        return _State(kept, held, held_bytes, seconds, peak, option, state, host)


def smallest(table: Table, allowed: Restriction = lambda _: True) -> int | None:
    """The least limit under which there is a path."""
    most = sum(max(*o.forward, *o.backward) for o in table.options) + table.later_gradients[0]
    if fastest(table, most, allowed) is None:
        return None
    low, high = 0, most
    while high - low > max(high // 500, 1):
        middle = (low + high) // 2
        found = fastest(table, middle, allowed)
        low, high = (middle, high) if found is None else (low, found.peak)
    return high


def plan_of(table: Table, path: Path) -> Plan:
    """Neighbours that are kept stay segments of their own: a segment holds what it reads until its end."""
    return table.plan([s for option in path.options for s in option.segments])


def _undominated(states: Sequence[_State]) -> list[_State]:
    """States that no other with the same tensors held beats in bytes, seconds and bytes on the host, thinned
    out where there are many."""
    best: dict[frozenset[str], list[tuple[float, int]]] = {}
    kept: list[_State] = []
    for state in sorted(states, key=lambda s: (s.kept, s.seconds, s.host)):
        seen = best.setdefault(state.held, [])
        if not any(seconds <= state.seconds and host <= state.host for seconds, host in seen):
            seen[:] = [(s, h) for s, h in seen if s < state.seconds or h < state.host]
            seen.append((state.seconds, state.host))
            kept.append(state)
    if len(kept) <= MOST_STATES:
        return kept
    step = (len(kept) - 1) / (MOST_STATES - 1)
    return [kept[round(i * step)] for i in range(MOST_STATES)]


def _path(state: _State) -> Path:
    options = []
    at: _State | None = state
    while at is not None and at.option is not None:
        options.append(at.option)
        at = at.before
    return Path(state.seconds, state.peak, tuple(reversed(options)))
