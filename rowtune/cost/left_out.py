"""What a shortened prediction leaves out, and what of it would be alive all the same."""

from __future__ import annotations

from collections.abc import Sequence

from rowtune.cost.heap import Heap
from rowtune.plan.program import Repeat
from rowtune.rows import Rows


class Images:
    """Bands of images are alike but for the last: the second stands for those between, and what it leaves
    behind in forward is alive that many times more until it has had its backward."""

    def __init__(self, heap: Heap, ranges: Sequence[Rows], shortened: bool) -> None:
        self.heap = heap
        self.more = len(ranges) - 3 if shortened and len(ranges) > 3 else 0
        self.ranges = (*ranges[:2], ranges[-1]) if self.more else tuple(ranges)
        self.before = self.block = 0

    def start(self) -> None:
        self.before = self.heap.live

    def forward_done(self, index: int) -> None:
        if self.more and index == 1:
            self.block = self.heap.new(self.more * (self.heap.live - self.before))

    def backward_done(self, index: int) -> None:
        if self.more and index == 1:
            self.heap.drop(self.block)


class LeftOut:
    """The stashes of the bands that a shortened program leaves out: as much more for each left-out period as
    one period added."""

    def __init__(self, heap: Heap, repeat: Repeat | None) -> None:
        self.heap, self.more = heap, repeat.more if repeat else 0
        self.first, self.last = (repeat.stashes if repeat else None) or (-1, -1)
        self.before = 0
        self.blocks: list[int] = []

    def stashed(self, band: int) -> None:
        if band == self.first:
            self.before = self.heap.live
        elif band == self.last:
            self.blocks.append(self.heap.new(self.more * (self.heap.live - self.before)))

    def restored(self, band: int) -> None:
        """Bands are gone through backwards, those left out first."""
        if self.blocks and band < self.first:
            self.heap.drop(self.blocks.pop())
