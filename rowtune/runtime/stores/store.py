"""What a store is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rowtune.kernels.rounding import order_of

Part = tuple[tuple[int, int, int], ...]
"""Some rows, some images: (dimension, first, how many) of each dimension that is cut."""


class Lay(NamedTuple):
    """What a tensor was like: dense, `order` are its dimensions from outermost in memory to innermost."""

    shape: torch.Size
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def cut(self, part: Part) -> tuple[list[int], list[int]]:
        """Sizes and strides of a part in memory of its own."""
        size, stride, step = [*self.shape], [0] * len(self.shape), 1
        for dim, _, many in part:
            size[dim] = many
        for dim in reversed(self.order):
            stride[dim] = step
            step *= max(size[dim], 1)
        return size, stride

    def blank(self, part: Part = (), dtype: torch.dtype | None = None) -> Tensor:
        """New memory for a part."""
        return torch.empty_strided(*self.cut(part), dtype=dtype or self.dtype, device=self.device)


def lay_of(t: Tensor) -> Lay:
    """Of a tensor as it is, dense."""
    return Lay(t.shape, order_of(t.stride()), t.dtype, t.device)


class Store(Protocol):
    """Keeps tensors elsewhere, or otherwise, until backward wants them.

    A handle is a NamedTuple; what of it a list of calls is given are its fields that are no plain values: see
    `rowtune/runtime/stores/shelf.py`.
    """

    def takes(self, t: Tensor) -> bool:
        """Whether there is something to gain, and nothing to lose that must not be lost."""

    def put(self, t: Tensor, along: tuple[int, ...] = ()) -> Any:
        """A handle; the tensor itself may be let go of, or written to. Parts will mostly be cut `along` these
        dimensions."""

    def get(self, handle: Any) -> Tensor:
        """The tensor on its device, dense in the order of its strides; as often as it is asked for."""

    def rows(self, handle: Any, part: Part, lay: Lay) -> Tensor:
        """A part of the tensor, which was like `lay`, in new memory."""

    def bytes(self, handle: Any) -> int:
        """On the device, between put and get."""


def cut(t: Tensor, part: Part) -> Tensor:
    """A view of a part; dimensions of one element stand for as many as there are."""
    for dim, first, size in part:
        if t.shape[dim] > 1:
            t = t.narrow(dim, first, size)
    return t
