"""Operators that move data without arithmetic: views, transposes, slices, cats, pads, pixel shuffle.

The band axis is tracked through them; sizes written into their arguments are replaced by the slice's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.graph.rules.rule import Opaque, Question, Read, RowRule, Run, Slab, as_is, cut
from rowtune.kernels.constants import Tables
from rowtune.kernels.unvalued import unvalued_shuffle
from rowtune.rows import Affine, Rows, gather
from rowtune.rows import pointwise as same_rows

_END = 2**62


def _moved(q: Question, out_dim: int | None, why: str, run: Run = as_is) -> RowRule | Opaque:
    """The first input's rows are the output's rows, along another dimension."""
    x = q.node.inputs[0]
    dim = q.dims[x]
    if dim is None or out_dim is None or q.out[out_dim] != q.shape(x)[dim]:
        return Opaque(why)
    return RowRule(out_dim, {x: Read(dim, same_rows(q.out[out_dim]))}, run)


def permute(q: Question) -> RowRule | Opaque:
    """The band axis changes places with others."""
    x = q.node.inputs[0]
    rank, dim = len(q.shape(x)), q.dims[x]
    order = [int(d) % rank for d in q.arg(1, "dims", ())]
    return _moved(q, order.index(dim) if dim is not None else None, "permute")


def movedim(q: Question) -> RowRule | Opaque:
    """The band axis changes places with others."""
    x = q.node.inputs[0]
    rank, dim = len(q.shape(x)), q.dims[x]
    source, target = (q.arg(k, n, 0) for k, n in ((1, "source"), (2, "destination")))
    source = [int(d) % rank for d in ([source] if isinstance(source, int) else source)]
    target = [int(d) % rank for d in ([target] if isinstance(target, int) else target)]
    rest = iter(d for d in range(rank) if d not in source)
    order = [source[target.index(d)] if d in target else next(rest) for d in range(rank)]
    return _moved(q, order.index(dim) if dim is not None else None, "movedim")


def transpose(q: Question) -> RowRule | Opaque:
    """The band axis changes places with others."""
    x = q.node.inputs[0]
    rank, dim = len(q.shape(x)), q.dims[x]
    if q.node.op in ("t", "numpy_T"):  # of matrices
        first, second = 0, 1
    elif q.node.op == "mT":
        first, second = rank - 2, rank - 1
    else:
        first, second = int(q.arg(1, "dim0", 0)) % rank, int(q.arg(2, "dim1", 1)) % rank
    return _moved(q, {first: second, second: first}.get(dim, dim) if dim is not None else None, "transpose")


def view(q: Question) -> RowRule | Opaque:
    """view, reshape, flatten, unflatten: the band axis stays, or it is the first of the axes that are merged
    or split, so that rows become multiples or parts of rows."""
    x = q.node.inputs[0]
    dim, shape, out = q.dims[x], q.shape(x), q.out
    if dim is None:
        return Opaque("a view")
    before = math.prod(shape[:dim])
    starts = [e for e in range(len(out)) if math.prod(out[:e]) == before]
    found = [e for e in starts if out[e] == shape[dim]]
    if found:
        # Among size-one neighbours the last candidate keeps its distance from the end like the input's.
        best = min(found, key=lambda e: abs((len(out) - e) - (len(shape) - dim)))
        return _moved(q, best, "a view", _reshape)
    if not starts or shape[dim] == 1:
        return Opaque(f"{q.node.op} merges the band axis with others")
    return _regrouped(q, x, dim, starts[-1])


def _regrouped(q: Question, x: str, dim: int, out_dim: int) -> RowRule:
    """One row of the input holds `whole` elements, one of the output `part`; both count from the same place,
    so output row k reads input rows floor(k part / whole) to floor(((k + 1) part - 1) / whole)."""
    whole, part = math.prod(q.shape(x)[dim + 1 :]), math.prod(q.out[out_dim + 1 :])
    common = math.gcd(whole, part)
    whole, part = whole // common, part // common
    window = Affine(q.shape(x)[dim], q.out[out_dim], part, whole, 0, part - 1)

    def run(slab: Slab) -> Tensor:
        got, rows, image = slab.reads[x], slab.rows, slab.tensors[x]
        image = image.flatten(dim)
        start = rows.lo * part - got.lo * whole
        if start or rows.size * part != got.size * whole:
            image = image.narrow(dim, start * common, rows.size * part * common)
        return image.reshape(slab.shape)

    def makes(rows: Rows, got: Rows) -> int:
        return max(rows.size, got.size * whole // part)

    return RowRule(out_dim, {x: Read(dim, window)}, run, makes=makes)


def _reshape(slab: Slab) -> Tensor:
    return slab.tensors[slab.node.inputs[0]].reshape(slab.shape)


def _expanded(slab: Slab) -> Tensor:
    return slab.tensors[slab.node.inputs[0]].expand(slab.shape)


def expand(q: Question) -> RowRule | Opaque:
    """expand along other axes."""
    x = q.node.inputs[0]
    dim = q.dims[x]
    out = None if dim is None else dim + len(q.out) - len(q.shape(x))
    return _moved(q, out, "expand along the band axis", _expanded)


def unsqueeze(q: Question) -> RowRule | Opaque:
    """A new axis of one entry."""
    x = q.node.inputs[0]
    dim, at = q.dims[x], int(q.arg(1, "dim", 0)) % len(q.out)
    return _moved(q, None if dim is None else dim + (at <= dim), "unsqueeze")


def squeeze(q: Question) -> RowRule | Opaque:
    """Axes of one entry, other than the band's, go."""
    x = q.node.inputs[0]
    rank, dim = len(q.shape(x)), q.dims[x]
    axes: Any = q.arg(1, "dim", None)
    if axes is None or dim is None:
        return Opaque("squeeze of unnamed dimensions")
    gone = {int(a) % rank for a in ([axes] if isinstance(axes, int) else axes)}
    gone = {a for a in gone if q.shape(x)[a] == 1}
    return _moved(q, None if dim in gone else dim - sum(a < dim for a in gone), "squeeze of the band axis")


def select(q: Question) -> RowRule | Opaque:
    """One entry of another axis."""
    x = q.node.inputs[0]
    dim, at = q.dims[x], int(q.arg(1, "dim", 0)) % len(q.shape(x))
    return _moved(q, None if dim in (None, at) else dim - (at < dim), "one row is selected")


def slice_(q: Question) -> RowRule | Opaque:
    """slice, narrow: over other axes pointwise; along the band axis a crop, by absolute rows."""
    x = q.node.inputs[0]
    dim, rank = q.dims[x], len(q.shape(x))
    at = int(q.arg(1, "dim", 0)) % rank
    if dim is None or at != dim:
        return _moved(q, dim, "slice")
    size = q.shape(x)[dim]
    start = int(q.arg(2, "start", 0) or 0)
    step = int(q.arg(4, "step", 1)) if q.node.op == "slice" else 1
    start = min(max(start + size if start < 0 else start, 0), size)
    window = Affine(size, q.out[dim], step, 1, start, start)

    def run(slab: Slab) -> Tensor:
        image = slab.tensors[x]
        if step == 1:
            return image
        return torch.ops.aten.slice.Tensor(image, dim, 0, _END, step)  # type: ignore[no-any-return]

    return RowRule(dim, {x: Read(dim, window)}, run)


def cat(q: Question) -> RowRule | Opaque:
    """cat, stack over other axes. What has all the rows without being banded (coordinates) is sliced too."""
    at = int(q.arg(1, "dim", 0)) % len(q.out)
    new = q.node.op == "stack"
    names = [r.name for r in q.node.args[0]]
    found = {d + (new and at <= d) for n in names if (d := q.dims[n]) is not None}
    if len(found) != 1:
        return Opaque("its inputs are banded along different axes")
    dim = found.pop()
    if dim == at:
        return Opaque(f"a {q.node.op} along the band axis")
    own = dim - (new and at < dim)
    if any(len(q.shape(n)) <= own or q.shape(n)[own] != q.out[dim] for n in names):
        return Opaque("a cat with an empty tensor")
    return RowRule(dim, {n: Read(own, same_rows(q.out[dim])) for n in names})


def pixel_shuffle(q: Question) -> RowRule | Opaque:
    """pixel_shuffle N x C r^2 x H x W -> N x C x H r x W r; its inverse reads r rows a row."""
    x, factor = q.node.inputs[0], int(q.node.args[1])
    dim, rank = q.dims[x], len(q.out)
    if dim is not None and dim < rank - 3:
        return _moved(q, dim, "pixel shuffle")
    if dim is None or dim == rank - 3:
        return Opaque("pixel shuffle mixes channels")
    rows, out_rows = q.shape(x)[dim], q.out[dim]
    if q.node.op == "pixel_unshuffle":
        return RowRule(dim, {x: Read(dim, Affine(rows, out_rows, factor, 1, 0, factor - 1))})

    def run(slab: Slab, function: Callable[[Tensor, int], Tensor] = torch.pixel_shuffle) -> Tensor:
        full = function(slab.tensors[x], factor)
        return cut(full, dim, slab.rows.lo - slab.reads[x].lo * factor, slab.rows.size)

    window = Affine(rows, out_rows, 1, factor)
    without = partial(run, function=unvalued_shuffle)
    return RowRule(dim, {x: Read(dim, window)}, run, makes=lambda _, got: got.size * factor, unvalued=without)


def pad(q: Question) -> RowRule | Opaque:
    """constant, reflect and replicate pads, and negative ones (crops), by absolute rows."""
    x = q.node.inputs[0]
    dim, rank = q.dims[x], len(q.out)
    pads = [int(p) for p in q.arg(1, "pad", ())]
    mode = str(q.arg(2, "mode", "constant")) if q.node.op == "pad" else _PAD_MODES[q.node.op]
    value = q.arg(3 if q.node.op == "pad" else 2, "value", None)
    if dim is None:
        return Opaque("a pad")
    at = (rank - 1 - dim) * 2
    top = pads[at] if at < len(pads) else 0
    if mode == "circular":
        why = "a circular pad wraps around the band axis"
        return Opaque(why) if any(pads[at : at + 2]) else _moved(q, dim, why)
    rest = list(pads)
    if at < len(pads):
        rest[at] = rest[at + 1] = 0
    rows, out_rows = q.shape(x)[dim], q.out[dim]

    def others(image: Tensor) -> Tensor:
        if not any(rest):
            return image
        fill = float(value or 0) if mode == "constant" else None
        return F.pad(image, rest, mode=mode, value=fill)

    if mode == "constant":
        window = Affine(rows, out_rows, 1, 1, -top, -top)

        def run(slab: Slab) -> Tensor:
            image, got = others(slab.tensors[x]), slab.reads[x]
            above = min(max(top - slab.rows.lo, 0), slab.rows.size)
            edge = [0, 0] * (rank - 1 - dim) + [above, slab.rows.size - above - got.size]
            return F.pad(image, edge, value=float(value or 0)) if any(edge) else image

        return RowRule(dim, {x: Read(dim, window)}, run)
    source = [
        _reflected(i - top, rows) if mode == "reflect" else min(max(i - top, 0), rows - 1)
        for i in range(out_rows)
    ]
    tables = Tables()

    def run_gather(slab: Slab) -> Tensor:
        image, got = slab.tensors[x], slab.reads[x]
        picked = source[slab.rows.lo : slab.rows.hi]
        if picked != list(range(got.lo, got.hi)):
            image = image.index_select(dim, tables.index(tuple(i - got.lo for i in picked), image))
        return others(image)

    return RowRule(dim, {x: Read(dim, gather(rows, ((i, i) for i in source)))}, run_gather)


def _reflected(i: int, rows: int) -> int:
    i = -i if i < 0 else i
    return 2 * (rows - 1) - i if i >= rows else i


_PAD_MODES = {
    "constant_pad_nd": "constant",
    "reflection_pad1d": "reflect",
    "reflection_pad2d": "reflect",
    "reflection_pad3d": "reflect",
    "replication_pad1d": "replicate",
    "replication_pad2d": "replicate",
    "replication_pad3d": "replicate",
}


def channel_shuffle(q: Question) -> RowRule | Opaque:
    """Channels are interleaved."""
    x = q.node.inputs[0]
    return _moved(q, q.dims[x] if q.dims[x] != 1 else None, "channel shuffle mixes channels")


SHAPES: dict[str, Callable[[Question], RowRule | Opaque]] = {
    "permute": permute,
    "movedim": movedim,
    "moveaxis": movedim,
    "transpose": transpose,
    "swapaxes": transpose,
    "swapdims": transpose,
    "t": transpose,
    "numpy_T": transpose,
    "mT": transpose,
    "view": view,
    "reshape": view,
    "_unsafe_view": view,
    "flatten": view,
    "unflatten": view,
    "expand": expand,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "select": select,
    "slice": slice_,
    "narrow": slice_,
    "cat": cat,
    "concat": cat,
    "concatenate": cat,
    "stack": cat,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_shuffle,
    "channel_shuffle": channel_shuffle,
    "pad": pad,
    **dict.fromkeys(_PAD_MODES, pad),
}

# Sizes are written into these; without rows they still hold fewer images where a band is of some images.
WHOLE_RUNS: dict[str, Run] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    "expand": _expanded,
}
