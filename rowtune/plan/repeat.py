"""A schedule of a shortened image, and the steps in it that stand for all those left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from rowtune.plan.groups import Group, make_group
from rowtune.plan.program import Back, Drop, Piece, Repeat, Replay, Run, Stash, Step
from rowtune.plan.schedules import SCHEDULES
from rowtune.plan.schedules.schedule import Request, Schedule
from rowtune.plan.shorten import Ratios, banded_reads, period_of, ratios, without
from rowtune.rows import Affine, Rows


def shortened(halo: str, ask: Request) -> Schedule:
    """Schedules a segment on as few bands as show all that happens."""
    whole = make_group(ask.graph, ask.bands, ask.part.nodes, ask.outputs)
    top = max(ask.outputs, key=lambda o: whole.heights[o])
    found = ratios(ask.bands, ask.part, {o: whole.heights[o] for o in (top, *ask.outputs)}, top)
    if found is not None and _proportional(whole, ask.outputs, found, top):
        period = period_of(found, ask.band_rows)
        rows = _first_guess(whole, found, top, period, ask, halo)
        while (more := (whole.heights[top] - rows) // period) > 1:
            short = _try(halo, ask, found, top, period, more)
            if short is not None:
                return short
            rows += max(rows // 2, period)
    made = SCHEDULES[halo](ask)
    made.sketch = True
    return made


def _try(halo: str, ask: Request, found: Ratios, top: str, period: int, more: int) -> Schedule | None:
    removed = {name: int(period * more * r) for name, r in found.items()}
    bands = without(ask.graph, ask.bands, ask.part, removed)
    if bands is None:
        return None
    made = SCHEDULES[halo](replace(ask, bands=bands))
    shift = {name: int(period * r) for name, r in found.items()}
    made.repeat, made.sketch = _repeat(made, top, shift, more, halo), True
    return made if made.repeat is not None else None


def _proportional(whole: Group, outputs: tuple[str, ...], found: Ratios, top: str) -> bool:
    """Whether outputs advance at the rates at which they read: else bands drift apart, and none are alike."""
    return all(o in found and found[o] * whole.heights[top] == whole.heights[o] for o in outputs)


def _first_guess(whole: Group, found: Ratios, top: str, period: int, ask: Request, halo: str) -> int:
    """Rows of `top` that probably suffice: those that the first layer runs ahead, and a sweep's backward
    stays behind, a few times."""
    middle = whole.heights[top] // 2
    rows = {o: Rows(int(middle * found[o]), int(middle * found[o]) + 1) for o in ask.outputs}
    ahead = behind = 0
    for name, got in whole.ranges(rows).items():
        if name in found:
            ahead = max(ahead, int(got.hi / found[name]) - middle)
            behind = max(behind, middle - int(got.lo / found[name]))
    reach = ahead + behind
    if halo == "sweep":
        reach *= 2
        if ask.decision.tapes == "whole":  # each layer waits for a band of its own
            reach += ask.band_rows * _overlapping(ask)
    return reach + 3 * period + 2 * ask.band_rows


def _overlapping(ask: Request) -> int:
    """Nodes that read rows more than once."""
    windows = [r.window for node in ask.part.nodes for _, r in banded_reads(ask.bands, node.name)]
    return sum(not (isinstance(w, Affine) and w.disjoint) for w in windows)


# -- one period ----------------------------------------------------------------------------------------------


def _repeat(made: Schedule, top: str, shift: dict[str, int], more: int, halo: str) -> Repeat | None:
    forward = _period(made, made.forward, top, shift)
    backward = _period(made, made.backward, top, shift) if halo == "sweep" else forward
    if forward is None or backward is None:
        return None
    # Except in a sweep, backward runs the pieces of forward again.
    pieces = _first_run(made.forward, *forward)
    if halo == "sweep":
        pieces |= _first_run(made.backward, *backward)
    stashes = None
    if halo == "cache":
        before = [[s.band for s in made.forward[:at] if type(s) is Stash] for at in forward]
        if not before[0]:
            return None
        stashes = before[0][-1], before[1][-1]
    return Repeat(more, frozenset(pieces), stashes)


def _first_run(steps: Sequence[Step], start: int, stop: int) -> set[int]:
    """Pieces that run between two positions and not before."""
    before, here = (
        {step.piece for step in part if isinstance(step, Run | Replay)}
        for part in (steps[:start], steps[start:stop])
    )
    return here - before


class _State(NamedTuple):
    """Before a step: the last piece of each group, forward and replayed, and those whose rows are alive."""

    at: int
    last: dict[tuple[int, bool], int]
    waiting: dict[int, tuple[int, ...]]


def _period(made: Schedule, steps: list[Step], top: str, shift: dict[str, int]) -> tuple[int, int] | None:
    """Positions of two steps between which every group makes (and in a sweep gives back) one period."""
    states = _states(made, steps, top)
    moved = _moved(shift)
    alike = (
        (early.at, late.at)
        for row, late in reversed(states.items())
        if (early := states.get(row - shift[top])) is not None and _alike(made, early, late, moved)
    )
    if not any(type(step) is Stash for step in steps):
        return next(alike, None)
    # One from the middle: stashes that are left out stay alive while the bands below go back, and line
    # buffers hold rows of earlier pieces than the last.
    found = list(alike)
    return found[len(found) // 2] if found else None


def _states(made: Schedule, steps: list[Step], top: str) -> dict[int, _State]:
    """By the first row of the piece of `top` that is about to run."""
    backed = {step.piece for step in steps if type(step) is Back}
    maker = {o: i for i, group in enumerate(made.groups) for o in group.outputs}
    last: dict[tuple[int, bool], int] = {}
    waiting: dict[int, list[int]] = {}
    seen: set[int] = set()
    found: dict[int, _State] = {}
    for at, step in enumerate(steps):
        if type(step) is Back:
            waiting[made.pieces[step.piece].group].remove(step.piece)
        elif type(step) is Drop and backed:
            alive = waiting[maker[step.value]]
            alive[:] = [p for p in alive if dict(made.pieces[p].outputs)[step.value].hi > step.below]
        elif isinstance(step, Run | Replay) and step.piece not in seen:
            seen.add(step.piece)
            piece = made.pieces[step.piece]
            rows = dict(piece.outputs).get(top)
            if rows is not None and type(step) is Run:
                now = {g: tuple(w) for g, w in waiting.items()}
                found[rows.lo] = _State(at, dict(last), now)
            last[piece.group, type(step) is Run] = step.piece
            if backed:
                waiting.setdefault(piece.group, []).append(step.piece)
    return found


def _alike(made: Schedule, early: _State, late: _State, moved: Callable[[Piece, Piece], bool]) -> bool:
    """Whether `late` is `early` a period further down, with every group at work."""
    if len({g for g, _ in early.last}) < len(made.groups):
        return False
    if early.last.keys() != late.last.keys() or early.waiting.keys() != late.waiting.keys():
        return False
    pairs = [(early.last[g], late.last[g]) for g in early.last]
    for group, pieces in early.waiting.items():
        if len(pieces) != len(late.waiting[group]):
            return False
        pairs += zip(pieces, late.waiting[group], strict=True)
    return all(moved(made.pieces[a], made.pieces[b]) for a, b in pairs)


def _moved(shift: dict[str, int]) -> Callable[[Piece, Piece], bool]:
    def moved(a: Piece, b: Piece) -> bool:
        for name, rows in a.ranges.items():
            other, by = b.ranges.get(name), shift.get(name, 0)
            if other is None or (other.lo - rows.lo, other.hi - rows.hi) != (by, by):
                return False
        return len(a.ranges) == len(b.ranges)

    return moved
