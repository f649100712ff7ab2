"""Forward hooks of the user's that look at data, while there is none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import nn

from rowtune.importers.watched import is_users
from rowtune.torch_private import GLOBAL_HOOKS

Hooks = MutableMapping[int, Any]


@contextlib.contextmanager
def hooks_without_data(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Hooks on the model's modules, and on all modules there are, run on the tracer's tensors, which have no
    data: one that cannot (it reads a pointer, a value, an array) is left out of the graph, with a note. What
    hooks do to tensors is traced as ever."""
    failed: dict[str, str] = {}
    places: list[tuple[str, Hooks]] = [("all modules", hooks) for hooks in GLOBAL_HOOKS]
    for name, module in model.named_modules():
        places += [(name or "the model", h) for h in (module._forward_hooks, module._forward_pre_hooks)]
    before = [(hooks, dict(hooks)) for _, hooks in places]
    for where, hooks in places:
        users = {key: hook for key, hook in hooks.items() if is_users(hook)}
        hooks.update({key: _tolerant(hook, where, failed) for key, hook in users.items()})
    try:
        yield
    finally:
        for hooks, own in before:
            hooks.update(own)
    notes += [
        f"a forward hook on {where} does not run on tensors without data ({why}): it is not part of the graph"
        for where, why in failed.items()
    ]


def _tolerant(hook: Any, where: str, failed: dict[str, str]) -> Any:
    @functools.wraps(hook, updated=())
    def tolerant(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception as error:  # whatever it was going to do with data
            lines = str(error).strip().splitlines() or [type(error).__name__]
            failed.setdefault(where, lines[0].partition(". ")[0].rstrip(".")[:120])
            return None

    return tolerant
