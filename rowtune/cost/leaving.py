"""The options that leave a cut as columns, so that the programme looks at all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rowtune.cost.table import Option, Span

Ints = NDArray[np.int64]
Held = frozenset[str]
"""Tensors that cross a cut and are held on to by options before it."""


class Way(NamedTuple):
    """Where options [first, stop) of an `After` lead: a cut, and what is held on to there."""

    first: int
    stop: int
    cut: int
    held: Held


class After(NamedTuple):
    """What options do behind states that hold on to the same tensors, ordered by where they lead. By option:
    its place in `Leaving.options`, the most that is alive in it beyond what the states keep apart from those
    tensors, what it keeps, seconds, and what it keeps on the host."""

    order: Ints
    most: Ints
    kept: Ints
    seconds: NDArray[np.float64]
    host: Ints
    ways: tuple[Way, ...]
    held_bytes: int


class Leaving:
    """The options that leave one cut.

    Args:
        options: all that start at the cut.
        seconds: of each.
        entering: bytes of the tensors that cross the cut.
        later: by cut, bytes of the gradients of parameters that are read behind it.
        crossers: by cut, the tensors that cross it.
        sizes: bytes of tensors that are held on to.
    """

    def __init__(
        self,
        options: Sequence[Option],
        seconds: Sequence[float],
        entering: int,
        later: Sequence[int],
        crossers: Mapping[int, frozenset[str]],
        sizes: Mapping[str, int],
    ) -> None:
        self.options, self.entering = tuple(options), entering
        self._seconds = np.array(seconds, np.float64)
        self._kept = _column(o.kept for o in options)
        self._host = _column(o.host_bytes for o in options)
        self._forward = _spans([o.forward for o in options])
        self._backward = _spans([o.backward for o in options]) + _column(later[o.stop] for o in options)
        self._crossers, self._sizes = crossers, sizes
        self._after: dict[Held, After] = {}

    def after(self, held: Held) -> After:
        """What the options do where `held` is held on to."""
        if held not in self._after:
            self._after[held] = self._behind(held)
        return self._after[held]

    def _behind(self, held: Held) -> After:
        held_bytes = sum(self._sizes[name] for name in held)
        most = np.maximum(*(_given(s, held_bytes, self.entering) for s in (self._forward, self._backward)))
        fresh = _column(sum(size for name, size in o.holds if name not in held) for o in self.options)
        leads = [(o.stop, self.held(o, held)) for o in self.options]
        order = sorted(range(len(leads)), key=lambda i: (leads[i][0], sorted(leads[i][1])))
        ways, at = [], 0
        for (cut, now), alike in groupby(leads[i] for i in order):
            count = len(list(alike))
            ways.append(Way(at, at + count, cut, now))
            at += count
        index = np.array(order, np.int64)
        columns = most[index], (self._kept + fresh)[index], self._seconds[index], self._host[index]
        return After(index, *columns, tuple(ways), held_bytes)

    def held(self, option: Option, held: Held) -> Held:
        """What is held on to behind an option: what passes by it, and what it holds itself."""
        leaving = self._crossers[option.stop]
        return (held & leaving) | {name for name, _ in option.holds if name in leaving}


def _given(spans: Ints, held: int, entering: int) -> Ints:
    """The most that is alive with `held` bytes of the `entering` that others hold on to."""
    alone, whole = spans
    least: Ints = np.minimum(whole, alone + held)
    return whole if held >= entering else least


def _spans(spans: Sequence[Span]) -> Ints:
    return np.array([[s.alone for s in spans], [s.held for s in spans]], np.int64)


def _column(values: Iterable[int]) -> Ints:
    return np.fromiter(values, np.int64)
