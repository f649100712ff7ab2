"""One output of an operator that has several, as an operator of its own.

A node makes one tensor, so `values, indices = x.max(1)` becomes "max.0" and "max.1", which call max and take
a part. Where both are used it is computed twice, hence only operators that cost little are taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rowtune.torch_private import OpOverload

PARTED = frozenset(
    {
        *("aminmax", "cummax", "cummin", "kthvalue", "max", "median", "min", "mode", "sort", "std_mean"),
        *("topk", "var_mean", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    }
)


@dataclass(frozen=True)
class Part:
    """Call `target`, take output `index`."""

    target: OpOverload
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.target(*args, **kwargs)[self.index]  # type: ignore[no-any-return]


@cache
def part_of(target: OpOverload, index: int) -> Part:
    """The same object every time: operators are timed once each, and told apart by identity."""
    return Part(target, index)
