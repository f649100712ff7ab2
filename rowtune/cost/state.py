"""Bytes of an optimizer's state."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rowtune.errors import UsageError
from rowtune.graph.graph import Graph
from rowtune.plan.choices import Home
from rowtune.runtime.recorder import Brought, Sized
from rowtune.torch_private import inner_tensors, pytree


class Keeps(Protocol):
    """What an optimizer takes, by a parameter's size and type."""

    def state(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes from step to step."""

    def update(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> int:
        """Bytes during an update on this kind of device."""


Stateful = torch.optim.Optimizer | Keeps | int | None
"""An optimizer, or what one takes, or the number of parameter-sized tensors that it keeps; None: none."""


def state_bytes(graph: Graph, optimizer: Stateful) -> int:
    """What it keeps from step to step.

    Raises:
        UsageError: the optimizer has made no step yet and makes none on tensors without data.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        made = optimizer if optimizer.state else _stepped(optimizer)
        return sum(map(_bytes, made.state.values()))
    trained = [v for v in graph.parameters() if v.requires_grad]
    if optimizer is None or isinstance(optimizer, int):
        return (optimizer or 0) * sum(v.bytes for v in trained)
    return sum(optimizer.state(v.shape, v.dtype) for v in trained)


def brought(graph: Graph, optimizer: Stateful, state: Home) -> Brought:
    """What the update of a parameter of each size takes on the device beside what is there: the state, where
    that stays on the host, and temporaries.

    Raises:
        UsageError: as `state_bytes`.
    """
    found: dict[Sized, int] = {}
    if isinstance(optimizer, torch.optim.Optimizer):
        made = (optimizer if optimizer.state else _stepped(optimizer)) if state == "host" else None
        found = {(tuple(p.shape), p.dtype): _bytes(s) for p, s in made.state.items()} if made else {}
        return tuple(found.items())
    for v in graph.parameters():
        if optimizer is None or not v.requires_grad:
            continue
        sized = (v.shape, v.dtype)
        if isinstance(optimizer, int):
            size = optimizer * v.bytes if state == "host" else 0
        else:
            size = optimizer.update(*sized, graph.device) + (
                optimizer.state(*sized) if state == "host" else 0
            )
        if size:
            found[sized] = size
    return tuple(found.items())


def _bytes(state: dict[str, Any]) -> int:
    leaves = [t for t in pytree.tree_leaves(state) if isinstance(t, Tensor)]
    return sum(t.untyped_storage().nbytes() for leaf in leaves for t in inner_tensors(leaf))


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
