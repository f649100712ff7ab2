"""The graph: one list of operators in topological order, whatever the model came from.

Values are named; a node makes exactly one value of its own name (split and chunk are rewritten as slices
when imported; an operator that really returns several tensors makes a tuple value, taken apart by
`getitem` nodes, and no cut may separate the two).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from rowtune.graph.regions import Region
from rowtune.torch_private import pytree


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a value in a node's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph. `kind`: input, target, parameter, buffer, constant or node.

    `path` is where a parameter or buffer lives in the module. A tuple value has `parts` instead of a shape.
    `dense` is False for a view that owns no memory of its own (its bytes are counted at its base).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str = ""
    requires_grad: bool = False
    parts: tuple[Value, ...] = ()

    @property
    def bytes(self) -> int:
        if self.parts:
            return sum(p.bytes for p in self.parts)
        return numel(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. `target` is called with the arguments, each Ref replaced by its tensor.

    `op` is the name the row rules know it by ("conv2d", "add"). `effect` names the buffer that an in-place
    node changes; `random` marks one that draws numbers; `region` is the `with` block that it lies in.
    """

    name: str
    op: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    effect: str = ""
    random: bool = False
    region: Region | None = None
    inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names of the values read, in order of appearance, each once."""

    def __post_init__(self) -> None:
        read = dict.fromkeys(ref.name for ref in refs((self.args, self.kwargs)))
        object.__setattr__(self, "inputs", tuple(read))

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass: not where the model has turned them off."""
        return self.op != "detach" and (self.region is None or self.region.grad)


@dataclass(frozen=True, slots=True)
class Fused:
    """PyTorch's own operator for what the graph takes apart: the nodes that make the same value, and the
    names of the parts that it makes needless."""

    nodes: tuple[Node, ...]
    parts: tuple[str, ...]


WRITE = "write_buffer"
"""The operator that puts a value into a buffer; its effect. What reads the buffer itself reads the value that
it had when the forward began."""


def refs(tree: Any) -> Iterator[Ref]:
    """Every Ref in nested tuples, lists and dicts."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from refs(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from refs(item)


def replace(tree: Any, lookup: Callable[[str], Any]) -> Any:
    """The same tree with every Ref replaced by lookup(name)."""
    if isinstance(tree, Ref):
        return lookup(tree.name)
    if isinstance(tree, (list, tuple)):
        return type(tree)(replace(item, lookup) for item in tree)
    if isinstance(tree, dict):
        return {key: replace(item, lookup) for key, item in tree.items()}
    return tree


def carried(nodes: Iterable[Node], start: Collection[str]) -> frozenset[str]:
    """What gradients of the values `start` flow through: themselves, and what `nodes` make of them."""
    found = set(start)
    for node in nodes:
        if node.differentiable and any(name in found for name in node.inputs):
            found.add(node.name)
    return frozenset(found)


def live(nodes: Sequence[Node], outputs: Iterable[str]) -> tuple[Node, ...]:
    """Without what nobody reads (lifted constants' detach, asserts), but with what has an effect."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if node.name in wanted or node.effect:
            kept.append(node)
            wanted |= set(node.inputs)
    return tuple(reversed(kept))


def numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model: `inputs` and `targets` are what a call supplies, `outputs` what it returns (flattened;
    `output_spec` puts the structure back). `fused` holds, by the name of the value made, the operators that
    were taken apart. `notes` are for people: what tracing could not keep. `device` is the kind of device that
    the model is on, or is predicted for: some kernels go about it otherwise on a CPU ("meta": unknown)."""

    nodes: tuple[Node, ...]
    values: dict[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_spec: pytree.TreeSpec | None = None
    output_spec: pytree.TreeSpec | None = None
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    training: bool = True
    targets: tuple[str, ...] = ()
    loss: Any = None
    loss_output: str = ""
    fused: dict[str, Fused] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device: str = "meta"

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each node."""
        return {node.name: i for i, node in enumerate(self.nodes)}

    @cached_property
    def live(self) -> frozenset[str]:
        """Nodes that somebody reads: a loss leaves out what comes of the model's other outputs."""
        return frozenset(node.name for node in live(self.nodes, self.outputs))

    @cached_property
    def consumers(self) -> dict[str, tuple[int, ...]]:
        """Positions of the live nodes that read each value; a graph output is read at position len(nodes)."""
        readers: dict[str, list[int]] = {name: [] for name in self.values}
        for i, node in enumerate(self.nodes):
            for name in node.inputs if node.name in self.live else ():
                readers[name].append(i)
        for name in self.outputs:
            readers[name].append(len(self.nodes))
        return {name: tuple(found) for name, found in readers.items()}

    @cached_property
    def needs_grad(self) -> frozenset[str]:
        """Values through which a gradient flows in training."""
        floating = [n for n in self.nodes if self.values[n.name].dtype.is_floating_point]
        return carried(floating, [v.name for v in self.values.values() if v.requires_grad])

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the structure: operators, wiring, parameter names and shapes; not the input's size, nor
        the loss."""
        number = {name: i for i, name in enumerate(self.values)}
        rows: list[Any] = [
            (v.kind, v.path, v.shape if v.kind in ("parameter", "buffer") else len(v.shape))
            for v in self.values.values()
            if v.kind not in ("node", "target", "norms") and v.path != "@"
        ]
        rows += [
            (node.op, [number[i] for i in node.inputs], *([repr(node.region)] if node.region else []))
            for node in self.nodes
            if not node.op.startswith("loss")
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def parameters(self) -> list[Value]:
        return [v for v in self.values.values() if v.kind == "parameter"]


def check(graph: Graph) -> Graph:
    """Assert what every graph must satisfy: names unique, defined before use, outputs known."""
    known = {v.name for v in graph.values.values() if v.kind != "node"}
    for node in graph.nodes:
        for name in node.inputs:
            assert name in known, f"{node.name} reads {name} before it is made"
        assert node.name not in known, f"{node.name} is made twice"
        assert node.name in graph.values
        known.add(node.name)
    assert all(name in known for name in graph.outputs)
    return graph
