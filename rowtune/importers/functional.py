"""Operators as the graph has them: out of place, with shapes written out, random masks drawn first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rowtune.errors import ModelError
from rowtune.graph.graph import Node, Ref, Value, numel
from rowtune.torch_private import OpOverload

aten = torch.ops.aten

# The shape of another tensor is known: its rows need not be there.
SHAPED_LIKE = {
    "expand_as": (torch.ops.aten.expand.default, "expand"),
    "view_as": (torch.ops.aten.view.default, "view"),
    "reshape_as": (torch.ops.aten.reshape.default, "reshape"),
}


def draws(op: str, target: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws random numbers; dropout goes by a rule of its own."""
    if not isinstance(target, OpOverload):
        return False
    if op == "scaled_dot_product_attention":
        return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
    return torch.Tag.nondeterministic_seeded in target.tags


def functional(target: OpOverload, op: str) -> OpOverload:
    """relu_ -> relu, with the same overload name (bernoulli_.float is bernoulli.p)."""
    overload = {"bernoulli_.float": "p"}.get(f"{op}.{target._overloadname}", target._overloadname)
    twin = {"normal_": "normal_functional"}.get(op, op.rstrip("_"))
    packet = getattr(getattr(torch.ops, target.namespace), twin, None)
    found = getattr(packet, overload, None) if packet is not None else None
    if found is None:
        raise ModelError(f"{op}.{target._overloadname} works in place and has no functional twin")
    return found  # type: ignore[no-any-return]


def without_out(target: OpOverload) -> OpOverload:
    """div.out -> div.Tensor: what is computed, to be kept by whoever wants it."""
    own = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
    packet = target.overloadpacket
    for name in packet.overloads():
        found: OpOverload = getattr(packet, name)
        same = [(a.name, str(a.type)) for a in found._schema.arguments] == own
        if same and not found._schema.is_mutable:
            return found
    raise ModelError(f"{target} writes into a tensor and has no functional twin")


def completed(target: OpOverload, twin: OpOverload, args: Any, kwargs: Any) -> Any:
    """The arguments for an in-place operator's twin: torch.export leaves out the first one's defaults, which
    the second need not have (bernoulli_'s p of 0.5)."""
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    args = [*args]
    for a in twin._schema.arguments[len(args) :]:
        if a.kwarg_only or a.name in kwargs or a.has_default_value() or a.name not in defaults:
            break
        args.append(defaults[a.name])
    return tuple(args)


# What these make depends on a tensor's type only; any input of that type will do.
_MADE_LIKE = frozenset({"new_empty", "new_full", "new_ones", "new_zeros"})

# Numbers in a mask that is drawn before anything else: one an image and channel, not one a pixel.
_SMALL = 2**16


DRAWN_IN_SHAPE = (aten.bernoulli.p, aten.randint_like.default, aten.randint_like.low_dtype)
"""Only the shape of the input matters, but PyTorch has no derivative for these."""

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
Made = list[tuple[Node, Tensor]]


def apart(node: Node, out: Tensor) -> Made:
    """What stands for a node, with tensors that are like what each makes; `out` is like what it does."""
    if node.op in _DROPOUTS and not (node.args[1] and node.args[2]):  # the operator does nothing
        args = (node.args[0], 0.0, False)
        return [(replace(node, op="dropout", target=aten.dropout.default, args=args, random=False), out)]
    return _APART[node.op](node, out) if node.op in _APART else [(node, out)]


def _channel_dropout(node: Node, out: Tensor) -> Made:
    """feature_dropout (nn.Dropout2d, Dropout3d) as a mask of one number a channel, and a product."""
    keep, mask = 1.0 - float(node.args[1]), out.new_empty([*out.shape[:2], *[1] * (out.dim() - 2)])
    names = [f"{node.name}_{part}" for part in ("like", "mask", "scale")]
    scale = 1.0 / keep if keep > 0.0 else 0.0
    empty, drawn = (node.args[0], [*mask.shape]), (Ref(names[0]), keep)
    return [
        (Node(names[0], "new_empty", aten.new_empty.default, empty, {}, node.module), mask),
        (Node(names[1], "bernoulli", aten.bernoulli.p, drawn, {}, node.module, random=True), mask),
        (Node(names[2], "mul", aten.mul.Scalar, (Ref(names[1]), scale), {}, node.module), mask),
        (Node(node.name, "mul", aten.mul.Tensor, (node.args[0], Ref(names[2])), {}, node.module), out),
    ]


def _random_slope(node: Node, out: Tensor) -> Made:
    """rrelu as slopes, drawn for the whole tensor, and a choice: its own backward reads slopes that a
    checkpoint has not drawn again yet."""
    x, low, high, training = (*node.args, *(0.125, 1 / 3, False)[len(node.args) - 1 :])[:4]
    if not training:
        leaky = aten.leaky_relu.default
        return [(replace(node, op="leaky_relu", target=leaky, args=(x, (low + high) / 2), random=False), out)]
    names = [f"{node.name}_{part}" for part in ("like", "slope", "positive", "scaled")]
    slopes = (Ref(names[0]), low, high)
    return [
        (Node(names[0], "new_empty", aten.new_empty.default, (x, [*out.shape]), {}, node.module), out),
        (Node(names[1], "uniform", aten.uniform.default, slopes, {}, node.module, random=True), out),
        (Node(names[2], "gt", aten.gt.Scalar, (x, 0), {}, node.module), out > 0),
        (Node(names[3], "mul", aten.mul.Tensor, (x, Ref(names[1])), {}, node.module), out),
        (Node(node.name, "where", aten.where.self, (Ref(names[2]), x, Ref(names[3])), {}, node.module), out),
    ]


_APART: dict[str, Callable[[Node, Tensor], Made]] = {
    "feature_dropout": _channel_dropout,
    "rrelu": _random_slope,
}


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
