"""The optimizer's state on the host: each parameter's is brought to the device for its own update, and put
back.

It works for what keeps its state by parameter, as torch.optim does: the optimizer is the user's own, is shown
one parameter at a time, and its `state_dict` says what it always says. Between steps `optimizer.state` holds
the tensors on the host; counters of one element stay where they are.

On a card the copies are pinned, and made on the stream at work. On the CPU there is one memory: the copies
are real, but made where no meter and no recorder looks (see rowtune/runtime/stores/host.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rowtune.errors import UsageError
from rowtune.plan.choices import Home
from rowtune.torch_private import inner_tensors, pytree, without_modes

Group = dict[str, Any]
Held = dict[Tensor, dict[str, Tensor]]
_HELD: WeakKeyDictionary[torch.optim.Optimizer, Held] = WeakKeyDictionary()
"""Each optimizer's tensors on the host, by parameter and by their names in its state."""


def step_from_host(optimizer: torch.optim.Optimizer) -> None:
    """In the place of `optimizer.step()`, for a plan with `optimizer_state: host`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                step_one_from_host(optimizer, group, p)
    wait(optimizer)


def step_one(optimizer: torch.optim.Optimizer, group: Group, p: Tensor) -> None:
    """The optimizer's step for one of its parameters."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [p]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def step_one_from_host(optimizer: torch.optim.Optimizer, group: Group, p: Tensor) -> None:
    """The same, with its state on the device meanwhile."""
    _bring(optimizer, p)
    step_one(optimizer, group, p)
    _put(optimizer, p)


def settle(optimizer: torch.optim.Optimizer, home: Home) -> None:
    """Have all of the state where a plan wants it: other plans, and `load_state_dict`, leave it elsewhere."""
    if home == "host":
        if any([_put(optimizer, p) for p in list(optimizer.state)]):
            wait(optimizer)
    elif optimizer in _HELD:
        for p in list(optimizer.state):
            _bring(optimizer, p)
        del _HELD[optimizer]


def wait(optimizer: torch.optim.Optimizer) -> None:
    """Until what is on its way to the host is there: its owner may read it."""
    cards = {p.device for p in _HELD.get(optimizer, {}) if p.is_cuda}
    for card in cards:
        torch.cuda.current_stream(card).synchronize()


def state_on_device(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors of its state that are not on the host."""
    held = _HELD.get(optimizer, {})
    for p, state in optimizer.state.items():
        away = held.get(p, {})
        for name, value in state.items():
            if value is not away.get(name):
                leaves = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
                yield from (t for leaf in leaves for t in inner_tensors(leaf))


def _moves(value: Any) -> bool:
    """Whether it takes memory to speak of."""
    return type(value) is Tensor and value.numel() > 1


def _bring(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    held, state = _HELD.get(optimizer, {}).get(p, {}), optimizer.state.get(p, {})
    for name, host in held.items():
        if state.get(name) is host:
            made = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=p.device)
            with without_modes():
                state[name] = made.copy_(host, non_blocking=True)
            del made


def _put(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Whether there was anything to move."""
    moved = False
    held, state = _HELD.setdefault(optimizer, {}).setdefault(p, {}), optimizer.state.get(p, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and len(inner_tensors(value)) > 1:
            raise UsageError(
                f"optimizer_state host moves tensors, and {type(optimizer).__name__} keeps a "
                f"{type(value).__name__}, which is small already: take optimizer_state device"
            )
        if not _moves(value) or value is held.get(name):
            continue
        with without_modes():
            if name not in held or not _alike(held[name], value):
                held[name] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, pin_memory=p.is_cuda
                )
            state[name] = held[name].copy_(value, non_blocking=True)
        moved = True
    return moved


def _alike(host: Tensor, value: Tensor) -> bool:
    return (host.shape, host.stride(), host.dtype) == (value.shape, value.stride(), value.dtype)
