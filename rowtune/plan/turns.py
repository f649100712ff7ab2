"""Where the steps of a schedule repeat themselves: bands that do what the band before did, some rows further
down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rowtune.plan.program import Back, Banded, Drop, Piece, Replay, Run, Step

MOST_TRIED = 64
"""Lengths of a turn. A group may have several steps in a band, and where strides and bands do not divide each
other several bands are alike only together."""


class Turns(NamedTuple):
    """`times` turns of `length` steps each, from step `start` on; in each of them rows of a value lie `shift`
    rows further down than in the one before. `first` is the first step that is about a piece."""

    start: int
    length: int
    times: int
    shift: dict[str, int]
    first: dict[int, int]


def turns_of(program: Banded, steps: tuple[Step, ...]) -> Turns | None:
    """Worked out once for each program; None where bands are too few or differ."""
    cached: dict[int, Turns | None] = program.__dict__.setdefault("_turns", {})
    if id(steps) not in cached:
        cached[id(steps)] = _found(program.pieces, steps)
    return cached[id(steps)]


def _found(pieces: Sequence[Piece], steps: Sequence[Step]) -> Turns | None:
    middle = len(steps) // 3
    for length in _lengths(pieces, steps, middle):
        shift: dict[str, int] = {}
        if not all(_moved(pieces, steps, i, length, shift) for i in range(middle, middle + length)):
            continue
        if not any(shift.values()):
            continue
        start, stop = middle, middle + length
        while start > 0 and _moved(pieces, steps, start - 1, length, shift):
            start -= 1
        while stop + length < len(steps) and _moved(pieces, steps, stop, length, shift):
            stop += 1
        times = (stop - start) // length + 1
        if times > 3 and 4 * times * length > len(steps):  # not some steps alike within a band
            return Turns(start, length, times, shift, _first_steps(steps))
    return None


def _lengths(pieces: Sequence[Piece], steps: Sequence[Step], middle: int) -> Iterator[int]:
    """Steps after which the step in the middle comes again, for another piece of its group."""
    if not steps or (kind := _kind(pieces, steps[middle])) is None:
        return
    left = MOST_TRIED
    for length in range(1, (len(steps) - middle) // 2 + 1):
        if _kind(pieces, steps[middle + length]) == kind:
            yield length
            left -= 1
            if not left:
                return


def _kind(pieces: Sequence[Piece], step: Step) -> object:
    """What a step does, but for its rows; None where it is not for every band alike."""
    if isinstance(step, Run | Replay | Back):
        return type(step), pieces[step.piece].group, type(step) is Run and step.tape
    return (Drop, step.value) if type(step) is Drop else None


def _moved(pieces: Sequence[Piece], steps: Sequence[Step], at: int, by: int, shift: dict[str, int]) -> bool:
    """Whether a step does what another did, on rows further down; those of a value that was not met before
    say how far."""
    a, b = steps[at], steps[at + by]
    kind = _kind(pieces, a)
    if kind is None or kind != _kind(pieces, b):
        return False
    if type(a) is Drop and type(b) is Drop:
        return shift.setdefault(a.value, b.below - a.below) == b.below - a.below
    assert isinstance(a, Run | Replay | Back) and isinstance(b, Run | Replay | Back)
    one, other = pieces[a.piece], pieces[b.piece]
    if len(one.ranges) != len(other.ranges) or len(one.outputs) != len(other.outputs):
        return False
    pairs = [(n, rows, other.ranges.get(n)) for n, rows in one.ranges.items()]
    made = zip(one.outputs, other.outputs, strict=True)
    pairs += [(n, rows, r if n == m else None) for (n, rows), (m, r) in made]
    for name, rows, later in pairs:
        if later is None:
            return False
        shifted = shift.setdefault(name, later.lo - rows.lo)
        if (later.lo - rows.lo, later.hi - rows.hi) != (shifted, shifted):
            return False
    return True


def _first_steps(steps: Sequence[Step]) -> dict[int, int]:
    found: dict[int, int] = {}
    for at, step in enumerate(steps):
        if isinstance(step, Run | Replay | Back):
            found.setdefault(step.piece, at)
    return found
