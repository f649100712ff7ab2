"""Gradients that wait on the host: of what skips over segments.

A skip's gradient is made when backward comes to its reader, and is not wanted before backward comes to its
maker: meanwhile all the segments between go backward, and those of a U-Net have the most weights. With
`waiting_gradients: host` in the plan such a gradient leaves when it is made and comes back when its maker's
backward begins.

In autograd's graph that is a node at either end: the reader's puts the gradient away and hands nothing on,
the maker's gets it back and adds what came from readers nearby, in the order in which PyTorch adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rowtune.errors import RowtuneError
from rowtune.plan.program import SegmentProgram
from rowtune.runtime.stores.host import Host, HostPool

Waiting = dict[str, list[Any]]
"""What waits, by value: handles of the store, in the order in which they left."""


class Skips:
    """Of one forward call and its backward."""

    def __init__(self, host: HostPool) -> None:
        self.store, self.waiting = Host(host), Waiting()

    def leaving(self, segment: SegmentProgram, env: dict[str, Any]) -> dict[str, Tensor]:
        """The segment's inputs whose gradients leave, as it is to read them."""
        return {n: _Leave.apply(self, n, env[n]) for n in segment.leaves if env[n].requires_grad}  # type: ignore[no-untyped-call]

    def coming(self, segment: SegmentProgram, env: dict[str, Any]) -> dict[str, Tensor]:
        """The segment's outputs whose gradients come back, as others are to read them."""
        return {n: _Return.apply(self, n, env[n]) for n, _ in segment.returns if env[n].requires_grad}  # type: ignore[no-untyped-call]

    def put(self, name: str, grad: Tensor) -> None:
        self.waiting.setdefault(name, []).append(self.store.put(grad))

    def back(self, name: str, near: Tensor | None) -> Tensor | None:
        """The whole gradient; `near` is what came from readers nearby."""
        total: Tensor | None = None
        for handle in self.waiting.pop(name, []):
            one = self.store.get(handle)
            total = one if total is None else total.add_(one)
            del one
        if total is None or near is None:
            return near if total is None else total
        return total.add_(near)


def _through(ctx: Any, skips: Skips, name: str, value: Tensor) -> Tensor:
    """The value as it is; backward comes by here."""
    ctx.skips, ctx.name = skips, name
    ctx.set_materialize_grads(False)
    return value.view_as(value)


class _Leave(torch.autograd.Function):
    forward = staticmethod(_through)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None]:
        _once()
        if grad is not None:
            ctx.skips.put(ctx.name, grad)
        return None, None, None


class _Return(torch.autograd.Function):
    forward = staticmethod(_through)

    @staticmethod
    def backward(ctx: Any, near: Tensor | None) -> tuple[None, None, Tensor | None]:
        _once()
        return None, None, ctx.skips.back(ctx.name, near)


def _once() -> None:
    if torch.is_grad_enabled():
        raise RowtuneError(
            "second derivatives are not supported by a plan with waiting_gradients host; take one with "
            "waiting_gradients device where create_graph=True is needed"
        )
