"""Weights as a rows segment uses them, and sums of their gradients over bands and images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from rowtune.graph.graph import Node
from rowtune.kernels.constants import device_of, zero
from rowtune.plan.remake import PRODUCTS
from rowtune.runtime.evaluate import grad_dtype
from rowtune.runtime.layout import channels_last


def cast_once(tensors: Mapping[str, Tensor], nodes: Iterable[Node]) -> dict[str, Tensor]:
    """Weights in the type that autocast gives them, where it gives them one: once a call, and not once a
    piece. Their gradients are summed in float32 all the same. What a region of the model's own reads, with an
    autocast of its own, is left to it."""
    kind = next((t.device.type for t in tensors.values()), "cpu")
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return dict(tensors)
    nodes = tuple(nodes)
    own = {name for node in nodes if node.region and node.region.autocast for name in node.inputs}
    dtype, products = torch.get_autocast_dtype(kind), _read_only_by(PRODUCTS, nodes) - own
    return {
        n: t.to(dtype) if n in products and t.is_floating_point() and t.dtype != torch.float64 else t
        for n, t in tensors.items()
    }


def last_channels(tensors: Mapping[str, Tensor], nodes: Iterable[Node]) -> dict[str, Tensor]:
    """Weights of convolutions with their channels last: so once a call, and not inside each convolution."""
    products = _read_only_by(PRODUCTS, nodes)
    return {n: channels_last(t) if n in products else t for n, t in tensors.items()}


def _read_only_by(ops: frozenset[str], nodes: Iterable[Node]) -> set[str]:
    """What nothing but these operators reads."""
    readers: dict[str, set[str]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, set()).add(node.op)
    return {name for name, found in readers.items() if found <= ops}


WAITING, DEVICE_WAITING = 1 << 16, 1 << 20
"""Bytes of gradients that wait to be added to their sums by one call. A CPU gains nothing by it; to another
device each call is a kernel to launch."""


FRESH = PRODUCTS | {"normalise"}
"""What makes gradients of weights in memory that nobody else looks at."""


class WeightSums:
    """Adds each gradient of a weight to its sum while autograd is still under way, so that they do not live
    until the end of a group. Small ones wait until the backward of a band is over: see `WAITING`.

    A pointwise operator may hand the same memory to several of its inputs; the gradients of matrix products,
    convolutions and norms are new memory, which becomes the sum itself.
    """

    def __init__(self, sums: dict[str, Tensor], nodes: Iterable[Node]) -> None:
        self.sums = sums
        self.fresh = _read_only_by(FRESH, nodes)
        self.waiting: list[dict[str, Tensor]] = []
        """What waits, in the order in which it is added: of each weight one gradient a call."""
        self._bytes = 0

    def hook(self, name: str) -> Callable[[Tensor], Tensor]:
        """A tensor hook. Autograd is handed a gradient of the right shape and no memory in exchange."""

        def add(grad: Tensor) -> Tensor:
            total = self.sums.get(name)
            if total is None:
                wide = grad.to(grad_dtype(grad.dtype))
                self.sums[name] = wide if wide is not grad or name in self.fresh else wide.clone()
            elif name in self.fresh and grad.dtype == total.dtype:
                self._wait(name, grad)
            else:
                total.add_(grad)
            return zero(grad).expand(grad.shape)

        return add

    def _wait(self, name: str, grad: Tensor) -> None:
        size = grad.numel() * grad.itemsize
        if self._bytes + size > (WAITING if device_of(grad).type == "cpu" else DEVICE_WAITING):
            self.flush()
            self.sums[name].add_(grad)
            return
        turn = next((some for some in self.waiting if name not in some), None)
        if turn is None:
            self.waiting.append(turn := {})
        turn[name] = grad
        self._bytes += size

    def flush(self) -> None:
        """Add what waits."""
        for some in self.waiting:
            torch._foreach_add_([self.sums[name] for name in some], [*some.values()])
        self.waiting, self._bytes = [], 0
