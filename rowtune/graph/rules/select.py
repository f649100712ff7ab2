"""Operators that reorder, repeat, pick or sum up entries of other axes than the band's; conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rowtune.graph.rules.pointwise import along
from rowtune.graph.rules.rule import WHOLE, Opaque, Question, Read, RowRule, Slab, cut
from rowtune.rows import Affine, Rows
from rowtune.rows import pointwise as same_rows


def over(position: int, default: int | None = None) -> Callable[[Question], RowRule | Opaque]:
    """An operator that mixes the axes named by its argument at `position`; without one, `default` or all."""

    def rule(q: Question) -> RowRule | Opaque:
        """max, min, median, topk, sort, norms, logsumexp, prod ... over other axes than the band's."""
        x = q.node.inputs[0]
        dim, rank, gone = q.dims[x], len(q.shape(x)), _axes(q, position, "dim", default)
        if len(q.node.inputs) > 1 or dim is None:
            return Opaque(f"{q.node.op} of several feature maps")
        if dim in gone:
            return Opaque(f"{q.node.op} over the band axis")
        out = dim if rank == len(q.out) else dim - sum(a < dim for a in gone)
        return RowRule(out, {x: Read(dim, same_rows(q.out[out]))})

    return rule


def _axes(q: Question, position: int, name: str, default: int | None = None) -> set[int]:
    """The dimensions of the first input that an argument names; all of them where it names none."""
    rank = len(q.shape(q.node.inputs[0]))
    given: Any = q.arg(position, name, default)
    listed = [given] if isinstance(given, int) else list(given or ())
    return {int(d) % rank for d in listed} or set(range(rank))


def extreme(q: Question) -> RowRule | Opaque:
    """max and min of all entries need all rows."""
    return Opaque(f"{q.node.op} over the band axis")


def cosine_similarity(q: Question) -> RowRule | Opaque:
    """The product of two feature maps along another axis, each divided by its length."""
    x, y = (a.name for a in q.node.args[:2])
    dim, at = q.dims[x], int(q.arg(2, "dim", 1)) % len(q.shape(x))
    if dim is None or dim != q.dims[y] or q.shape(x) != q.shape(y) or dim == at:
        return Opaque("a cosine similarity over or across the band axis")
    out = dim - (at < dim)
    return RowRule(out, {n: Read(dim, same_rows(q.out[out])) for n in (x, y)})


def flip(q: Question) -> RowRule | Opaque:
    """flip of other axes."""
    return along(q, lambda q, d: d in _axes(q, 1, "dims"), "a flip of the band axis")


def roll(q: Question) -> RowRule | Opaque:
    """roll along other axes; along the band axis it wraps around."""
    return along(q, lambda q, d: d in _axes(q, 2, "dims"), "a roll along the band axis")


def repeat(q: Question) -> RowRule | Opaque:
    """repeat and tile along other axes; new axes in front."""
    x = q.node.inputs[0]
    dim, grown = q.dims[x], len(q.out) - len(q.shape(x))
    if dim is None or q.out[dim + grown] != q.shape(x)[dim]:
        return Opaque(f"{q.node.op} along the band axis")
    return RowRule(dim + grown, {x: Read(dim, same_rows(q.out[dim + grown]))})


def repeat_interleave(q: Question) -> RowRule | Opaque:
    """Every entry a fixed number of times in a row, along any axis: nearest magnification."""
    x, times = q.node.inputs[0], q.node.args[1]
    dim, at = q.dims[x], q.arg(2, "dim", None)
    if dim is None or not isinstance(times, int) or at is None:
        return Opaque("repeat_interleave of all entries, or by a tensor")
    if int(at) % len(q.out) != dim:
        return RowRule(dim, {x: Read(dim, same_rows(q.out[dim]))})

    def run(slab: Slab) -> Tensor:
        return cut(slab.call(), dim, slab.rows.lo - slab.reads[x].lo * times, slab.rows.size)

    def makes(rows: Rows, got: Rows) -> int:
        return got.size * times

    window = Affine(q.shape(x)[dim], q.out[dim], 1, times)
    return RowRule(dim, {x: Read(dim, window)}, run, makes=makes)


def index_select(q: Question) -> RowRule | Opaque:
    """Entries of another axis, by a list that does not depend on the image."""
    return along(q, lambda q, d: d == int(q.arg(1, "dim", 0)) % len(q.out), "rows are picked by index")


def index(q: Question) -> RowRule | Opaque:
    """x[:, [2, 0, 1]]: one list of entries along another axis."""
    x, lists = q.node.inputs[0], list(q.node.args[1])
    at = [d for d, entry in enumerate(lists) if entry is not None]
    dim = q.dims[x]
    if dim is None or len(at) != 1 or at[0] == dim or any(q.dims[n] is not None for n in q.node.inputs[1:]):
        return Opaque("rows are picked by index, or by what the image says")
    out = dim + (len(q.shape(lists[at[0]].name)) - 1) * (at[0] < dim)
    reads: dict[str, Read] = dict.fromkeys(q.node.inputs, WHOLE)
    return RowRule(out, reads | {x: Read(dim, same_rows(q.out[out]))})


def gather(q: Question) -> RowRule | Opaque:
    """gather along another axis, by an index of the same rows."""
    x, picked = q.node.args[0].name, q.node.args[2].name
    dim, at = q.dims[x], int(q.arg(1, "dim", 0)) % len(q.out)
    if dim is None or dim == at or q.shape(picked)[dim] != q.shape(x)[dim] or x == picked:
        return Opaque("rows are picked by index")
    if q.dims[picked] not in (None, dim):
        return Opaque("its inputs are banded along different axes")
    return RowRule(dim, {n: Read(dim, same_rows(q.out[dim])) for n in (x, picked)})


def type_as(q: Question) -> RowRule | Opaque:
    """A conversion to the type of another tensor, of which any rows will do."""
    x, like = (a.name for a in q.node.args[:2])
    dim = q.dims[x]
    if dim is None:
        return Opaque("type_as a feature map")
    reads = {x: Read(dim, same_rows(q.out[dim]))}
    own = q.dims[like]
    if own is not None and q.shape(like)[own] != q.out[dim]:
        return Opaque("type_as a feature map of another height")
    other = WHOLE if own is None else Read(own, same_rows(q.out[dim]))
    return RowRule(dim, {like: other} | reads)


_OVER_AXIS_1 = ("aminmax", "cummax", "cummin", "max", "median", "min", "std_mean", "var_mean")

SELECTIONS: dict[str, Callable[[Question], RowRule | Opaque]] = {
    # ".0" and ".1" are the parts of an operator with several outputs (graph/parts.py).
    **{f"{op}.{i}": over(1) for op in _OVER_AXIS_1 for i in (0, 1)},
    **{f"{op}.{i}": over(1, -1) for op in ("sort", "mode") for i in (0, 1)},
    **{f"{op}.{i}": over(2, -1) for op in ("topk", "kthvalue") for i in (0, 1)},
    "max": extreme,
    "min": extreme,
    "argmin": over(1),
    "argsort": over(1, -1),
    "logsumexp": over(1),
    "prod": over(1),
    "linalg_vector_norm": over(2),
    "norm": over(2),
    "cumprod": over(1),
    "cosine_similarity": cosine_similarity,
    "type_as": type_as,
    "flip": flip,
    "roll": roll,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "index_select": index_select,
    "index": index,
    "gather": gather,
}
