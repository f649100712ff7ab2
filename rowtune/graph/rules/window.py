"""Convolutions, transposed convolutions, pools: a regular stencil along the band axis.

On a slice, padding is applied only where the window really leaves the image, by absolute rows. The other
spatial axes are untouched and keep the operator's own padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.graph.graph import replace
from rowtune.graph.rules.pointwise import along
from rowtune.graph.rules.rule import WHOLE, Opaque, Question, Read, RowRule, Slab, cut
from rowtune.kernels.constants import Tables
from rowtune.kernels.unvalued import unvalued, unvalued_transposed
from rowtune.rows import Affine, Rows, convolution, transposed

aten = torch.ops.aten
Convolution = Callable[..., Tensor]


def expand_ints(value: Any, n: int) -> list[int]:
    """PyTorch's int-or-list arguments, as a list of n."""
    items = [int(value)] if isinstance(value, int) else [int(v) for v in value]
    return items * n if len(items) == 1 else items


def _weight_pads(
    q: Question, spatial: int, dilation: list[int], kernel: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) padding of each spatial axis."""
    padding = q.arg(4, "padding", 0)
    if padding == "valid":
        return [(0, 0)] * spatial
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in expand_ints(padding, spatial)]


def pad_rows(x: Tensor, dim: int, top: int, bottom: int, value: float = 0.0) -> Tensor:
    if top == bottom == 0:
        return x
    pads = [0, 0] * (x.dim() - 1 - dim) + [top, bottom]
    if x.shape[dim] == 0:
        shape = list(x.shape)
        shape[dim] = top + bottom
        return x.sum() * 0 + x.new_full(shape, value)
    return F.pad(x, pads, value=value)


def border(window: Affine, rows: Rows, got: Rows) -> tuple[int, int]:
    """Rows of padding above and below the slice, for output rows `rows`."""
    start = rows.lo * window.step + window.first
    stop = (rows.hi - 1) * window.step + window.last + 1
    top = min(max(0, -start), stop - start)
    return top, stop - start - top - got.size


def _spare_rows(pads: tuple[int, int], padding: int, stride: int, got: Rows) -> int | None:
    """Where a band at the border of the image needs padding on one side only: pad both sides all the same,
    compute a row or two too many and drop them, rather than copy the slice to pad it (autograd would keep the
    copy). Returns the first row to take, or None where this does not apply."""
    top, bottom = pads
    if top == bottom or not got.size or max(top, bottom) > padding or (padding - top) % stride:
        return None
    return (padding - top) // stride


def _makes(window: Affine, padding: int) -> Callable[[Rows, Rows], int]:
    """Rows computed where `_spare_rows` applies."""

    def makes(rows: Rows, got: Rows) -> int:
        if _spare_rows(border(window, rows, got), padding, window.step, got) is None:
            return rows.size
        return (got.size + 2 * padding - (window.last - window.first) - 1) // window.step + 1

    return makes


def conv(q: Question) -> RowRule | Opaque:
    """aten.conv1d / conv2d / conv3d with any stride, padding (also `same`), dilation and groups."""
    x, w = q.node.args[0].name, q.node.args[1].name
    dim, spatial = q.dims[x], len(q.shape(w)) - 2
    if len(q.shape(x)) != spatial + 2:
        return Opaque("a convolution without a batch axis")
    if dim is None or dim < 2:
        return along(q, lambda q, d: d == 1, "a convolution mixes channels")
    if any(d is not None for n, d in q.dims.items() if n != x):
        return Opaque("a convolution's weight depends on the image")
    kernel = q.shape(w)[2:]
    stride, dilation = (
        expand_ints(q.arg(3, "stride", 1), spatial),
        expand_ints(q.arg(5, "dilation", 1), spatial),
    )
    pads, groups, i = _weight_pads(q, spatial, dilation, kernel), int(q.arg(6, "groups", 1)), dim - 2
    window = convolution(q.shape(x)[dim], q.out[dim], kernel[i], stride[i], pads[i][0], dilation[i])
    function = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[spatial]
    spare = pads[i][0] if pads[i][0] == pads[i][1] else 0

    def run(slab: Slab, function: Convolution = function) -> Tensor:
        args = replace(slab.node.args, slab.tensors.__getitem__)
        bias = args[2] if len(args) > 2 else replace(slab.node.kwargs, slab.tensors.__getitem__).get("bias")
        here = list(pads)
        here[i] = border(window, slab.rows, slab.reads[x])
        first = _spare_rows(here[i], spare, stride[i], slab.reads[x])
        if first is not None:
            here[i] = (spare, spare)
        image, plain = _asymmetric(args[0], here)
        out = function(image, args[1], bias, stride, plain, dilation, groups)
        return out if first is None else cut(out, dim, first, slab.rows.size)

    reads = {n: WHOLE for n in q.node.inputs} | {x: Read(dim, window)}
    return RowRule(dim, reads, run, makes=_makes(window, spare), unvalued=partial(run, function=unvalued))


def _asymmetric(x: Tensor, pads: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    """Pad explicitly where the two sides differ; what is left for the operator itself."""
    plain = []
    for i, (before, after) in enumerate(pads):
        if before == after and x.shape[i + 2] > 0:
            plain.append(before)
        else:
            x = pad_rows(x, i + 2, before, after)
            plain.append(0)
    return x, plain


def conv_transpose(q: Question) -> RowRule | Opaque:
    """aten.conv_transpose1d / 2d / 3d: output row i gets input rows j with i = j*stride - padding + d*tap."""
    x, w = q.node.args[0].name, q.node.args[1].name
    dim, spatial = q.dims[x], len(q.shape(w)) - 2
    if dim is None or dim < 2 or len(q.shape(x)) != spatial + 2:
        return along(q, lambda q, d: d == 1, "a convolution mixes channels")
    if any(d is not None for n, d in q.dims.items() if n != x):
        return Opaque("a convolution's weight depends on the image")
    stride, padding = (
        expand_ints(q.arg(3, "stride", 1), spatial),
        expand_ints(q.arg(4, "padding", 0), spatial),
    )
    extra, groups = expand_ints(q.arg(5, "output_padding", 0), spatial), int(q.arg(6, "groups", 1))
    dilation, i = expand_ints(q.arg(7, "dilation", 1), spatial), dim - 2
    kernel = q.shape(w)[2 + i]
    window = transposed(q.shape(x)[dim], q.out[dim], kernel, stride[i], padding[i], dilation[i])
    function = {
        1: aten.conv_transpose1d.default,
        2: aten.conv_transpose2d.input,
        3: aten.conv_transpose3d.input,
    }[spatial]
    extent = dilation[i] * (kernel - 1)

    def run(slab: Slab, function: Convolution = function) -> Tensor:
        args = replace(slab.node.args, slab.tensors.__getitem__)
        bias = args[2] if len(args) > 2 else replace(slab.node.kwargs, slab.tensors.__getitem__).get("bias")
        got, image, shift = slab.reads[x], args[0], 0
        if got.size == 0:  # rows that no input reaches (output padding): the bias alone, by a row of zeros
            image = pad_rows(image, dim, 1, 0)
            shift = extent + stride[i]  # beyond every tap
        pad, out_pad = list(padding), list(extra)
        pad[i] = 0
        # Unpadded, the slice gives rows from got.lo*stride - padding on; take ours, extended by zeros.
        out_pad[i] = 0
        full = function(image, args[1], bias if got.size else None, stride, pad, out_pad, groups, dilation)
        first = slab.rows.lo - (got.lo * stride[i] - padding[i]) if got.size else shift
        return crop_rows(full, dim, first, slab.rows.size, bias)

    def makes(rows: Rows, got: Rows) -> int:
        full = (got.size - 1) * stride[i] + extent + 1
        first = rows.lo - (got.lo * stride[i] - padding[i])
        return full if got.size and first >= 0 and first + rows.size <= full else rows.size

    reads = {n: WHOLE for n in q.node.inputs} | {x: Read(dim, window)}
    return RowRule(dim, reads, run, makes=makes, unvalued=partial(run, function=unvalued_transposed))


def crop_rows(full: Tensor, dim: int, first: int, rows: int, bias: Tensor | None) -> Tensor:
    """Rows [first, first + rows) of a tensor that goes on above and below with the bias alone."""
    have = full.shape[dim]
    lo, hi = min(max(first, 0), have), min(max(first + rows, 0), have)
    part = cut(full, dim, lo, hi - lo) if hi > lo else full.narrow(dim, 0, 0)
    above = min(max(0, -first), rows)
    below = rows - above - part.shape[dim]
    if above == below == 0:
        return part
    shape = list(full.shape)
    pieces = []
    for count in (above, None, below):
        if count is None:
            pieces.append(part)
        elif count:
            shape[dim] = count
            blank = full.new_zeros(shape)
            if bias is not None:
                blank = blank + bias.reshape(1, -1, *([1] * (full.dim() - 2))).to(full.dtype)
            pieces.append(blank)
    return torch.cat(pieces, dim)


def _pool_geometry(q: Question, dim: int, dilation_at: int | None) -> tuple[Affine, list[list[int]]]:
    spatial = len(q.shape(q.node.inputs[0])) - 2
    kernel = expand_ints(q.arg(1, "kernel_size", 1), spatial)
    stride = expand_ints(q.arg(2, "stride", None) or kernel, spatial)
    padding = expand_ints(q.arg(3, "padding", 0), spatial)
    dilation = expand_ints(q.arg(dilation_at, "dilation", 1), spatial) if dilation_at else [1] * spatial
    i = dim - 2
    rows = q.shape(q.node.inputs[0])[dim]
    window = convolution(rows, q.out[dim], kernel[i], stride[i], padding[i], dilation[i])
    return window, [kernel, stride, padding, dilation]


def max_pool(q: Question) -> RowRule | Opaque:
    """aten.max_pool1d / 2d / 3d: rows beyond the image are minus infinity; ceil_mode by explicit rows."""
    x = q.node.inputs[0]
    dim = q.dims[x]
    if dim is None or dim < 2 or len(q.shape(x)) != _rank(q):
        return along(q, lambda q, d: len(q.shape(x)) != _rank(q), "a pool without a batch axis")
    window, (kernel, stride, padding, dilation) = _pool_geometry(q, dim, 4)
    ceil, i = bool(q.arg(5, "ceil_mode", False)), dim - 2

    def run(slab: Slab) -> Tensor:
        pad = list(padding)
        top, bottom = border(window, slab.rows, slab.reads[x])
        pad[i] = 0
        image = slab.tensors[x]
        first = _spare_rows((top, bottom), padding[i], stride[i], slab.reads[x])
        if first is not None:
            pad[i] = padding[i]
            out = slab.node.target(image, kernel, stride, pad, dilation, ceil)
            return cut(out, dim, first, slab.rows.size)
        if top == bottom and top <= kernel[i] // 2:
            pad[i] = top
        else:
            image = pad_rows(image, dim, top, bottom, float("-inf"))
        return slab.node.target(image, kernel, stride, pad, dilation, ceil)  # type: ignore[no-any-return]

    return RowRule(dim, {x: Read(dim, window)}, run, makes=_makes(window, padding[i]))


def avg_pool(q: Question) -> RowRule | Opaque:
    """aten.avg_pool1d / 2d / 3d. The divisor is a product over axes; ours is corrected row by row where the
    window leaves the image."""
    x = q.node.inputs[0]
    dim = q.dims[x]
    if dim is None or dim < 2 or len(q.shape(x)) != _rank(q):
        return along(q, lambda q, d: len(q.shape(x)) != _rank(q), "a pool without a batch axis")
    window, (kernel, stride, padding, _) = _pool_geometry(q, dim, None)
    ceil, counted = bool(q.arg(4, "ceil_mode", False)), bool(q.arg(5, "count_include_pad", True))
    override, i, rows = q.arg(6, "divisor_override", None), dim - 2, q.shape(x)[dim]
    shares = Tables()

    def divisor(row: int) -> int:
        start = row * stride[i] - padding[i]
        stop = min(start + kernel[i], rows + padding[i])
        return stop - start if counted else min(stop, rows) - max(start, 0)

    def run(slab: Slab) -> Tensor:
        top, bottom = border(window, slab.rows, slab.reads[x])
        pad = list(padding)
        pad[i] = 0
        image = pad_rows(slab.tensors[x], dim, top, bottom)
        extra = (override,) if override is not None else ()
        out = slab.node.target(image, kernel, stride, pad, ceil, counted, *extra)
        share = tuple(1.0 if override else kernel[i] / divisor(r) for r in range(*slab.rows))
        if any(s != 1.0 for s in share):
            out = out * shares.column(share, out, dim)
        return out  # type: ignore[no-any-return]

    return RowRule(dim, {x: Read(dim, window)}, run)


def _rank(q: Question) -> int:
    """max_pool2d works on N x C x H x W: the digit in the name, plus two."""
    return int(next(c for c in q.node.op if c.isdigit())) + 2


WINDOWS: dict[str, Callable[[Question], RowRule | Opaque]] = {
    "conv1d": conv,
    "conv2d": conv,
    "conv3d": conv,
    "conv_transpose1d": conv_transpose,
    "conv_transpose2d": conv_transpose,
    "conv_transpose3d": conv_transpose,
    "max_pool1d": max_pool,
    "max_pool2d": max_pool,
    "max_pool3d": max_pool,
    "max_pool2d_with_indices.0": max_pool,
    "max_pool3d_with_indices.0": max_pool,
    "avg_pool1d": avg_pool,
    "avg_pool2d": avg_pool,
    "avg_pool3d": avg_pool,
}
