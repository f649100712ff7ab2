"""What tracing freezes without a trace in the graph: Python's own random numbers, and modules' hooks."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

FROZEN_DRAW = (
    "the forward draws from Python's or numpy's random numbers: what was drawn when it was traced stays; "
    "draw with torch instead"
)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Notes for the user, once the model was traced inside; random numbers are put back."""
    notes: list[str] = []
    before = _states()
    yield notes
    if _states() != before:
        notes.append(FROZEN_DRAW)
        _put_back(before)
    if hooked := [name or "the model" for name, m in model.named_modules() if _hooks(m)]:
        more = f" and {len(hooked) - 3} more" if len(hooked) > 3 else ""
        notes.append(
            f"forward hooks on {', '.join(hooked[:3])}{more} ran once, when the model was traced: what they "
            "do to tensors is part of the graph, anything else does not happen again"
        )


def _states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    name, keys, *rest = numpy.random.get_state() if numpy else ("", [])
    return random.getstate(), (name, list(keys), *rest)


def _put_back(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    if (numpy := sys.modules.get("numpy")) and states[1][0]:
        numpy.random.set_state(states[1])


def _hooks(module: nn.Module) -> bool:
    """Hooks of the user's; PyTorch's own (weight norm, pruning) are nothing but tensor operators."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(is_users(hook) for hook in hooks)


def is_users(hook: Any) -> bool:
    """Whether a hook is none of PyTorch's own."""
    origin = str(getattr(hook, "__module__", None) or type(hook).__module__)
    return not origin.startswith("torch.")
