"""Bytes of an optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rowtune.errors import UsageError
from rowtune.graph.graph import Graph
from rowtune.runtime.recorder import Brought


def state_bytes(graph: Graph, optimizer: torch.optim.Optimizer | int | None) -> int:
    """What it keeps from step to step.

    Args:
        optimizer: or the number of parameter-sized tensors that one would keep; None: none.

    Raises:
        UsageError: the optimizer has made no step yet and makes none on tensors without data.
    """
    if optimizer is None or isinstance(optimizer, int):
        return (optimizer or 0) * sum(v.bytes for v in graph.parameters() if v.requires_grad)
    made = optimizer if optimizer.state else _stepped(optimizer)
    return sum(map(_bytes, made.state.values()))


def states(graph: Graph, optimizer: torch.optim.Optimizer | int | None) -> Brought:
    """What it keeps for one parameter of each size.

    Raises:
        UsageError: as `state_bytes`.
    """
    if optimizer is None or isinstance(optimizer, int):
        trained = [v for v in graph.parameters() if v.requires_grad]
        return tuple({(v.shape, v.dtype): (optimizer or 0) * v.bytes for v in trained}.items())
    made = optimizer if optimizer.state else _stepped(optimizer)
    return tuple({(tuple(p.shape), p.dtype): _bytes(s) for p, s in made.state.items()}.items())


def _bytes(state: dict[str, Any]) -> int:
    leaves = pytree.tree_leaves(state)
    return sum(t.untyped_storage().nbytes() for t in leaves if isinstance(t, Tensor))


def _stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """One of the same kind after a step on parameters without data."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        like = [torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for p in group["params"]]
        for p in like:
            p.grad = torch.empty_like(p) if p.requires_grad else None
        groups.append({**group, "params": like} | {"fused": None, "foreach": False, "capturable": False})
    try:
        made = type(optimizer)(groups)  # type: ignore[call-arg]
        made.step()
    except Exception as error:
        raise UsageError(
            f"the state of {type(optimizer).__name__} is not known before its first step ({error}); make a "
            "step, or say how many parameter-sized tensors it keeps"
        ) from error
    return made
