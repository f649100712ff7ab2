"""Writing an operator's output over its input (which may be: graph/in_place.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def run_in_place(op: str, over: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The output of a relu or an add in the memory of its input `over`; None where that is a part of
    something larger, or of another type than it was traced in (autocast)."""
    x = tensors[over]
    if x._is_view() or 0 in x.stride():
        return None
    if op == "relu":
        return x.relu_()
    other = next(t for n, t in tensors.items() if n != over)
    return x.add_(other) if other.dtype == x.dtype else None
