"""Sums of weight gradients over bands and images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from rowtune.graph.graph import Node
from rowtune.runtime.evaluate import grad_dtype

PRODUCTS = {"linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))}


class WeightSums:
    """Adds each gradient of a weight to its sum while autograd is still under way, so that one of them lives
    at a time and not those of a whole group.

    A pointwise operator may hand the same memory to several of its inputs; the gradients of matrix products
    and convolutions are new memory, which becomes the sum itself.
    """

    def __init__(self, sums: dict[str, Tensor], nodes: Iterable[Node]) -> None:
        self.sums = sums
        readers: dict[str, set[str]] = {}
        for node in nodes:
            for name in node.inputs:
                readers.setdefault(name, set()).add(node.op)
        self.fresh = {name for name, ops in readers.items() if ops <= PRODUCTS}

    def hook(self, name: str) -> Callable[[Tensor], Tensor]:
        """A tensor hook. Autograd is handed a gradient of the right shape and no memory in exchange."""

        def add(grad: Tensor) -> Tensor:
            total = self.sums.get(name)
            if total is None:
                wide = grad.to(grad_dtype(grad.dtype))
                self.sums[name] = wide if wide is not grad or name in self.fresh else wide.clone()
            else:
                total.add_(grad)
            return grad.new_zeros(()).expand(grad.shape)

        return add
