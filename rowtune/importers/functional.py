"""Operators as the graph has them: out of place, with shapes written out, random masks drawn first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rowtune.errors import ModelError
from rowtune.graph.graph import Node, Ref, Value, numel

aten = torch.ops.aten

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


# What these make depends on a tensor's type only; any input of that type will do.
_MADE_LIKE = frozenset({"new_empty", "new_full", "new_ones", "new_zeros"})

# Numbers in a mask that is drawn before anything else: one an image and channel, not one a pixel.
_SMALL = 2**16


def channel_dropout(node: Node, shape: list[int]) -> list[Node]:
    """feature_dropout (nn.Dropout2d, Dropout3d) as a mask of `shape`, (B, C, 1, 1), and a product."""
    keep = 1.0 - float(node.args[1])
    if not node.args[2]:
        return [replace(node, op="dropout", target=aten.dropout.default, random=False)]
    names = [f"{node.name}_{part}" for part in ("like", "mask", "scale")]
    scale = 1.0 / keep if keep > 0.0 else 0.0
    return [
        Node(names[0], "new_empty", aten.new_empty.default, (node.args[0], shape), {}, node.module),
        Node(names[1], "bernoulli", aten.bernoulli.p, (Ref(names[0]), keep), {}, node.module, random=True),
        Node(names[2], "mul", aten.mul.Scalar, (Ref(names[1]), scale), {}, node.module),
        Node(node.name, "mul", aten.mul.Tensor, (node.args[0], Ref(names[2])), {}, node.module),
    ]


def masks_first(nodes: list[Node], values: dict[str, Value], inputs: list[str]) -> list[Node]:
    """Small random masks (stochastic depth, channel dropout) are drawn before anything else.

    Whole tensors are drawn by nodes of their own, so where a mask is drawn no segment can go on; what a mask
    is made of does not depend on the images, so it need not be drawn there.
    """
    by_type = {values[name].dtype: name for name in reversed(inputs)}
    free: set[str] = set()
    found: list[Node] = []
    for node in nodes:
        source = by_type.get(values[node.name].dtype) if node.op in _MADE_LIKE else None
        if source is not None and values[node.args[0].name].dtype == values[source].dtype:
            node = replace(node, args=(Ref(source), *node.args[1:]))
            free.add(node.name)
        elif not node.effect and all(name in free for name in node.inputs):
            free.add(node.name)
        found.append(node)
    early = {n.name for n in found if n.random and n.name in free and numel(values[n.name].shape) <= _SMALL}
    for node in reversed(found):
        if node.name in early:
            early |= set(node.inputs) & free
    return [n for n in found if n.name in early] + [n for n in found if n.name not in early]
