"""A tensor in a store, put there and got back a band of rows at a time: never whole on the device again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowtune.graph.graph import Graph
from rowtune.kernels.rounding import order_of
from rowtune.plan.program import Banded, Passes, SegmentProgram
from rowtune.rows import Rows
from rowtune.runtime.layout import differs
from rowtune.runtime.stores.store import Part, Store

MOST_CHUNKS = 64
"""Bands that are put apart: of more, several are put at once."""


class _Chunk(NamedTuple):
    rows: Rows
    handle: Any


class Shelf:
    """Stands in for the tensor `t`, whose rows lie along `dim`; about `band` of them are put at once.

    `shape`, `dtype` and `device` are the tensor's own; `differs` says that its channels come last.
    """

    def __init__(self, store: Store, t: Tensor, dim: int, band: int) -> None:
        self.shape, self.dtype, self.device, self.differs = t.shape, t.dtype, t.device, differs(t)
        self._store, self._dim, self._order = store, dim, order_of(t.stride())
        height = int(t.shape[dim])
        band = max(1, band, -(-height // MOST_CHUNKS))
        with torch.no_grad():
            self._chunks = [_Chunk(rows, store.put(_narrow(t, dim, rows))) for rows in _bands(height, band)]

    def stand_in(self, wanted: bool) -> Tensor:
        """For autograd: of the tensor's size, without its memory; with a gradient if that is wanted."""
        with torch.no_grad():
            blank = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        return blank.requires_grad_(wanted)

    def get(self, part: Part) -> Tensor:
        """A part of the tensor, in new memory, dense and in the tensor's order."""
        sizes = {dim: size for dim, _, size in part}
        shape = [sizes.get(d, int(size)) for d, size in enumerate(self.shape)]
        wanted = next((Rows(a, a + n) for d, a, n in part if d == self._dim), Rows(0, shape[self._dim]))
        across = tuple(one for one in part if one[0] != self._dim)
        with torch.no_grad():
            found = self._blank(shape, self.dtype)
            for rows, handle in self._chunks:
                both = Rows(max(rows.lo, wanted.lo), min(rows.hi, wanted.hi))
                if both.size > 0:
                    here = (*across, (self._dim, both.lo - rows.lo, both.size))
                    out = _narrow(found, self._dim, both.shifted(-wanted.lo))
                    self._store.rows(handle, here, out)
        return found

    def bands(self) -> Iterator[Part]:
        """All of the tensor, as it was put."""
        for rows, _ in self._chunks:
            yield ((self._dim, rows.lo, rows.size),)

    def blank(self, dtype: torch.dtype) -> Tensor:
        """New memory of the tensor's size and order."""
        return self._blank([*self.shape], dtype)

    @property
    def bytes(self) -> int:
        """On the device."""
        return sum(self._store.bytes(handle) for _, handle in self._chunks)

    def _blank(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        made = torch.empty([shape[d] for d in self._order], dtype=dtype, device=self.device)
        return made.permute([self._order.index(d) for d in range(len(shape))])


def banded_inputs(graph: Graph, segment: SegmentProgram) -> dict[str, tuple[int, int]]:
    """The inputs that a rows segment reads band by band in backward: the dimension that rows lie along (or
    images, if bands are of images alone), and about how many of them a band has."""
    ways = segment.how.forward if isinstance(segment.how, Passes) else (segment,)
    runs = [one.how for one in ways if isinstance(one.how, Banded)]
    whole = {n for run in runs for node in run.post for n in node.inputs}
    bands, decision = runs[0].bands, segment.decision
    outputs = {o for run in runs for group in run.groups for o in group.outputs}
    tall = outputs.intersection(segment.part.outputs).union(*(run.sums for run in runs))
    top = max((bands.full_height(graph.values[o]) for o in tall), default=1)
    found = {}
    for name in segment.part.inputs:
        dim = bands.dims[name]
        if dim is not None and name not in whole:
            size = decision.band_rows if bands.axis else decision.images
            found[name] = dim, -(-bands.full_height(graph.values[name]) * size // top)
    return found


class Shelves(NamedTuple):
    """Rows of what a segment reads that lies on shelves, for the images at work."""

    shelves: Mapping[str, Shelf]
    dims: Mapping[str, int | None]
    image_dims: Mapping[str, int | None]
    images: Rows | None

    def get(self, name: str, rows: Rows) -> Tensor:
        dim, at = self.dims[name], self.image_dims[name]
        part: Part = () if dim is None else ((dim, rows.lo, rows.size),)
        if at is not None and at != dim and self.images is not None:
            part = (*part, (at, self.images.lo, self.images.size))
        return self.shelves[name].get(part)


def _bands(height: int, band: int) -> Iterator[Rows]:
    for lo in range(0, height, band):
        yield Rows(lo, min(lo + band, height))


def _narrow(t: Tensor, dim: int, rows: Rows) -> Tensor:
    return t.narrow(dim, rows.lo, rows.size)
