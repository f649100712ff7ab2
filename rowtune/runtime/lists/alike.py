"""Turns of a schedule that are alike: the same calls, on numbers that advance by a constant and on tensors
that are the same, or that were made as many turns ago."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rowtune.runtime.recording import At, Call, View


class NotAlike(Exception):
    """Turns of which one cannot stand for others."""


class Moving(NamedTuple):
    """A number among a call's arguments: that of the first turn, and by how much it grows."""

    start: int
    step: int


class Place(NamedTuple):
    """Where a view was first made: by output `out` of call `at` of a turn of a loop."""

    loop: int
    turn: int
    at: int
    out: int


class Earlier(NamedTuple):
    """Stands for a view that an earlier turn made, `age` turns ago."""

    age: int
    at: int
    out: int


class Places:
    """Where views were first made; None for those that no loop made."""

    def __init__(self) -> None:
        self.of: dict[int, Place | None] = {}

    def know(self, views: Iterable[int]) -> None:
        for view in views:
            self.of.setdefault(view, None)

    def add(self, calls: Iterable[Call]) -> None:
        """The next calls, in order."""
        for call in calls:
            for out, view in enumerate(call.makes):
                if view >= 0 and view not in self.of:
                    self.of[view] = None if call.turn is None else Place(*call.turn, out)


Calls = Mapping[int, Call]
"""Those of a turn, by number."""


def turn_of(call: Call) -> tuple[int, int] | None:
    return call.turn[:2] if call.turn is not None else None


@dataclass
class Alike:
    """The calls of a turn with a `Moving` for each number that advances and an `Earlier` for each view of an
    earlier turn; `still` are views that were there before and are the same in all turns."""

    calls: list[Call] = field(default_factory=list)
    still: set[int] = field(default_factory=set)
    ages: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def oldest(self) -> int:
        """Turns that what a turn makes is read after it, at most."""
        return max(self.ages.values(), default=0)


def alike(
    turns: Mapping[int, Calls], loop: int, turn: int, places: Places, views: Sequence[View], oldest: int = 0
) -> Alike:
    """What `turn` does, if the one before did the same.

    Args:
        oldest: so many turns before must have called the same. Turns that made what is read must anyway.

    Raises:
        NotAlike: they did not.
    """
    last, now = turns.get(turn - 1, {}), turns[turn]
    if last.keys() != now.keys() or not now:
        raise NotAlike
    matching = _Matching(loop, turn, places.of, views)
    found = matching.found
    found.calls = [matching.call(at, last[at], call) for at, call in now.items()]
    did = {at: call.op for at, call in now.items()}
    for t in range(turn - max(oldest, found.oldest), turn - 1):  # what they made is what later turns read
        if {at: call.op for at, call in turns[t].items()} != did:
            raise NotAlike
    return found


class _Matching:
    """Two turns in a row, call by call."""

    def __init__(
        self, loop: int, turn: int, places: Mapping[int, Place | None], views: Sequence[View]
    ) -> None:
        self.loop, self.turn, self.places, self.views = loop, turn, places, views
        self.found = Alike()
        self.numbers_move = True

    def call(self, at: int, a: Call, b: Call) -> Call:
        if a.op is not b.op or a.way != b.way or a.kwargs.keys() != b.kwargs.keys():
            raise NotAlike
        # What autograd runs knows rows from when its graph was made: they would be old after the loop.
        self.numbers_move = b.way == "forward"
        args = self._same(a.args, b.args)
        kwargs = {k: self._same(a.kwargs[k], b.kwargs[k]) for k in b.kwargs}
        if len(a.makes) != len(b.makes):
            raise NotAlike
        for out, (one, other) in enumerate(zip(a.makes, b.makes, strict=True)):
            self._made(at, out, one, other)
        return b._replace(args=args, kwargs=kwargs)

    def _made(self, at: int, out: int, a: int, b: int) -> None:
        new = [self.places.get(v) == (self.loop, t, at, out) for v, t in ((a, self.turn - 1), (b, self.turn))]
        if all(new):
            if self.views[a][2:] != self.views[b][2:]:
                raise NotAlike
        elif any(new):
            raise NotAlike
        elif max(a, b) >= 0:
            self._view(a, b)

    def _same(self, a: Any, b: Any) -> Any:
        if type(a) is not type(b):
            raise NotAlike
        if isinstance(b, At):
            return self._view(a.view, b.view)
        if isinstance(b, (list, tuple)):
            if len(a) != len(b):
                raise NotAlike
            return type(b)([self._same(*both) for both in zip(a, b, strict=True)])
        if a == b:
            return b
        if type(b) is int and self.numbers_move:
            return Moving(b, b - a)
        raise NotAlike

    def _view(self, a: int, b: int) -> At | Earlier:
        one, other = self.places.get(a), self.places.get(b)
        if a == b:
            if other is not None and other.loop == self.loop and other.turn >= self.turn - 1:
                raise NotAlike
            self.found.still.add(b)
            return At(b)
        if one is None or other is None or not one.loop == other.loop == self.loop:
            raise NotAlike
        age = self.turn - other.turn
        if one != other._replace(turn=other.turn - 1):
            raise NotAlike
        _, _, at, out = other
        if age:
            self.found.ages[at, out] = max(age, self.found.ages.get((at, out), 0))
        return Earlier(age, at, out) if age else At(b)
