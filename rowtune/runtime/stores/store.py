"""What a store is."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

Part = tuple[tuple[int, int, int], ...]
"""Some rows, some images: (dimension, first, how many) of each dimension that is cut."""


class Store(Protocol):
    """Keeps tensors elsewhere, or otherwise, until backward wants them."""

    def takes(self, t: Tensor) -> bool:
        """Whether there is something to gain, and nothing to lose that must not be lost."""

    def put(self, t: Tensor) -> Any:
        """A handle; the tensor itself may be let go of, or written to."""

    def get(self, handle: Any) -> Tensor:
        """The tensor on its device, dense in the order of its strides; as often as it is asked for."""

    def rows(self, handle: Any, part: Part, out: Tensor) -> None:
        """Write a part of the tensor into `out`, of that part's size and of the tensor's type."""

    def bytes(self, handle: Any) -> int:
        """On the device, between put and get."""


def cut(t: Tensor, part: Part) -> Tensor:
    """A view of a part; dimensions of one element stand for as many as there are."""
    for dim, first, size in part:
        if t.shape[dim] > 1:
            t = t.narrow(dim, first, size)
    return t
