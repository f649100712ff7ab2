"""A value that is known, in the place of one that is not computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_value(x: Tensor, value: Tensor) -> Tensor:
    """`value` in the place of x: gradients go to x."""
    return _Known.apply(x, value)  # type: ignore[no-untyped-call, no-any-return]


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
