"""Line buffers of sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rowtune.cost.heap import Heap
from rowtune.rows import Rows


class LineSizes:
    """Mirrors runtime.lines.Lines: live rows by value, and their blocks, oldest first.

    Args:
        size: bytes of some rows of a value.
        dims: each value's band dimension.
    """

    def __init__(self, heap: Heap, size: Callable[[str, Rows], int], dims: Mapping[str, int | None]) -> None:
        self.heap, self.size, self.dims = heap, size, dims
        self.chunks: dict[str, list[tuple[Rows, int]]] = {}

    def put(self, name: str, rows: Rows, block: int) -> None:
        self.chunks.setdefault(name, []).append((rows, block))

    def window(self, name: str, rows: Rows) -> tuple[int, bool]:
        """(a reference to the window's block, whether it was joined)."""
        found = [b for r, b in self.chunks[name] if r.lo < rows.hi and rows.lo < r.hi]
        if len(found) == 1 or self.dims[name] is None:
            return self.heap.ref(found[-1]), False
        return self.heap.new(self.size(name, rows), f"rows of {name}"), True

    def drop_below(self, name: str, below: int) -> None:
        kept = []
        for rows, block in self.chunks.get(name, ()):
            if rows.hi <= below:
                self.heap.drop(block)
            elif rows.lo < below and self.dims[name] is not None:
                tail = Rows(below, rows.hi)
                copy = self.heap.new(self.size(name, tail))
                self.heap.drop(block)
                kept.append((tail, copy))
            else:
                kept.append((rows, block))
        self.chunks[name] = kept

    def drop(self, outputs: Iterable[tuple[str, Rows]]) -> None:
        """The chunks of exactly these rows."""
        for name, rows in outputs:
            found = self.chunks.get(name, [])
            for r, block in found:
                if r == rows:
                    self.heap.drop(block)
            self.chunks[name] = [(r, b) for r, b in found if r != rows]

    def clear(self) -> None:
        for found in self.chunks.values():
            for _, block in found:
                self.heap.drop(block)
        self.chunks = {}
