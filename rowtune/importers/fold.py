"""Tensors that depend on no input and are written through views (an attention mask, filled window by window):
the operators that make them run once, when the model is read."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from rowtune.torch_private import OpOverload


def run_at_import(nodes: Iterable[torch.fx.Node], constants: Iterable[str]) -> frozenset[str]:
    """Names of the exported nodes to run: families of views that are written to, and what they are made of.

    Args:
        constants: placeholders that hold constant tensors.
    """
    free = set(constants)
    base: dict[str, str] = {}  # node -> the node whose memory it looks at
    viewed, written = set(), set()
    made: list[torch.fx.Node] = []
    for node in nodes:
        if node.op != "call_function" or not _fixed(node, free):
            continue
        free.add(node.name)
        made.append(node)
        source = _looked_at(node)
        base[node.name] = base.get(source, source) if source else node.name
        if source and _writes(node):
            written.add(base[node.name])
        elif source:
            viewed.add(base[node.name])
    families = {b for b in viewed & written if b in base}
    wanted: set[str] = set()
    for node in reversed(made):
        if base[node.name] in families or node.name in wanted:
            wanted |= {node.name, *(n.name for n in node.all_input_nodes if n.name in base)}
    return frozenset(wanted)


def _fixed(node: torch.fx.Node, free: set[str]) -> bool:
    """Whether the node makes the same at every call."""
    target: Any = node.target
    known = target is operator.getitem or isinstance(target, OpOverload)
    drawn = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return known and not drawn and all(n.name in free for n in node.all_input_nodes)


def _looked_at(node: torch.fx.Node) -> str:
    """What the node returns a view of, or writes to."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0].name
    returns = node.target._schema.returns  # type: ignore[union-attr]
    shares = any(r.alias_info is not None for r in returns) and node.all_input_nodes
    return node.all_input_nodes[0].name if shares else ""


def _writes(node: torch.fx.Node) -> bool:
    return node.target is not operator.getitem and node.target._schema.is_mutable  # type: ignore[union-attr]
