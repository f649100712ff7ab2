"""What a backward reads of the values that a group makes: nothing, its output, or more.

A group that is a convolution followed by operators of these two tables can have its backward graph made again
from the rows that it read and the rows that it made, at no cost: the convolution itself is left out
(rowtune/kernels/unvalued.py).
"""

from __future__ import annotations

from rowtune.graph.graph import Node, Ref, refs

LINEAR = frozenset(
    (
        *("add", "sub", "rsub", "neg", "clone", "contiguous", "dropout"),
        *("view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "flatten", "unflatten"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "cat", "slice", "narrow"),
    )
)
"""Backward needs no values, only shapes."""

FROM_OUTPUT = frozenset(("relu", "relu6", "hardtanh", "leaky_relu"))
"""The gradient at the output is that at the input: f'(f(x)) = f'(x)."""

SCALED = frozenset(("mul", "div"))
"""Linear with one tensor, times a number."""


def reads_no_values(node: Node) -> bool:
    return node.op in LINEAR or (node.op in SCALED and len(node.inputs) == 1 and _once(node))


def _once(node: Node) -> bool:
    """Neither x * x nor 2 / x."""
    return len(list(refs((node.args, node.kwargs)))) == 1 and isinstance(node.args[0], Ref)


def reads_output(node: Node) -> bool:
    return node.op in FROM_OUTPUT and not _grows(node)


def _grows(node: Node) -> bool:
    """A leaky ReLU whose negative side does not stay negative."""
    slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    return node.op == "leaky_relu" and not float(slope) > 0
