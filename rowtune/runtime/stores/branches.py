"""On which side of its edges each element lay that decides a branch: kept as bits where values are rounded.

The gradient of a ReLU6, say, is zero outside of 0 to 6: an element near an edge that comes back from the
other side of it brings an error as large as a gradient. With a bit for each edge it comes back on its own
side, off by no more than it was rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rowtune.graph.graph import Node
from rowtune.kernels.rounding import packed, unpacked


class Edge(NamedTuple):
    """A branch begins above `at`; with `itself`, at it."""

    at: float
    itself: bool = False


def edges_of(node: Node) -> tuple[Edge, ...]:
    """Where the gradient of the node's operator jumps, in what the operator saves."""
    rule = EDGES.get(node.op)
    return () if rule is None else rule(node)


def _at(*edges: Edge) -> Callable[[Node], tuple[Edge, ...]]:
    return lambda node: edges


def _argument(node: Node, at: int, name: str, usual: Any) -> Any:
    return node.kwargs.get(name, node.args[at] if len(node.args) > at else usual)


def _hardtanh(node: Node) -> tuple[Edge, ...]:
    low, high = _argument(node, 1, "min_val", -1), _argument(node, 2, "max_val", 1)
    return Edge(float(low)), Edge(float(high), True)


def _clamp(node: Node) -> tuple[Edge, ...]:
    low, high = _argument(node, 1, "min", None), _argument(node, 2, "max", None)
    found = [Edge(float(low), True)] if isinstance(low, int | float) else []
    return (*found, Edge(float(high))) if isinstance(high, int | float) else tuple(found)


def _clamp_min(node: Node) -> tuple[Edge, ...]:
    return (Edge(float(_argument(node, 1, "min", 0)), True),)


def _clamp_max(node: Node) -> tuple[Edge, ...]:
    return (Edge(float(_argument(node, 1, "max", 0))),)


def _threshold(node: Node) -> tuple[Edge, ...]:
    return (Edge(float(_argument(node, 1, "threshold", 0))),)


EDGES: dict[str, Callable[[Node], tuple[Edge, ...]]] = {
    **dict.fromkeys(("leaky_relu", "prelu", "elu", "celu", "selu"), _at(Edge(0.0))),
    "relu6": _at(Edge(0.0), Edge(6.0, True)),
    "hardtanh": _hardtanh,
    "hardsigmoid": _at(Edge(-3.0), Edge(3.0, True)),
    "hardswish": _at(Edge(-3.0, True), Edge(3.0)),
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "threshold": _threshold,
}
"""By operator, for those that save what they read. A ReLU saves its output, whose sign is looked at; a pool
its indices, which are kept."""


class Saved(Protocol):
    def get(self) -> Tensor: ...


class Branched:
    """What an operator saved, which will come back rounded, and the sides on which it lay."""

    def __init__(self, saved: Saved, t: Tensor, edges: tuple[Edge, ...]) -> None:
        self.saved, self.edges, self.shape = saved, edges, t.shape
        with torch.no_grad():
            self.bits = [packed(t >= e.at if e.itself else t > e.at) for e in edges]

    def get(self) -> Tensor:
        found = self.saved.get()
        with torch.no_grad():
            for edge, bits in zip(self.edges, self.bits, strict=True):
                found = _on_its_side(found, edge, unpacked(bits, self.shape))
        return found


def _on_its_side(t: Tensor, edge: Edge, above: Tensor) -> Tensor:
    least = edge.at if edge.itself else _beside(edge.at, t.dtype, 1)
    most = _beside(edge.at, t.dtype, -1) if edge.itself else edge.at
    return torch.where(above, t.clamp_min(least), t.clamp_max(most))


def _beside(at: float, dtype: torch.dtype, way: int) -> float:
    """The next number of this type above (1) or below (-1) the one that `at` is in it."""
    info = torch.finfo(dtype)
    if not at:
        return way * float(info.tiny)
    mantissa, exponent = math.frexp(at)
    spacing = math.ldexp(float(info.eps), exponent - 1)
    at = round(at / spacing) * spacing
    inwards = (at > 0) == (way < 0)
    return at + way * (spacing / 2 if abs(mantissa) == 0.5 and inwards else spacing)
