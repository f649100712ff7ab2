"""Rounded to bfloat16: half of float32, with the same exponents.

Every element obeys |kept - x| <= 2^-8 |x|; signs are kept, and zeros are zeros (what is smaller than 1e-38
may become one). What is recomputed from rounded inputs is a slightly different network, whose ReLUs and pools
may decide otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.runtime.stores.store import Lay, Part, cut


class Rounded(NamedTuple):
    tensor: Tensor
    dtype: torch.dtype


class BF16:
    def takes(self, t: Tensor) -> bool:
        return t.is_floating_point() and t.itemsize > 2

    def put(self, t: Tensor, along: tuple[int, ...] = ()) -> Rounded:
        return Rounded(t.to(torch.bfloat16), t.dtype)

    def get(self, handle: Rounded) -> Tensor:
        return handle.tensor.to(handle.dtype)

    def rows(self, handle: Rounded, part: Part, lay: Lay) -> Tensor:
        return lay.blank(part).copy_(cut(handle.tensor, part))

    def bytes(self, handle: Rounded) -> int:
        return handle.tensor.numel() * handle.tensor.itemsize
