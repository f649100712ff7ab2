"""What a store is."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Store(Protocol):
    """Keeps tensors elsewhere, or otherwise, until backward wants them."""

    def takes(self, t: Tensor) -> bool:
        """Whether there is something to gain, and nothing to lose that must not be lost."""

    def put(self, t: Tensor) -> Any:
        """A handle; the tensor itself may be let go of, or written to."""

    def get(self, handle: Any) -> Tensor:
        """The tensor on its device, dense in the order of its strides; as often as it is asked for."""

    def bytes(self, handle: Any) -> int:
        """On the device, between put and get."""
