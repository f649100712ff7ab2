"""Line buffers: the live rows of each value, and the gradients that wait for their piece.

Rows are kept in the chunks they were made in. In a sweep a chunk lives exactly from its piece's forward to
its piece's backward, so chunks are never copied or shifted, and what is live is what the Program says; a
window that spans chunks is joined for the step that reads it and dropped again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.plan.homes import Homes, wasteful
from rowtune.rows import Rows
from rowtune.runtime.stores.shelf import Shelves


class Chunk(NamedTuple):
    rows: Rows
    tensor: Tensor


class Lines:
    """Live rows by value; `dims` tells each value's band dimension (None: one chunk, used whole). What is not
    made here is on `shelves`."""

    def __init__(self, dims: dict[str, int | None], shelves: Shelves) -> None:
        self.dims, self.shelves = dims, shelves
        self.chunks: dict[str, list[Chunk]] = {}
        self.moved: dict[str, int] = {}
        """Rows by which those of each value were said to lie further down (`runtime/moved.py`)."""

    def put(self, name: str, rows: Rows, tensor: Tensor) -> None:
        self.chunks.setdefault(name, []).append(Chunk(rows, tensor))

    def get(self, name: str, rows: Rows) -> tuple[Tensor, bool]:
        """(these rows, whether they had to be joined into new memory)."""
        found = self.chunks.get(name)
        if found is None:
            return self.shelves.get(name, rows), True
        dim = self.dims[name]
        if dim is None:
            return found[-1].tensor, False
        parts = [
            _cut(chunk, max(chunk.rows.lo, rows.lo), min(chunk.rows.hi, rows.hi), dim)
            for chunk in found
            if chunk.rows.lo < rows.hi and rows.lo < chunk.rows.hi
        ]
        if len(parts) == 1:
            return parts[0], False
        return torch.cat(parts, dim), True

    def drop_below(self, name: str, below: int) -> None:
        """Forget rows below `below`. A chunk of which little is left is copied, to let go of the rest."""
        found = self.chunks.get(name)
        if not found:
            return
        dim = self.dims[name]
        kept = []
        for chunk in found:
            if chunk.rows.hi <= below:
                continue
            if dim is not None and chunk.rows.lo < below:
                tail = _cut(chunk, below, chunk.rows.hi, dim)
                chunk = Chunk(Rows(below, chunk.rows.hi), tail.clone())
            kept.append(chunk)
        self.chunks[name] = kept

    def drop(self, name: str, rows: Rows) -> None:
        """Forget the chunk of these rows, if there is one."""
        found = self.chunks.get(name, [])
        self.chunks[name] = [c for c in found if c.rows != rows]

    def clear(self) -> None:
        self.chunks.clear()


def _cut(chunk: Chunk, lo: int, hi: int, dim: int) -> Tensor:
    if lo == chunk.rows.lo and hi == chunk.rows.hi:
        return chunk.tensor
    return chunk.tensor.narrow(dim, lo - chunk.rows.lo, hi - lo)


class Share(NamedTuple):
    """A gradient of some rows. `owned`: nobody else looks at this memory, so it may be added to."""

    rows: Rows
    tensor: Tensor
    owned: bool


class PieceGradients:
    """Gradients of inner values, kept by the piece that made the rows until that piece runs its tape."""

    def __init__(self, dims: dict[str, int | None], homes: dict[str, Homes]) -> None:
        self.dims, self.homes = dims, homes
        self.shares: dict[tuple[int, str], list[Share]] = {}

    def add(self, name: str, rows: Rows, grad: Tensor, owned: bool) -> None:
        """Hand each overlapped piece its share of the gradient of `rows`."""
        dim = self.dims[name]
        for home, piece in self.homes[name].overlapping(rows, dim is None):
            if dim is None:
                self.shares.setdefault((piece, name), []).append(Share(home, grad, owned))
                continue
            lo, hi = max(home.lo, rows.lo), min(home.hi, rows.hi)
            part = grad if Rows(lo, hi) == rows else grad.narrow(dim, lo - rows.lo, hi - lo)
            # Copied where it would hold on to much more memory than its own: a few rows of a slab, or one
            # half of the gradient of a cat.
            if wasteful(part.numel() * part.itemsize, part.untyped_storage().nbytes()):
                share = Share(Rows(lo, hi), part.clone(), True)
            else:
                share = Share(Rows(lo, hi), part, owned)
            self.shares.setdefault((piece, name), []).append(share)

    def take(self, piece: int, name: str, rows: Rows, outer: Tensor | None) -> Tensor | None:
        """The whole gradient of a piece's rows, and forget it; `outer` comes from beyond the segment."""
        shares = self.shares.pop((piece, name), [])
        if not shares:
            return outer
        if outer is not None:
            shares.append(Share(rows, outer, False))
        return _total(shares, rows, self.dims[name])


def _total(shares: list[Share], rows: Rows, dim: int | None) -> Tensor:
    full = [s for s in shares if s.rows == rows]
    if len(shares) == 1 and full:
        return shares[0].tensor
    base = next((s for s in full if s.owned), None)
    if base is None:
        base = _blank(shares[0], rows, dim)
        rest: Iterable[Share] = shares
    else:
        rest = [s for s in shares if s is not base]
    total = base.tensor
    for share in rest:
        if dim is None or share.rows == rows:
            total.add_(share.tensor)
        else:
            total.narrow(dim, share.rows.lo - rows.lo, share.rows.size).add_(share.tensor)
    return total


def _blank(like: Share, rows: Rows, dim: int | None) -> Share:
    shape = list(like.tensor.shape)
    if dim is not None:
        shape[dim] = rows.size
    return Share(rows, like.tensor.new_zeros(shape), True)
