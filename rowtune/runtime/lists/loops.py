"""Turns that are alike, written as one loop.

A tracer runs some turns of a schedule and leaves out the rest (`turns.py`). Here the calls of the last one
become the body of a loop. Between one turn and the next, numbers advance by a constant, and a tensor that a
turn reads of an earlier one is a variable that each turn sets for the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from rowtune.runtime.lists.alike import Alike, Calls, Earlier, Moving, NotAlike, Place, Places, alike, turn_of
from rowtune.runtime.lists.listing import Listing, renamed, swapped
from rowtune.runtime.recording import At, Call, View


class Carried(NamedTuple):
    """A variable of a loop: the view that the body reads, that which it is at first, and that which it is
    after each turn."""

    view: int
    first: int
    after: int


class Loop(NamedTuple):
    """Calls that run `times` times. After them each variable is what the last turn set it to."""

    body: tuple[Call, ...]
    times: int
    carried: tuple[Carried, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        """What comes from before the loop."""
        inside = {v for call in self.body for v in call.makes} | {c.view for c in self.carried}
        found = [v for call in self.body for v in call.reads if v not in inside]
        return tuple(dict.fromkeys([*found, *(c.first for c in self.carried)]))


@dataclass(frozen=True)
class Rolled:
    """A listing with loops."""

    calls: tuple[Call | Loop, ...]
    views: tuple[View, ...]
    given: tuple[int, ...]
    constants: Mapping[int, Tensor]
    results: tuple[int, ...]
    turns: Mapping[int, Alike]
    """What the turns of each loop do."""


def rolled(listing: Listing, traced: Rolled | None = None) -> Rolled:
    """The listing with a loop for the last turn of each that comes more often than it is listed.

    Args:
        traced: the same listing as it was traced, where it was rewritten since.

    Raises:
        NotAlike: a turn cannot stand for others, or what follows reads what only some of them make.
    """
    return _Rolling(listing, traced).rolled()


class _Ended:
    """A loop that is written; later calls may still ask for variables of it."""

    def __init__(self, found: Alike, loop: int, turn: int, turns: Mapping[int, Calls]) -> None:
        self.found, self.loop, self.turn, self.turns = found, loop, turn, turns
        self.variables: dict[Earlier, int] = {}


class _Rolling:
    def __init__(self, listing: Listing, traced: Rolled | None) -> None:
        self.listing, self.traced = listing, traced
        self.views = [*listing.views]
        self.places = Places()
        self.places.know([*listing.given, *listing.constants])
        self.turns: dict[int, dict[int, Calls]] = {}
        self.ended: dict[int, _Ended] = {}
        self.old: set[int] = set()  # made of what is a loop's, after it
        self.shared: set[int] = set()  # memory that all turns of a loop look at

    def rolled(self) -> Rolled:
        last: dict[int, int] = {}
        for call in self.listing.calls:
            if call.turn is not None:
                last[call.turn.loop] = call.turn.turn
        calls: list[Call | _Ended] = []
        for turn, those in groupby(self.listing.calls, key=turn_of):
            these = self._renamed([*those])
            if turn is None or turn[0] not in self.listing.more:
                calls += these
                continue
            loop, number = turn
            turns = self.turns.setdefault(loop, {})
            turns[number] = {c.turn.at: c for c in these if c.turn is not None}
            if last[loop] != number:
                calls += these
                continue
            oldest = 0 if self.traced is None else self.traced.turns[loop].oldest
            found = alike(turns, loop, number, self.places, self.views, oldest)
            self.ended[loop] = ended = _Ended(found, loop, number, turns)
            self.shared |= self._shared(ended)
            calls.append(ended)
        results = tuple([self._after(v) for v in self.listing.results])
        if self.listing.more.keys() - self.ended.keys():
            raise NotAlike
        made = tuple([self._loop(c) if isinstance(c, _Ended) else c for c in calls])
        alike_turns = {loop: ended.found for loop, ended in self.ended.items()}
        given, constants = self.listing.given, self.listing.constants
        return Rolled(made, tuple(self.views), given, constants, results, alike_turns)

    def _renamed(self, calls: Sequence[Call]) -> list[Call]:
        """With the variables of loops that have ended in place of what turns made."""
        if not self.ended:
            self.places.add(calls)
            return [*calls]
        for call in calls:
            old = any(self._is_old(v) for v in call.reads)
            for view in call.makes:
                if view < 0 or view in call.reads:
                    continue
                # A view that was seen before, but perhaps of other rows by now.
                seen = view in self.places.of and self.views[view].buffer in self.shared
                if seen and (old or self._is_old(view)):
                    raise NotAlike(f"{call.name} looks at rows that a turn looked at")
                if old:
                    self.old.add(view)
            self.places.add([call])
        return [renamed(call, self._after) for call in calls]

    def _shared(self, ended: _Ended) -> set[int]:
        """Memory that was there before the loop, or that several of its turns look at by one view."""
        homes: dict[int, Place | None] = {}
        for view, place in self.places.of.items():  # in the order in which they were made
            homes.setdefault(self.views[view].buffer, place)
        before = {b for b, home in homes.items() if home is None or home.loop != ended.loop}
        return before | {self.views[v].buffer for v in ended.found.still}

    def _is_old(self, view: int) -> bool:
        place = self.places.of.get(view)
        ended = None if place is None else self.ended.get(place.loop)
        return view in self.old or (ended is not None and view not in ended.found.still)

    def _after(self, view: int) -> int:
        """A view, or the variable that it is after its loop."""
        place = self.places.of.get(view)
        ended = None if place is None else self.ended.get(place.loop)
        if place is None or ended is None or view in ended.found.still:
            return view
        age = ended.turn - place.turn + 1
        ages = self._traced(ended).ages
        if age <= max(1, ages.get((place.at, place.out), 0)):
            return self._variable(ended, Earlier(age, place.at, place.out))
        if view not in self._traced(ended).still:
            raise NotAlike("what only some turns make is read after them")
        return view

    def _traced(self, ended: _Ended) -> Alike:
        return ended.found if self.traced is None else self.traced.turns[ended.loop]

    def _variable(self, ended: _Ended, which: Earlier) -> int:
        if which not in ended.variables:
            ended.variables[which] = len(self.views)
            now = ended.turns[ended.turn][which.at].makes[which.out]
            self.views.append(self.views[now])
        return ended.variables[which]

    def _loop(self, ended: _Ended) -> Loop:
        body = []
        for call in ended.found.calls:
            args = self._with_variables(ended, call.args)
            kwargs = {k: self._with_variables(ended, a) for k, a in call.kwargs.items()}
            reads = tuple(_views((args, *kwargs.values())))
            known = {r: v for r, v in zip(call.reads, reads, strict=True)}
            makes = tuple([known.get(v, v) for v in call.makes])
            body.append(call._replace(args=args, kwargs=kwargs, reads=reads, makes=makes))
        oldest: dict[tuple[int, int], int] = {}
        for age, at, out in ended.variables:
            oldest[at, out] = max(age, oldest.get((at, out), 0))
        carried = [
            self._carried(ended, Earlier(age, at, out))
            for (at, out), most in oldest.items()
            for age in range(1, most + 1)
        ]
        return Loop(tuple(body), 1 + self.listing.more[ended.loop], tuple(carried))

    def _with_variables(self, ended: _Ended, argument: Any) -> Any:
        return swapped(argument, Earlier, lambda which: At(self._variable(ended, which)))

    def _carried(self, ended: _Ended, which: Earlier) -> Carried:
        age, at, out = which
        turn = ended.turn - age
        first = ended.turns[turn][at].makes[out]
        if self.places.of[first] != (ended.loop, turn, at, out):
            raise NotAlike
        now = ended.turns[ended.turn][at].makes[out]
        after = now if age == 1 else self._variable(ended, Earlier(age - 1, at, out))
        if self.views[first][2:] != self.views[now][2:]:
            raise NotAlike
        return Carried(self._variable(ended, which), first, after)


def _views(argument: Any) -> Iterator[int]:
    """In the order in which a call reads them."""
    if isinstance(argument, At):
        yield argument.view
    elif isinstance(argument, (list, tuple)) and not isinstance(argument, Moving):
        for each in argument:
            yield from _views(each)
