"""Operators as the graph has them: out of place, with shapes written out, and random only if they draw."""

from __future__ import annotations

from typing import Any

import torch

from rowtune.errors import ModelError

# The shape of another tensor is known: its rows need not be there.
SHAPED_LIKE = {
    "expand_as": (torch.ops.aten.expand.default, "expand"),
    "view_as": (torch.ops.aten.view.default, "view"),
    "reshape_as": (torch.ops.aten.reshape.default, "reshape"),
}


def draws(op: str, target: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws random numbers; dropout goes by a rule of its own."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if op == "scaled_dot_product_attention":
        return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
    return torch.Tag.nondeterministic_seeded in target.tags


def functional(target: torch._ops.OpOverload, op: str) -> torch._ops.OpOverload:
    """relu_ -> relu, with the same overload name (bernoulli_.float is bernoulli.p)."""
    overload = {"bernoulli_.float": "p"}.get(f"{op}.{target._overloadname}", target._overloadname)
    packet = getattr(getattr(torch.ops, target.namespace), op.rstrip("_"), None)
    found = getattr(packet, overload, None) if packet is not None else None
    if found is None:
        raise ModelError(f"{op}.{target._overloadname} works in place and has no functional twin")
    return found  # type: ignore[no-any-return]
