"""Sliding patches as a data movement: im2col (F.unfold), col2im (F.fold), Tensor.unfold.

The columns of im2col are the patches, counted row by row: a band of columns is a run of patches that may
start and end in the middle of a row of patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.graph.rules.pointwise import along
from rowtune.graph.rules.rule import Opaque, Question, Read, RowRule, Slab, cut
from rowtune.graph.rules.window import border, crop_rows, expand_ints, pad_rows
from rowtune.rows import Affine, Chained, Rows, convolution, transposed

aten = torch.ops.aten


class _Geometry(NamedTuple):
    """Of the patches: sizes of each spatial axis, and how many patches lie in a column and in a row."""

    kernel: list[int]
    dilation: list[int]
    padding: list[int]
    stride: list[int]
    high: int
    wide: int


def _geometry(q: Question, first: int, image: tuple[int, ...]) -> _Geometry:
    """`first` is the position of kernel_size among the arguments."""
    names = ("kernel_size", "dilation", "padding", "stride")
    kernel, dilation, padding, stride = (
        expand_ints(q.arg(first + i, name, 1), 2) for i, name in enumerate(names)
    )
    counts = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, d, p, s in zip(image, kernel, dilation, padding, stride, strict=True)
    ]
    return _Geometry(kernel, dilation, padding, stride, counts[0], counts[1])


def im2col(q: Question) -> RowRule | Opaque:
    """F.unfold: patches as columns, bands of rows to bands of patches."""
    x = q.node.inputs[0]
    dim, shape = q.dims[x], q.shape(x)
    if dim != 2 or len(shape) != 4:
        return along(q, lambda q, d: d != 0, "im2col's patches are counted row by row")
    g = _geometry(q, 1, shape[2:])
    patches = convolution(shape[2], g.high, g.kernel[0], g.stride[0], g.padding[0], g.dilation[0])
    count = g.high * g.wide

    def run(slab: Slab) -> Tensor:
        lines = Rows(slab.rows.lo // g.wide, (slab.rows.hi - 1) // g.wide + 1)
        top, bottom = border(patches, lines, slab.reads[x])
        image = pad_rows(slab.tensors[x], 2, top, bottom)
        full: Tensor = aten.im2col.default(image, g.kernel, g.dilation, [0, g.padding[1]], g.stride)
        return cut(full, 2, slab.rows.lo - lines.lo * g.wide, slab.rows.size)

    def makes(rows: Rows, got: Rows) -> int:
        return ((rows.hi - 1) // g.wide + 1 - rows.lo // g.wide) * g.wide

    window = Chained(Affine(g.high, count, 1, g.wide), patches)
    return RowRule(2, {x: Read(2, window)}, run, makes=makes)


def col2im(q: Question) -> RowRule | Opaque:
    """F.fold: overlapping patches added up into an image."""
    x = q.node.inputs[0]
    dim = q.dims[x]
    if dim != 2 or len(q.out) != 4:
        return along(q, lambda q, d: d != 0, "col2im sums over the band axis")
    g = _geometry(q, 2, q.out[2:])
    reach = g.dilation[0] * (g.kernel[0] - 1) + 1
    patches = transposed(g.high, q.out[2], g.kernel[0], g.stride[0], g.padding[0], g.dilation[0])
    window = Chained(patches, Affine(g.high * g.wide, g.high, g.wide, 1, 0, g.wide - 1))

    def run(slab: Slab) -> Tensor:
        columns, first = slab.tensors[x], slab.reads[x].lo // g.wide
        lines = columns.shape[2] // g.wide
        if not lines:  # rows that no patch reaches
            return columns.new_zeros(slab.shape) + columns.sum()
        size = [(lines - 1) * g.stride[0] + reach, q.out[3]]
        full = aten.col2im.default(columns, size, g.kernel, g.dilation, [0, g.padding[1]], g.stride)
        start = slab.rows.lo + g.padding[0] - first * g.stride[0]
        return crop_rows(full, 2, start, slab.rows.size, None)

    return RowRule(2, {x: Read(2, window)}, run)


def unfold(q: Question) -> RowRule | Opaque:
    """Tensor.unfold: windows of an axis on a new last axis."""
    x = q.node.inputs[0]
    at, size, step = (int(a) for a in q.node.args[1:4])
    dim = q.dims[x]
    if dim is None:
        return Opaque("unfold")
    rows, out_rows = q.shape(x)[dim], q.out[dim]
    if at % len(q.shape(x)) != dim:
        return RowRule(dim, {x: Read(dim, Affine(rows, out_rows))})
    return RowRule(dim, {x: Read(dim, convolution(rows, out_rows, size, step, 0, 1))})


PATCHES: dict[str, Callable[[Question], RowRule | Opaque]] = {
    "im2col": im2col,
    "col2im": col2im,
    "unfold": unfold,
}
