"""Rounded to four bits: an eighth of float32, and a scale for each channel of each image.

Every element obeys |kept - x| <= max|x| / 7, the maximum over its channel of its image; signs are kept, and
zeros are zeros (rowtune/kernels/rounding.py). Of tensors with an infinity or a nan nothing is promised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.kernels.rounding import Codes, doubled, halved, in_place, restored, rounded
from rowtune.runtime.stores.store import Part, cut

MOST = 7


class Halves(NamedTuple):
    """`rest` has the codes' places, and no codes."""

    halves: Tensor
    shape: torch.Size
    rest: Codes


class Int4:
    def takes(self, t: Tensor) -> bool:
        return t.is_floating_point() and t.dim() > 0 and t.numel() > 0

    def put(self, t: Tensor) -> Halves:
        made = rounded(t, MOST)
        empty = made.codes.new_empty(0)
        return Halves(halved(made.codes), made.codes.shape, made._replace(codes=empty))

    def get(self, handle: Halves) -> Tensor:
        return restored(self._codes(handle))

    def rows(self, handle: Halves, part: Part, out: Tensor) -> None:
        codes, scale = in_place(self._codes(handle))
        out.copy_(cut(codes, part)).mul_(cut(scale, part))

    def _codes(self, handle: Halves) -> Codes:
        return handle.rest._replace(codes=doubled(handle.halves, handle.shape))

    def bytes(self, handle: Halves) -> int:
        return handle.halves.numel() + handle.rest.scale.numel() * handle.rest.scale.itemsize
