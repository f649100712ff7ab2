"""A tensor in a store, got back a band of rows at a time: never whole on the device again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowtune.graph.graph import Graph
from rowtune.plan.program import Banded, Passes, SegmentProgram
from rowtune.rows import Rows
from rowtune.runtime.layout import differs
from rowtune.runtime.stores.lanes import Place
from rowtune.runtime.stores.store import Lay, Part, Store, lay_of

MOST_BANDS = 64
"""Of more, several are taken at once where all of a tensor is gone through."""


class Shelf:
    """Stands in for the tensor `t`, whose rows lie along `dim`, and of which some images may be read; what is
    done with all of it is done with about `band` rows at a time.

    `shape`, `dtype` and `device` are the tensor's own; `differs` says that its channels come last.
    """

    def __init__(self, store: Store, t: Tensor, dim: int, band: int, image_dim: int | None = None) -> None:
        self.lay = lay_of(t)
        self.differs = differs(t)
        self._store, self._dim = store, dim
        self._band = max(1, band, -(-int(t.shape[dim]) // MOST_BANDS))
        along = (dim,) if image_dim in (None, dim) else (image_dim, dim)
        with torch.no_grad():
            self._handle = store.put(t, along)

    @property
    def shape(self) -> torch.Size:
        return self.lay.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.lay.dtype

    @property
    def device(self) -> torch.device:
        return self.lay.device

    def stand_in(self, wanted: bool) -> Tensor:
        """For autograd: of the tensor's size, without its memory; with a gradient if that is wanted."""
        with torch.no_grad():
            blank = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        return blank.requires_grad_(wanted)

    def get(self, part: Part) -> Tensor:
        """A part of the tensor, in new memory, dense and in the tensor's order."""
        with torch.no_grad():
            return self._store.rows(self._handle, part, self.lay)

    def bands(self) -> Iterator[Part]:
        """All of the tensor, some rows at a time."""
        height = self.shape[self._dim]
        for at in range(0, height, self._band):
            yield ((self._dim, at, min(self._band, height - at)),)

    @property
    def bytes(self) -> int:
        """On the device."""
        return self._store.bytes(self._handle)

    # -- for lists -----------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Any, ...]:
        """What a list of calls is given: tensors, and places on the host."""
        return tuple(field for field in self._handle if isinstance(field, Tensor | Place))

    def without_data(self, device: torch.device) -> Shelf:
        """A shelf like this on a device of tensors without data."""
        made = copy(self)
        made.lay = self.lay._replace(device=device)
        made._handle = type(self._handle)(*(_blank(field, self.lay, device) for field in self._handle))
        return made


def _blank(field: Any, lay: Lay, device: torch.device) -> Any:
    if isinstance(field, Place):
        return lay._replace(device=device).blank()
    if isinstance(field, Tensor):
        return torch.empty_strided(field.shape, field.stride(), dtype=field.dtype, device=device)
    return field


class Cut(NamedTuple):
    """Rows lie along `dim` (or images, if bands are of images alone), and a band has about `band` of them;
    images are read some at a time along `image_dim`, if that is not None."""

    dim: int
    band: int
    image_dim: int | None


def banded_inputs(graph: Graph, segment: SegmentProgram) -> dict[str, Cut]:
    """The inputs that a rows segment reads band by band in backward."""
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
            image_dim = runs[0].images.dims[name] if decision.images else None
            found[name] = Cut(dim, -(-bands.full_height(graph.values[name]) * size // top), image_dim)
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
