"""Row arithmetic: which rows of an input a range of output rows reads.

All halo arithmetic of rowtune is here. Rows are absolute indices along the band axis; a range is
half open. A window answers two monotone questions about one (operator, input) pair:

    lo(a)   the first input row that output rows a, a+1, ... read
    hi(b)   one past the last input row that output rows ..., b-2, b-1 read

so output rows [a, b) read at most [lo(a), hi(b)), clipped to the tensor. Once an operator's last row is
done nothing reads the input any more: lo(out_rows) is the whole height.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Rows(NamedTuple):
    """Half-open range of rows along the band axis."""

    lo: int
    hi: int

    @property
    def size(self) -> int:
        return self.hi - self.lo

    def shifted(self, by: int) -> Rows:
        return Rows(self.lo + by, self.hi + by)


class Window(Protocol):
    """Input rows read by output rows; `rows` is the input's height, `out_rows` the output's."""

    @property
    def rows(self) -> int: ...

    @property
    def out_rows(self) -> int: ...

    def lo(self, a: int) -> int: ...

    def hi(self, b: int) -> int: ...


def need(window: Window, a: int, b: int) -> Rows:
    """Input rows that output rows [a, b) read. An empty slice where they read padding only."""
    lo = window.lo(a) if a < window.out_rows else window.rows
    hi = window.hi(b)
    return Rows(lo if lo < hi else hi, hi)


@dataclass(frozen=True, slots=True)
class Affine:
    """Output row i reads input rows floor((i*step + first) / over) ... floor((i*step + last) / over).

    One family for every operator with a regular stencil: convolution (step = stride, first = -padding,
    last = dilation*(kernel-1) - padding), transposed convolution and pixel shuffle (over > 1), slices,
    pads and pointwise operators.
    """

    rows: int
    out_rows: int
    step: int = 1
    over: int = 1
    first: int = 0
    last: int = 0

    def lo(self, a: int) -> int:
        if a >= self.out_rows:
            return self.rows
        at = (a * self.step + self.first) // self.over  # asked millions of times: no min, no max
        return 0 if at < 0 else self.rows if at > self.rows else at

    def hi(self, b: int) -> int:
        if b <= 0:
            return 0
        at = ((b - 1) * self.step + self.last) // self.over + 1
        return 0 if at < 0 else self.rows if at > self.rows else at

    @property
    def disjoint(self) -> bool:
        """Neighbouring output rows read disjoint input rows, each at most once (no halo)."""
        return self.over == 1 and self.last - self.first < self.step

    @property
    def grain(self) -> int:
        """Output rows that come of one input row and no other: they are made, and go back, together."""
        return self.over if self.step == 1 and self.first == self.last == 0 else 1

    @property
    def pointwise(self) -> bool:
        return self.step == self.over == 1 and self.first == self.last == 0 and self.rows == self.out_rows


@dataclass(frozen=True, slots=True)
class Gather:
    """An explicit table, for operators whose rows follow no stencil (resampling, reflected pads).

    `firsts[i]` and `ends[i]` are made monotone: the least of all later rows, the most of all earlier ones.
    """

    rows: int
    firsts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def out_rows(self) -> int:
        return len(self.firsts)

    def lo(self, a: int) -> int:
        return self.firsts[a] if a < len(self.firsts) else self.rows

    def hi(self, b: int) -> int:
        return self.ends[b - 1] if b > 0 else 0


@dataclass(frozen=True, slots=True)
class Whole:
    """Every output row reads every input row (a value that is used whole, or an opaque operator)."""

    rows: int
    out_rows: int

    def lo(self, a: int) -> int:
        return 0 if a < self.out_rows else self.rows

    def hi(self, b: int) -> int:
        return self.rows if b > 0 else 0


@dataclass(frozen=True, slots=True)
class Chained:
    """A window on a window: output rows read rows of something in between, which read input rows."""

    outer: Window
    inner: Window

    @property
    def rows(self) -> int:
        return self.inner.rows

    @property
    def out_rows(self) -> int:
        return self.outer.out_rows

    def lo(self, a: int) -> int:
        return self.inner.lo(self.outer.lo(a))

    def hi(self, b: int) -> int:
        return self.inner.hi(self.outer.hi(b))


def pointwise(rows: int) -> Affine:
    return Affine(rows, rows)


def convolution(rows: int, out_rows: int, kernel: int, stride: int, padding: int, dilation: int) -> Affine:
    """Window of a convolution or pool; `padding` is what stands before the first row."""
    return Affine(rows, out_rows, stride, 1, -padding, dilation * (kernel - 1) - padding)


def transposed(rows: int, out_rows: int, kernel: int, stride: int, padding: int, dilation: int) -> Affine:
    """Output row i gets input row j where i = j*stride - padding + dilation*tap."""
    extent = dilation * (kernel - 1)
    return Affine(rows, out_rows, 1, stride, padding - extent + stride - 1, padding)


def gather(rows: int, reads: Iterable[tuple[int, int]]) -> Gather:
    """Window from the first and last input row of each output row."""
    firsts, ends = [], []
    for first, last in reads:
        firsts.append(first)
        ends.append(last + 1)
    for i in range(len(firsts) - 2, -1, -1):
        firsts[i] = min(firsts[i], firsts[i + 1])
    for i in range(1, len(ends)):
        ends[i] = max(ends[i], ends[i - 1])
    return Gather(rows, tuple(firsts), tuple(ends))


def band_ends(height: int, bands: int, tallest: int, band_rows: int) -> list[int]:
    """Where each of `bands` bands ends in an output of `height` rows: all outputs advance by the same
    fraction, in steps of `band_rows` rows of the tallest one."""
    return [height if r == bands - 1 else (r + 1) * band_rows * height // tallest for r in range(bands)]


def between(ordered: list[int], rows: Rows) -> list[int]:
    """The members of an increasing list strictly inside `rows`."""
    return ordered[bisect_right(ordered, rows.lo) : bisect_right(ordered, rows.hi - 1)]
