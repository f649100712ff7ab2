"""The plan that takes least: what decides how large an image may be, and whether anything fits at all.

A descent: of the smallest path there is, the options that set its peak are looked at, and options beside them
that may take less are recorded, until none brings the peak down or time is up. Barriers make the difference:
a stretch whose barriers are passed keeps none of its feature maps, and is streamed once for each of them, so
that recording it takes the square of their number; what would take longer than there is time is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice, pairwise

from rowtune.cost.candidates import AGAIN, ALL_ROWS, LATE, NARROW, PASSES, ROWS, levels
from rowtune.cost.programme import Path, fastest, smallest
from rowtune.cost.table import Key, Option, Table
from rowtune.graph.cuts import barrier_parts
from rowtune.graph.places import has_barriers
from rowtune.plan.choices import Store
from rowtune.plan.plan import Segment

LOW = 8
"""Band rows to begin with: few, and not so few that halos are most of a band."""
BATCH = 4
"""Options that are recorded before the path is looked for again."""
SHORT = 3
"""Stretches between cuts that are made again together, at most: longer ones hold too much."""
NEAR = 0.98
"""Options that take this much of a path's peak set it."""
SAFE = 1.5
"""How much longer a recording may take than those before it let expect."""
CHECKPOINT = Segment("", "", "checkpoint")

May = Callable[[tuple[Segment, ...]], bool]


def descend(
    table: Table,
    left: Callable[[], float],
    may: May,
    begin: Iterable[Key] = (),
    stores: tuple[Store, ...] = ("device",),
    enough: int = 0,
    again: int = 0,
) -> Path:
    """The path with the least peak after looking for it.

    Args:
        left: seconds that there are for that.
        may: which segments a path is made of; only such are recorded.
        begin: options to begin with, whatever time is left.
        stores: where what segments keep may be.
        enough: bytes; a path that takes no more is good enough.
        again: how often the path is recorded afterwards, in the same time: of a larger image, say.
    """
    table.add([table.keep(k, k + 1) for k in range(len(table.cuts) - 1)], math.inf)
    search = _Descent(table, left, may, stores, again)
    for key in begin:
        search.timed(key)
    path, first = search.path(), iter(search.first())
    while (
        path.peak > enough
        and left() > again * search.took(path)
        and (search.record(first) or search.look(path))
    ):
        path = search.path()
    return path


def peaks(table: Table, path: Path) -> list[int]:
    """What is alive at most while each option of a path runs, forward or backward."""
    found: list[int] = []
    kept, held = 0, frozenset[str]()
    for option in path.options:
        leaving = table.leaving[option.start]
        after = leaving.after(held)
        at = int((after.order == leaving.options.index(option)).argmax())
        found.append(kept - after.held_bytes + int(after.most[at]))
        kept += int(after.kept[at])
        held = leaving.held(option, held)
    return found


class _Descent:
    def __init__(
        self, table: Table, left: Callable[[], float], may: May, stores: tuple[Store, ...], again: int
    ) -> None:
        self.table, self.left, self.may, self.stores, self.again = table, left, may, stores, again
        self.last = len(table.cuts) - 1
        self.barriers = has_barriers(table.graph, table.axis)
        self.most, self.rate = 0, 0.0
        """The most work that was recorded at once, and the seconds that it took of each."""
        self.seconds: dict[Key, float] = {}

    def path(self) -> Path:
        def allowed(option: Option) -> bool:
            return self.may(option.segments)

        found = fastest(self.table, smallest(self.table, allowed) or 1 << 60, allowed)
        assert found is not None, "to keep everything is always an option"
        return found

    def add(self, key: Key) -> bool:
        """Record an option that may be used, if there is time for it; whether it was recorded."""
        left = self.left() - SAFE * (1 + self.again) * self.rate * self._work(key)
        if key in self.table.known or not self.may(key[2]) or left <= 0:
            return False
        self.timed(key)
        return True

    def timed(self, key: Key) -> None:
        """Record an option, and how long that takes."""
        left, work = self.left(), self._work(key)
        self.table.add([key], math.inf)
        self.seconds[key] = left - self.left()
        if work > self.most and self.table.known[key] is not None:
            self.most, self.rate = work, self.seconds[key] / work

    def took(self, path: Path) -> float:
        """Seconds that recording a path took."""
        return sum(self.seconds.get((o.start, o.stop, o.segments), 0.0) for o in path.options)

    def record(self, keys: Iterable[Key]) -> int:
        """Some of these, those first that come first; how many there were."""
        return sum(islice(filter(None, map(self.add, keys)), BATCH))

    def first(self) -> list[Key]:
        """Stretches between cuts by themselves; those between places where the height changes, and those from
        the beginning to where tensors get smaller for good. What is recorded soonest comes first."""
        ends = levels(self.table)
        stretches = [*pairwise(ends), *((0, stop) for stop in self._slopes())]
        found = [*self._rows(0, self.last, ROWS)]
        found += [key for k in range(self.last) for key in self._stretch(k, k + 1)]
        found += [key for start, stop in stretches for key in self._banded(start, stop)]
        return sorted(found, key=self._work)

    def _slopes(self) -> Iterator[int]:
        """Cuts behind which no cut is crossed by half as much as by the one before; and the last."""
        crossing = [self.table.crossing(k) for k in range(self.last + 1)]
        for k in range(1, self.last):
            if 2 * max(crossing[k:]) <= max(crossing[k - 1 :]):
                yield k
        yield from () if self.barriers else (self.last,)

    def look(self, path: Path) -> int:
        """Record some options that may take less where the path takes most; how many there were."""
        loads = peaks(self.table, path)
        tight = [at for at, load in enumerate(loads) if load >= NEAR * max(loads)]
        return self.record(dict.fromkeys(self._around(path.options, tight)))

    def _work(self, key: Key) -> int:
        """How much there is to record of passes: nodes, times the square of their barriers."""
        graph, axis = self.table.graph, self.table.axis
        start, stop, segments = key
        if not any(s.barriers == "passes" for s in segments):
            return 0
        first, last = self.table.cuts[start], self.table.cuts[stop]
        return (last - first) * len(barrier_parts(graph, first, last, axis)) ** 2

    # -- what may take less ----------------------------------------------------------------------------------

    def _around(self, options: tuple[Option, ...], tight: list[int]) -> Iterator[Key]:
        """Options at and beside those that set the peak; then longer ones before them, which keep less. Lower
        bands come first, but where barriers are passed: there they are the longest to record."""
        for at in tight:
            yield from () if options[at].main.barriers == "passes" else self._lower(options[at])
        for at in tight:
            yield from self._instead(options[at])
        for at in tight:
            one = options[at]
            for other in (*options[at - 1 : at], *options[at + 1 : at + 2]):
                yield from self._stretch(min(one.start, other.start), max(one.stop, other.stop))
            for start, stop in ((one.start, one.stop - 1), (one.start + 1, one.stop)):
                if start < stop:
                    yield from self._stretch(start, stop)
        for at in tight:
            for before in range(at - 1, 0, -1):
                yield from self._stretch(options[before - 1].start, options[before].stop)
        for at in tight:
            yield from self._lower(options[at])

    def _instead(self, option: Option) -> Iterator[Key]:
        """The same stretch another way, and its two halves."""
        start, stop = option.start, option.stop
        yield from self._stretch(start, stop)
        for middle in {(start + stop) // 2} - {start, stop}:
            yield from self._stretch(start, middle)
            yield from self._stretch(middle, stop)

    def _stretch(self, start: int, stop: int) -> Iterator[Key]:
        table, length = self.table, stop - start
        if length <= SHORT:
            for store in self.stores:
                yield table.checkpoint(start, stop, 0, store)
            if self.barriers:
                yield from self._rows(start, stop, NARROW)
        if 1 < length <= SHORT:
            yield table.turns(start, stop, CHECKPOINT)
            if self.barriers:
                yield table.turns(start, stop, replace(AGAIN, band_rows=ALL_ROWS))
        yield from self._banded(start, stop)

    def _banded(self, start: int, stop: int) -> Iterator[Key]:
        """All of it by rows, however long: barriers are passed."""
        for kind in (PASSES,) if self.barriers else (LATE, ROWS):
            yield from self._rows(start, stop, kind)

    def _rows(self, start: int, stop: int, kind: Segment) -> Iterator[Key]:
        for store in self.stores:
            key = self.table.rows(start, stop, replace(kind, band_rows=LOW, store=store))
            if key is not None:
                yield key

    def _lower(self, option: Option) -> Iterator[Key]:
        """The same with lower bands."""
        main = option.main
        if main.policy == "rows" and main.band_rows > 2:
            key = self.table.rows(option.start, option.stop, replace(main, band_rows=main.band_rows // 2))
            if key is not None:
                yield key
