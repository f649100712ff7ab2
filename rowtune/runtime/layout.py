"""Where the channels of a feature map lie in memory.

In channels_last a band of rows of one image is contiguous, and convolutions read it as it is. They take the
layout of what they read and hand it on, and so do the operators after them: a step runs in channels_last if
its inputs lie so. Parameters stay as the user has them; rows segments have copies of the weights of
convolutions for as long as they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rowtune.plan.choices import Layout

ORDERS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By rank. Tensors of other ranks have one layout."""


def channels_last(t: Tensor) -> Tensor:
    """The tensor with its channels last: a copy, unless they lie so or there is only one."""
    if t.dim() not in ORDERS or has_channels_last(t):
        return t
    if t.shape[1] == 1:  # the same memory; PyTorch would still take it for the other layout
        return t.reshape(t.shape[0], *t.shape[2:], 1).movedim(-1, 1)
    return t.contiguous(memory_format=ORDERS[t.dim()])


def arranged(inputs: Iterable[Tensor], layout: Layout) -> list[Tensor]:
    """A step's inputs as a plan has them lie."""
    return [channels_last(t) for t in inputs] if layout == "channels_last" else [*inputs]


def has_channels_last(t: Tensor) -> bool:
    """Whether PyTorch's operators would hand this layout on."""
    return t.dim() in ORDERS and t.stride(1) == 1 and t.stride(-1) >= t.shape[1]


def differs(t: Tensor) -> bool:
    """Whether a tensor has its channels last and would lie elsewhere in memory if it had not."""
    return has_channels_last(t) and t.shape[1] > 1


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor with its channels last."""
    spatial = shape[2:]
    inner = [shape[1] * math.prod(spatial[i + 1 :]) for i in range(len(spatial))]
    return (math.prod(shape[1:]), 1, *inner)
