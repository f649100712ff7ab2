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


def alike(turns: Mapping[int, Calls], loop: int, turn: int, places: Places, views: Sequence[View]) -> Alike:
    """What `turn` does, if those before did the same.

    Raises:
        NotAlike: they did not.
    """
    if turn < 2:
        raise NotAlike
    matching = _Matching(loop, turn, places.of, views)
    three = before, last, now = [turns.get(t, {}) for t in (turn - 2, turn - 1, turn)]
    if not before.keys() == last.keys() == now.keys() or not now:
        raise NotAlike
    found = matching.found
    found.calls = [matching.call(at, *(calls[at] for calls in three)) for at in now]
    did = {at: call.op for at, call in now.items()}
    for t in range(turn - found.oldest, turn - 2):  # what they made is what later turns read
        if {at: call.op for at, call in turns[t].items()} != did:
            raise NotAlike
    return found


class _Matching:
    """Three turns in a row, call by call."""

    def __init__(
        self, loop: int, turn: int, places: Mapping[int, Place | None], views: Sequence[View]
    ) -> None:
        self.loop, self.turn, self.places, self.views = loop, turn, places, views
        self.found = Alike()
        self.numbers_move = True

    def call(self, at: int, a: Call, b: Call, c: Call) -> Call:
        if not (a.op is b.op is c.op and a.way == b.way == c.way and a.kwargs.keys() == c.kwargs.keys()):
            raise NotAlike
        # What autograd runs knows rows from when its graph was made: they would be old after the loop.
        self.numbers_move = c.way == "forward"
        args = self._same(a.args, b.args, c.args)
        kwargs = {k: self._same(a.kwargs[k], b.kwargs[k], c.kwargs[k]) for k in c.kwargs}
        if not len(a.makes) == len(b.makes) == len(c.makes):
            raise NotAlike
        for out, three in enumerate(zip(a.makes, b.makes, c.makes, strict=True)):
            self._made(at, out, *three)
        return c._replace(args=args, kwargs=kwargs)

    def _made(self, at: int, out: int, *views: int) -> None:
        turns = range(self.turn - 2, self.turn + 1)
        new = [self.places.get(v) == (self.loop, t, at, out) for t, v in zip(turns, views, strict=True)]
        if all(new):
            if len({self.views[v][2:] for v in views}) > 1:
                raise NotAlike
        elif any(new):
            raise NotAlike
        elif max(views) >= 0:
            self._view(*views)

    def _same(self, a: Any, b: Any, c: Any) -> Any:
        if not type(a) is type(b) is type(c):
            raise NotAlike
        if isinstance(c, At):
            return self._view(a.view, b.view, c.view)
        if isinstance(c, (list, tuple)):
            if not len(a) == len(b) == len(c):
                raise NotAlike
            return type(c)([self._same(*three) for three in zip(a, b, c, strict=True)])
        if a == b == c:
            return c
        if type(c) is int and self.numbers_move and b - a == c - b:
            return Moving(c, c - b)
        raise NotAlike

    def _view(self, a: int, b: int, c: int) -> At | Earlier:
        places = [self.places.get(v) for v in (a, b, c)]
        if a == b == c:
            place = places[-1]
            if place is not None and place.loop == self.loop and place.turn >= self.turn - 2:
                raise NotAlike
            self.found.still.add(c)
            return At(c)
        turns = range(self.turn - 2, self.turn + 1)
        ages = {t - p.turn for t, p in zip(turns, places, strict=True) if p is not None}
        sources = {(p.loop, p.at, p.out) for p in places if p is not None}
        if None in places or len(ages) != 1 or len(sources) != 1:
            raise NotAlike
        ((loop, at, out),), (age,) = sources, ages
        if loop != self.loop:
            raise NotAlike
        if age:
            self.found.ages[at, out] = max(age, self.found.ages.get((at, out), 0))
        return Earlier(age, at, out) if age else At(c)
