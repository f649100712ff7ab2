"""The exact programme: the fastest sequence of options under a limit, a shortest path over (cut, bytes kept).

Exact with respect to the table. An option is allowed where what segments before it have left, and what it
takes itself going forward and going back, with the gradients of all later parameters, is within the limit.
A search asks for hundreds of paths, so all states at a cut go through all options that leave it at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rowtune.cost.leaving import After, Held, Ints
from rowtune.cost.table import Option, Restriction, Table
from rowtune.plan.plan import Plan

MOST_STATES = 256
"""States kept at a cut: more differ by next to nothing."""


class Path(NamedTuple):
    """Options from the first cut to the last."""

    seconds: float
    peak: int
    options: tuple[Option, ...]


class _States(NamedTuple):
    """Ways to reach a cut. By way: bytes that options up to it left for backward, seconds, the peak so far,
    bytes on the host, the number of the state before (of those that were kept, in the order of the cuts), and
    the last option's place among those that leave its cut."""

    kept: Ints
    seconds: NDArray[np.float64]
    peak: Ints
    host: Ints
    before: Ints
    option: Ints

    def at(self, chosen: Any) -> _States:
        """Those that an index array or a slice says."""
        kept, seconds, peak, host, before, option = (column[chosen] for column in self)
        return _States(kept, seconds, peak, host, before, option)


def fastest(table: Table, limit: int, allowed: Restriction = lambda _: True) -> Path | None:
    """The fastest path whose peak, parameters and optimizer's state apart, is at most `limit`, and that keeps
    no more on the host than plans of the table may; None where there is none."""
    last, leaving = len(table.cuts) - 1, table.leaving
    nought = np.zeros(1, np.int64)
    start = _States(nought, np.zeros(1), nought, nought, nought, nought)
    arrived: list[dict[Held, list[_States]]] = [{} for _ in table.cuts]
    arrived[0][frozenset()] = [start]
    trail: list[tuple[int, _States]] = []
    count = 0
    for cut in range(last):
        if not arrived[cut]:
            continue
        may = np.fromiter((allowed(o) for o in leaving[cut].options), np.bool_)
        for held, states in _undominated(arrived[cut]).items():
            trail.append((cut, states))
            after = leaving[cut].after(held)
            _leave(states, after, may[after.order], (limit, table.host_bytes), count, arrived)
            count += len(states.kept)
    ended = [_joined(group) for group in arrived[last].values()]
    best = min(ended, key=lambda states: float(states.seconds.min()), default=None)
    return None if best is None else _path(table, best.at([int(best.seconds.argmin())]), trail)


def _leave(
    states: _States,
    after: After,
    may: NDArray[np.bool_],
    limits: tuple[int, int],
    count: int,
    arrived: list[dict[Held, list[_States]]],
) -> None:
    """Add the states that these lead to within the limits, of the device and of the host; `count` were kept
    before them."""
    base = states.kept - after.held_bytes
    peak = np.maximum(base + after.most[:, None], states.peak)
    host = states.host + after.host[:, None]
    option, at = np.nonzero((peak <= limits[0]) & (host <= limits[1]) & may[:, None])
    found = _States(
        states.kept[at] + after.kept[option],
        states.seconds[at] + after.seconds[option],
        peak[option, at],
        host[option, at],
        at + count,
        after.order[option],
    )
    for way in after.ways:
        first, stop = np.searchsorted(option, (way.first, way.stop))
        if first < stop:
            arrived[way.cut].setdefault(way.held, []).append(found.at(slice(first, stop)))


def _undominated(arrived: dict[Held, list[_States]]) -> dict[Held, _States]:
    """States that no other with the same tensors held beats in bytes, seconds and bytes on the host, thinned
    out where there are many."""
    kept: dict[Held, _States] = {}
    for held, parts in arrived.items():
        states = _joined(parts)
        states = states.at(np.lexsort((states.host, states.seconds, states.kept)))
        kept[held] = states.at(np.flatnonzero(_better(states)))
    many = sum(len(states.kept) for states in kept.values())
    if many <= MOST_STATES:
        return kept
    return {held: _thinned(states, MOST_STATES / many) for held, states in kept.items()}


def _better(states: _States) -> NDArray[np.bool_]:
    """Whether no state before one, of those by increasing bytes, takes as little of all the rest."""
    if not states.host.any():
        least = np.minimum.accumulate(states.seconds)
        return np.concatenate(([True], states.seconds[1:] < least[:-1]))
    found = np.zeros(len(states.seconds), np.bool_)
    best: list[tuple[float, int]] = []
    for i, (seconds, host) in enumerate(zip(states.seconds.tolist(), states.host.tolist(), strict=True)):
        found[i] = not any(s <= seconds and h <= host for s, h in best)
        if found[i]:
            best = [*((s, h) for s, h in best if s < seconds or h < host), (seconds, host)]
    return found


def _thinned(states: _States, share: float) -> _States:
    """A share of them, the first and the last among these."""
    many = len(states.kept)
    left = max(round(share * many), min(many, 2))
    return states.at(np.linspace(0, many - 1, left).round().astype(np.int64))


def _joined(parts: list[_States]) -> _States:
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    kept, seconds, peak, host, before, option = columns
    return _States(kept, seconds, peak, host, before, option)


def _path(table: Table, end: _States, trail: list[tuple[int, _States]]) -> Path:
    """Back from the one state at the end."""
    firsts = np.cumsum([0] + [len(states.kept) for _, states in trail])
    options: list[Option] = []
    option, before = int(end.option[0]), int(end.before[0])
    while True:
        at = int(np.searchsorted(firsts, before, "right")) - 1
        cut, states = trail[at]
        options.append(table.leaving[cut].options[option])
        if cut == 0:
            break
        here = before - int(firsts[at])
        option, before = int(states.option[here]), int(states.before[here])
    return Path(float(end.seconds[0]), int(end.peak[0]), tuple(reversed(options)))


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
