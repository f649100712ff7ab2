"""Rounded to eight bits: a quarter of float32, and a scale for each channel of each image.

Every element obeys |kept - x| <= max|x| / 127, the maximum over its channel of its image; signs are kept, and
zeros are zeros (rowtune/kernels/rounding.py). Of tensors with an infinity or a nan nothing is promised.
"""

from __future__ import annotations

from torch import Tensor

from rowtune.kernels.rounding import Codes, in_place, restored, rounded
from rowtune.runtime.stores.store import Lay, Part, cut

MOST = 127


class Int8:
    def takes(self, t: Tensor) -> bool:
        return t.is_floating_point() and t.dim() > 0 and t.numel() > 0

    def put(self, t: Tensor, along: tuple[int, ...] = ()) -> Codes:
        return rounded(t, MOST)

    def get(self, handle: Codes) -> Tensor:
        return restored(handle)

    def rows(self, handle: Codes, part: Part, lay: Lay) -> Tensor:
        codes, scale = in_place(handle)
        return lay.blank(part).copy_(cut(codes, part)).mul_(cut(scale, part))

    def bytes(self, handle: Codes) -> int:
        return handle.codes.numel() + handle.scale.numel() * handle.scale.itemsize
