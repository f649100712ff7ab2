"""Gradients under way: sums by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Gradients:
    """Sums over bands and images, by name: of segment inputs and of weights."""

    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]


def add(sums: dict[str, Tensor], name: str, grad: Tensor) -> None:
    """One more gradient of a value."""
    sums[name] = sums[name] + grad if name in sums else grad
