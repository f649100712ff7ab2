"""Largest and smallest values as reductions. Shares are float64 pairs along a new first dimension: the
value, and what is needed to hand its gradient to the rows that attain it, as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowtune.rows import Rows


def extremes(x: Tensor, sign: int) -> Tensor:
    """(the largest of sign * x over the spatial axes, how often it occurs, where first)."""
    return extremes_of(x, sign, 2, Rows(0, x.shape[2]), x.shape[2])


def extremes_of(x: Tensor, sign: int, dim: int, rows: Rows, height: int) -> Tensor:
    """The same for rows `rows` of `height`, along `dim`."""
    flat = (x * sign).flatten(2)
    best, at = flat.max(-1, keepdim=True)
    where = _unflat(at, x.shape[2:])
    where[dim - 2] = where[dim - 2] + rows.lo
    ties = (flat == best).sum(-1, keepdim=True)
    found = torch.stack((best.double(), ties.double(), _flat(where, _full(x, dim, height)).double()))
    return found.view(3, *x.shape[:2], *[1] * (x.dim() - 2))


def merge_extremes(a: Tensor, b: Tensor) -> Tensor:
    best = torch.maximum(a[0], b[0])
    mine, other = a[0] == best, b[0] == best
    first = torch.where(mine & other, torch.minimum(a[2], b[2]), torch.where(mine, a[2], b[2]))
    return torch.stack((best, a[1] * mine + b[1] * other, first))


def extremes_again(x: Tensor, sign: int, total: Tensor, dim: int, rows: Rows, height: int) -> Tensor:
    """Ties share the gradient, as in PyTorch. A row computed again may differ in its last bits, so that one
    extreme is found by its place, and ties (zeros, mostly) with a little tolerance."""
    best, ties, first = total
    alone = _read_at(x * sign, first, dim, rows, height)
    near = 4 * torch.finfo(x.dtype).eps * best.abs()
    hit = ((x * sign).double() - best).abs() <= near
    shared = torch.where(hit, (x * sign).double(), 0.0).sum(tuple(range(2, x.dim())), keepdim=True) / ties
    share = torch.where(ties == 1, alone, shared)
    return torch.stack((share, torch.zeros_like(share), torch.zeros_like(share)))


def take(found: Tensor, which: int, sign: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (found[which] * sign).reshape(shape).to(dtype)


def cell(i: int, size: int, rows: int) -> Rows:
    """Rows that output row `i` of an adaptive pool with `size` output rows covers."""
    return Rows(i * rows // size, -((i + 1) * rows // -size))


def largest(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(the largest value of each cell, its flat position) of an adaptive max pool over the spatial axes."""
    return largest_of(x, size, 2, Rows(0, x.shape[2]), x.shape[2])


def largest_of(x: Tensor, size: tuple[int, ...], dim: int, rows: Rows, height: int) -> Tensor:
    """The same for rows `rows` of `height`, along `dim`: cells that have none of them are -inf."""
    rank = len(size)
    pool = (torch.nn.functional.adaptive_max_pool1d, torch.nn.functional.adaptive_max_pool2d,
            torch.nn.functional.adaptive_max_pool3d)[rank - 1]  # fmt: skip
    full = _full(x, dim, height)
    cells = []
    for i in range(size[dim - 2]):
        want = cell(i, size[dim - 2], height)
        lo, hi = max(want.lo, rows.lo), min(want.hi, rows.hi)
        out = [*size]
        out[dim - 2] = 1
        if lo >= hi:
            value = x.new_full((*x.shape[:2], *out), -torch.inf).double()
            cells.append(torch.stack((value, torch.zeros_like(value))))
            continue
        part = x.narrow(dim, lo - rows.lo, hi - lo)
        value, at = pool(part, out, return_indices=True)
        where = _unflat(at, part.shape[2:])
        where[dim - 2] = where[dim - 2] + lo
        cells.append(torch.stack((value.double(), _flat(where, full).double())))
    return torch.cat(cells, dim + 1)


def _flat(where: list[Tensor], shape: list[int]) -> Tensor:
    total = where[0]
    for at, size in zip(where[1:], shape[1:], strict=True):
        total = total * size + at
    return total


def _unflat(at: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """torch.unravel_index, which makes tensors of the shape."""
    where = []
    for size in reversed(shape):
        where.append(at % size)
        at = at // size
    return where[::-1]


def merge_largest(a: Tensor, b: Tensor) -> Tensor:
    """The larger value; of equal ones the first."""
    other = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
    return torch.where(other, b, a)


def largest_again(x: Tensor, total: Tensor, dim: int, rows: Rows, height: int) -> Tensor:
    """The maxima that lie in `rows`, read from x, zero elsewhere."""
    value = _read_at(x, total[1], dim, rows, height)
    return torch.stack((value, torch.zeros_like(value)))


def _read_at(x: Tensor, place: Tensor, dim: int, rows: Rows, height: int) -> Tensor:
    """The elements of x at flat positions in the whole map, zero where they are not among `rows`."""
    where = _unflat(place.long(), _full(x, dim, height))
    here = (where[dim - 2] >= rows.lo) & (where[dim - 2] < rows.hi)
    where[dim - 2] = (where[dim - 2] - rows.lo).clamp(0, max(rows.size - 1, 0))
    flat = _flat(where, [*x.shape[2:]]).flatten(2)
    return x.flatten(2).gather(2, flat).view(place.shape).double() * here


def _full(x: Tensor, dim: int, height: int) -> list[int]:
    full = [*x.shape[2:]]
    full[dim - 2] = height
    return full
