"""Reductions: the output accumulates over bands, and is used whole by whatever reads it."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from rowtune.graph.graph import Node
from rowtune.graph.rules.pointwise import per_image, pooled_axes
from rowtune.graph.rules.rule import WHOLE, Opaque, Question, Read, Reduction, RowRule, Slab
from rowtune.kernels.constants import Tables
from rowtune.kernels.extremes import (
    cell,
    extremes_again,
    extremes_of,
    largest_again,
    largest_of,
    merge_extremes,
    merge_largest,
)
from rowtune.kernels.moments import add_gradient, measure, moments_again, statistics_of
from rowtune.kernels.moments import spread_of as moments_spread
from rowtune.rows import Rows
from rowtune.rows import pointwise as same_rows

SUM = Reduction()


def moments(q: Question) -> RowRule | Opaque:
    """Count, mean and M2 of train-mode norms, from what each band measures. Statistics of single images are
    banded over the batch."""
    x, groups = q.node.args[0].name, int(q.node.args[1])
    dim = q.dims[x]
    assert dim is not None
    reads = {x: Read(dim, same_rows(q.shape(x)[dim]))}
    if groups and dim == 0:
        return RowRule(1, reads)
    if dim == 1 and groups != 1:
        return Opaque("statistics of single channels, banded over channels")
    shared = bool(q.node.args[3])
    how = Reduction(
        again=_moments_again,
        shared=shared,
        add_gradient=_add_gradient,
        total=partial(statistics_of, tables=Tables()),
        count=math.prod(q.shape(x)) // math.prod(q.out[1:]),
    )
    return RowRule(None, reads, _measure, how)


def _measure(slab: Slab) -> Tensor:
    """Of this process; those of others join the finished ones."""
    x, groups, centred, _ = slab.node.args
    return measure(slab.tensors[x.name], groups, centred)


def _moments_again(slab: Slab, total: Tensor) -> Tensor:
    x, groups, centred, _ = slab.node.args
    return moments_again(slab.tensors[x.name], total, groups, centred)


def _add_gradient(node: Node, x: Tensor, total: Tensor, grad: Tensor, into: Tensor) -> None:
    _, groups, centred, _ = node.args
    add_gradient(x, total, grad, groups, centred, into)


def normalise(q: Question) -> RowRule | Opaque:
    """(x - mean) / deviation, scaled: pointwise, with statistics that every band uses whole."""
    x, stats = q.node.args[0].name, q.node.args[1].name
    dim = q.dims[x]
    if dim is None or (dim == 1 and q.node.args[4] != 1):
        return Opaque("a norm banded over channels")
    reads = {n: WHOLE for n in q.node.inputs}
    reads[x] = Read(dim, same_rows(q.out[dim]))
    if q.dims[stats] is not None:
        reads[stats] = Read(1, same_rows(q.shape(stats)[1]))
    return RowRule(dim, reads)


def mean_or_sum(q: Question) -> RowRule | Opaque:
    """mean, sum: over other axes row by row, over the band axis a sum of the bands' shares."""
    found = pooled_axes(q)
    x = q.node.inputs[0]
    dim = q.dims[x]
    if isinstance(found, RowRule) or dim is None:
        return found
    rows, axes = q.shape(x)[dim], q.arg(1, "dim", None)
    axes = [axes] if isinstance(axes, int) else axes or range(len(q.shape(x)))
    of_all = math.prod(q.shape(x)[a] for a in axes)

    def share(slab: Slab) -> Tensor:
        made, got = slab.call(), slab.tensors[x].shape  # some rows, of some images
        return made * (math.prod(got[a] for a in axes) / of_all) if q.node.op == "mean" else made

    return RowRule(None, {x: Read(dim, same_rows(rows))}, share, reduces=SUM)


def adaptive_avg(q: Question) -> RowRule | Opaque:
    """Adaptive average pooling: each output row is a weighted sum of input rows, summed band by band."""
    x = q.node.args[0].name
    dim = q.dims[x]
    if dim is None or dim < 2:
        return per_image(q)
    rows = q.shape(x)[dim]
    size = q.out[2:]
    cells = [cell(i, size[dim - 2], rows) for i in range(size[dim - 2])]
    tables = Tables()

    def share(slab: Slab) -> Tensor:
        got = slab.tensors[x]
        out = [*size]
        out[dim - 2] = got.shape[dim]
        narrow = slab.node.target(got, out) if [*got.shape[2:]] != out else got
        weights = tables.get((slab.rows, got.dtype), got, lambda: _cell_weights(cells, slab.rows, got.dtype))
        made: Tensor = torch.tensordot(narrow, weights, ([dim], [1])).movedim(-1, dim)
        return made

    return RowRule(None, {x: Read(dim, same_rows(rows))}, share, reduces=SUM)


def _cell_weights(cells: list[Rows], rows: Rows, dtype: torch.dtype) -> Tensor:
    """What each of `rows` adds to each cell's mean."""
    weights = torch.zeros(len(cells), rows.size, dtype=dtype)
    for i, want in enumerate(cells):
        lo, hi = max(want.lo, rows.lo), min(want.hi, rows.hi)
        if lo < hi:
            weights[i, lo - rows.lo : hi - rows.lo] = 1 / want.size
    return weights


def largest(q: Question) -> RowRule | Opaque:
    """Adaptive max pooling: the largest value so far and where it stands."""
    x, size = q.node.args[0].name, q.node.args[1]
    dim = q.dims[x]
    if dim is None or dim < 2:
        return _shifted(q, x)
    rows = q.shape(x)[dim]

    def share(slab: Slab) -> Tensor:
        return largest_of(slab.tensors[x], size, dim, slab.rows, rows)

    def again(slab: Slab, total: Tensor) -> Tensor:
        return largest_again(slab.tensors[x], total, dim, slab.rows, rows)

    return RowRule(None, {x: Read(dim, same_rows(rows))}, share, reduces=Reduction(merge_largest, again))


def extremes(q: Question) -> RowRule | Opaque:
    """amax, amin: the extreme so far, how many attain it, and where the first stands."""
    x, sign = q.node.args[0].name, q.node.args[1]
    dim = q.dims[x]
    if dim is None or dim < 2:
        return _shifted(q, x)
    rows = q.shape(x)[dim]

    def share(slab: Slab) -> Tensor:
        return extremes_of(slab.tensors[x], sign, dim, slab.rows, rows)

    def again(slab: Slab, total: Tensor) -> Tensor:
        return extremes_again(slab.tensors[x], sign, total, dim, slab.rows, rows)

    reads = {x: Read(dim, same_rows(rows))}
    return RowRule(None, reads, share, reduces=Reduction(merge_extremes, again))


def _shifted(q: Question, x: str) -> RowRule | Opaque:
    """Pairs along a new first dimension: the band axis moves by one."""
    dim = q.dims[x]
    if dim is None or q.out[dim + 1] != q.shape(x)[dim]:
        return Opaque(f"{q.node.op} over channels")
    return RowRule(dim + 1, {x: Read(dim, same_rows(q.shape(x)[dim]))})


def take(q: Question) -> RowRule | Opaque:
    """One of a pair along the first dimension; images (or rows) stay what they are."""
    found = q.node.args[0].name
    dim = q.dims[found]
    if dim is None or q.shape(found)[1:] != q.out:
        return Opaque("a reduction in another shape")
    _, which, sign = q.node.args[:3]
    dtype = q.values[q.node.name].dtype

    def run(slab: Slab) -> Tensor:
        one: Tensor = slab.tensors[found][which] * sign
        return one.to(dtype)

    return RowRule(dim - 1, {found: Read(dim, same_rows(q.shape(found)[dim]))}, run)


def spread_of(q: Question) -> RowRule | Opaque:
    """Variance or deviation of single images, from their moments."""
    stats = q.node.args[0].name
    dim, correction, power = q.dims[stats], *q.node.args[1:3]
    if dim != 1 or q.out[:1] != q.shape(stats)[1:2]:
        return Opaque("statistics in another shape")
    dtype = q.values[q.node.name].dtype

    def run(slab: Slab) -> Tensor:
        return moments_spread(slab.tensors[stats], correction, power, slab.shape, dtype)

    return RowRule(0, {stats: Read(1, same_rows(q.out[0]))}, run)
