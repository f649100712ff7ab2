"""Rounded to four bits: an eighth of float32, and a scale for each channel of each image.

Every element obeys |kept - x| <= max|x| / 7, the maximum over its channel of its image; signs are kept, and
zeros are zeros (rowtune/kernels/rounding.py). Of tensors with an infinity or a nan nothing is promised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.kernels.rounding import Codes, doubled, halved, in_place, restored, rounded
from rowtune.runtime.stores.store import Lay, Part, cut

MOST = 7


class Halves(NamedTuple):
    """Codes, two in a byte: neighbours along dimension `dim` (None: all of them in a row). `shape` is that of
    the codes, whose dimensions, like those of `halves`, are in the order of memory."""

    halves: Tensor
    scale: Tensor
    order: tuple[int, ...]
    dtype: torch.dtype
    shape: torch.Size
    dim: int | None


class Int4:
    def takes(self, t: Tensor) -> bool:
        return t.is_floating_point() and t.dim() > 0 and t.numel() > 0

    def put(self, t: Tensor, along: tuple[int, ...] = ()) -> Halves:
        """What parts are to be cut of shares its bytes along the longest other dimension."""
        codes, scale, order, dtype = rounded(t, MOST)
        if not along:
            return Halves(halved(codes.flatten(), 0), scale, order, dtype, codes.shape, None)
        dim = max(range(t.dim()), key=lambda d: (order[d] not in along, codes.shape[d]))
        return Halves(halved(codes, dim), scale, order, dtype, codes.shape, dim)

    def get(self, handle: Halves) -> Tensor:
        return restored(self._codes(handle, ()))

    def rows(self, handle: Halves, part: Part, lay: Lay) -> Tensor:
        codes, scale = in_place(self._codes(handle, part))
        return lay.blank(part).copy_(codes).mul_(cut(scale, part))

    def _codes(self, handle: Halves, part: Part) -> Codes:
        """With the codes of a part alone."""
        halves, scale, order, dtype, shape, dim = handle
        part = tuple((order.index(d), first, many) for d, first, many in part)
        if dim is None:
            codes = cut(doubled(halves, 0, shape.numel()).view(shape), part)
        else:
            across = tuple(one for one in part if one[0] == dim)
            rest = tuple(one for one in part if one[0] != dim)
            codes = cut(doubled(cut(halves, rest), dim, shape[dim]), across)
        return Codes(codes, scale, order, dtype)

    def bytes(self, handle: Halves) -> int:
        return handle.halves.numel() + handle.scale.numel() * handle.scale.itemsize
