"""Rounded to float16, each tensor multiplied by a power of two that brings its largest element near 2^15:
half of float32, with three bits more than bfloat16.

Every element obeys |kept - x| <= 2^-11 |x| + 2^-39 max|x|; signs are kept, and zeros are zeros (what is
smaller than 2^-39 of the largest may become one). Of tensors with an infinity or a nan nothing is promised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.runtime.stores.store import Lay, Part, cut

LARGEST = 2.0**15


class Scaled(NamedTuple):
    tensor: Tensor
    scale: Tensor
    dtype: torch.dtype


class FP16:
    def takes(self, t: Tensor) -> bool:
        return t.is_floating_point() and t.itemsize > 2 and t.numel() > 0

    def put(self, t: Tensor, along: tuple[int, ...] = ()) -> Scaled:
        most = torch.maximum(t.amax(), -t.amin())
        exponent = torch.frexp(LARGEST / most.clamp_(min=1e-30))[1] - 1
        scale = torch.ldexp(torch.ones_like(most), exponent)
        half = torch.empty_like(t, dtype=torch.float16)
        return Scaled(torch.mul(t, scale, out=half), scale, t.dtype)

    def get(self, handle: Scaled) -> Tensor:
        return handle.tensor.to(handle.dtype).div_(handle.scale)

    def rows(self, handle: Scaled, part: Part, lay: Lay) -> Tensor:
        return lay.blank(part).copy_(cut(handle.tensor, part)).div_(handle.scale)

    def bytes(self, handle: Scaled) -> int:
        return handle.tensor.numel() * handle.tensor.itemsize + handle.scale.itemsize
