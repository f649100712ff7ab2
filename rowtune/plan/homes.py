"""Which piece makes which rows: where a gradient of some rows has to go."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from rowtune.plan.program import Back, Banded
from rowtune.rows import Rows


class Homes(NamedTuple):
    """The pieces that make a value's rows in backward, in row order, and where each begins."""

    starts: list[int]
    pieces: list[tuple[Rows, int]]

    def overlapping(self, rows: Rows, whole: bool) -> Iterator[tuple[Rows, int]]:
        """The pieces that made any of `rows`; the only one, for a value used whole."""
        if whole:
            yield self.pieces[0]
            return
        first = max(bisect_right(self.starts, rows.lo) - 1, 0)
        for i in range(first, len(self.pieces)):
            home, piece = self.pieces[i]
            if home.lo >= rows.hi:
                return
            if home.hi > rows.lo:
                yield home, piece


def homes_of(program: Banded) -> dict[str, Homes]:
    """Worked out once for each program."""
    cached: dict[str, Homes] | None = program.__dict__.get("_homes")
    if cached is None:
        found: dict[str, list[tuple[Rows, int]]] = {}
        for step in program.backward:
            if type(step) is Back:
                for name, rows in program.pieces[step.piece].outputs:
                    found.setdefault(name, []).append((rows, step.piece))
        cached = {name: Homes([rows.lo for rows, _ in sorted(p)], sorted(p)) for name, p in found.items()}
        program.__dict__["_homes"] = cached
    return cached


def read_inside(program: Banded, name: str) -> bool:
    """Whether another group of the segment reads this value, so that it needs a line buffer."""
    cached: frozenset[str] | None = program.__dict__.get("_inner")
    if cached is None:
        cached = frozenset(n for group in program.groups for n in group.reads)
        program.__dict__["_inner"] = cached
    return name in cached


def wasteful(used: int, held: int) -> bool:
    """Whether a view uses too little of the memory that it keeps alive."""
    return held * 4 > used * 5
