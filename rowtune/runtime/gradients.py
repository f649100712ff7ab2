"""Gradients under way: sums by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rowtune.graph.graph import Graph
from rowtune.kernels.moments import add_processes
from rowtune.plan.program import SegmentProgram
from rowtune.rows import Rows
from rowtune.runtime.evaluate import grad_dtype
from rowtune.runtime.stores.shelf import Shelf
from rowtune.runtime.stores.store import Lay, cut
from rowtune.torch_private import storage_of

Part = Callable[[Tensor, Rows], Tensor]


@dataclass
class Gradients:
    """Sums over bands and images, by name: of segment inputs and of weights."""

    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]


def add(sums: dict[str, Tensor], name: str, grad: Tensor) -> None:
    """One more gradient of a value."""
    sums[name] = sums[name] + grad if name in sums else grad


def gather(sums: dict[str, Tensor], name: str, grad: Tensor) -> None:
    """One more gradient of a value, in memory that nobody else looks at."""
    if name in sums:
        grad.add_(sums[name])
    sums[name] = grad


def apart(grads: Mapping[str, Tensor], others: Iterable[Tensor]) -> dict[str, Tensor]:
    """The gradients, each in memory of its own: an addition hands one gradient to all its inputs."""
    seen = {storage_of(g) for g in others}
    found = {}
    for name, g in grads.items():
        at = storage_of(g)
        found[name] = g.clone() if at in seen or 0 in g.stride() else g
        seen.add(at)
    return found


class InputGradients:
    """Gradients of segment inputs, row by row: rows that come first are written and rows that come again are
    added to, so that no zeros are written for others to take their place.

    Args:
        sums: the gradients by name.
    """

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.sums = sums
        self.filled: dict[str, Rows] = {}
        self.split: set[str] = set()
        self.later = False

    def whole(self, name: str, grad: Tensor, dim: int | None) -> None:
        """A gradient of all rows, in memory that nobody else looks at."""
        if name in self.filled and dim is not None:
            self._blank(name, self.sums[name], dim)
        gather(self.sums, name, grad)
        self.filled[name] = Rows(0, 1 if dim is None else grad.shape[dim])

    def add(
        self,
        name: str,
        like: Tensor | Shelf,
        dim: int | None,
        rows: Rows,
        grad: Tensor,
        part: Part,
        split: bool,
    ) -> None:
        """Rows `rows` of the gradient of a tensor `like`; `part` takes those of the images at work, of which
        the value has rows of its own with `split`."""
        if name not in self.sums:
            made = blank_like(like, grad.dtype)
            self.sums[name] = made.zero_() if dim is None or (split and self.later) else made
        total = self.sums[name]
        if dim is None:
            self.filled[name] = Rows(0, 1)
            part(total, rows).add_(grad)
            return
        if split:
            self.split.add(name)
        have = self.filled.get(name, Rows(rows.lo, rows.lo))
        for gap in (Rows(rows.hi, have.lo), Rows(have.hi, rows.lo)):  # rows between that have not come yet
            if gap.size > 0:
                part(total, gap).zero_()
        above, below = Rows(rows.lo, min(rows.hi, have.lo)), Rows(max(rows.lo, have.hi), rows.hi)
        for new in (above, below):
            if new.size > 0:
                part(total, new).copy_(grad.narrow(dim, new.lo - rows.lo, new.size))
        again = Rows(max(rows.lo, have.lo), min(rows.hi, have.hi))
        if again.size > 0:
            part(total, again).add_(grad.narrow(dim, again.lo - rows.lo, again.size))
        self.filled[name] = Rows(min(rows.lo, have.lo), max(rows.hi, have.hi))

    def images_done(
        self, dims: Mapping[str, int | None], part: Callable[[str, Tensor, Rows], Tensor]
    ) -> None:
        """All gradients of the images at work have come; of their rows that had none, it is zero. (`part` is
        not kept: it would hold on to the run that holds these gradients.)"""
        for name in self.split:
            dim = dims[name]
            assert dim is not None
            total = part(name, self.sums[name], Rows(0, self.sums[name].shape[dim]))
            self.filled.setdefault(name, Rows(0, 0))
            self._blank(name, total, dim)
            del self.filled[name]
        self.later = True

    def finish(self, dims: Mapping[str, int | None]) -> None:
        """Rows that never came have no gradient."""
        for name in self.filled:
            dim = dims[name]
            if dim is not None:
                self._blank(name, self.sums[name], dim)

    def _blank(self, name: str, total: Tensor, dim: int) -> None:
        have = self.filled[name]
        total.narrow(dim, 0, have.lo).zero_()
        total.narrow(dim, have.hi, total.shape[dim] - have.hi).zero_()
        self.filled[name] = Rows(0, total.shape[dim])


def finish(
    graph: Graph,
    segment: SegmentProgram,
    tensors: Mapping[str, Tensor | Shelf],
    gradients: Gradients,
    wanted: Collection[str],
) -> None:
    """What comes of the gradients of statistics that the segment reads: see rowtune/plan/finish.py."""
    for total, source, reduction in segment.finishes:
        grad = gradients.inputs.pop(total, None)
        if grad is None or source not in wanted:
            continue
        assert reduction.add_gradient is not None
        x, finished = tensors[source], tensors[total]
        assert isinstance(finished, Tensor)
        if source not in gradients.inputs:
            gradients.inputs[source] = blank_like(x, grad_dtype(x.dtype)).zero_()
        grad = add_processes(grad) if reduction.shared else grad
        node, into = graph.nodes[graph.index[total]], gradients.inputs[source]
        if isinstance(x, Tensor):
            reduction.add_gradient(node, x, finished, grad, into)
            continue
        for band in x.bands():
            reduction.add_gradient(node, x.get(band), finished, grad, cut(into, band))


def blank_like(like: Tensor | Shelf | Lay, dtype: torch.dtype) -> Tensor:
    """New memory of a tensor's size and order."""
    if isinstance(like, Shelf):
        like = like.lay
    return torch.empty_like(like, dtype=dtype) if isinstance(like, Tensor) else like.blank(dtype=dtype)
