"""The sizes of one stretch of nodes, forward and backward, as PyTorch's autograd keeps and frees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rowtune.cost.heap import Heap
from rowtune.cost.profile import Profiles, key_of
from rowtune.graph.graph import Graph, Node

Bytes = Callable[[str], int]
NOTHING: Mapping[str, str] = {}


@dataclass
class TapeSizes:
    """What a forward leaves behind: the blocks each node's backward needs."""

    nodes: list[Node] = field(default_factory=list)
    saved: dict[str, list[int]] = field(default_factory=dict)
    joined: dict[str, list[str]] = field(default_factory=dict)


def forward(
    heap: Heap,
    graph: Graph,
    profiles: Profiles,
    nodes: Sequence[Node],
    drops: Sequence[Sequence[str]],
    blocks: dict[str, int],
    size: Bytes,
    share: Callable[[Node], float],
    grad: Callable[[str], bool],
    unsaved: frozenset[str] = frozenset(),
    over: Mapping[str, str] = NOTHING,
) -> TapeSizes:
    """Run `nodes`; `blocks` maps each live value to its block and gains the outputs.

    Args:
        size: bytes of a value in this run (of its rows at work).
        share: the part of a node's whole output that this run makes.
        grad: whether a gradient flows through a value; nothing is saved for a node where none does.
        unsaved: values that are saved by name and not by memory (joined windows).
        over: nodes that write over an input, and which.
    """
    tape = TapeSizes()
    for node, dead in zip(nodes, drops, strict=True):
        profile, part = profiles[key_of(node)], share(node)
        alias = over.get(node.name) or profile.alias
        if alias and alias in blocks:
            blocks[node.name] = heap.ref(blocks[alias])
        else:
            blocks[node.name] = heap.new(size(node.name), node.name)
        kept: list[int] = []
        if grad(node.name):
            kept = [heap.ref(blocks[n]) for n in profile.saves if n in blocks and n not in unsaved]
            tape.joined[node.name] = [n for n in profile.saves if n in unsaved]
            if profile.extra:
                kept.append(heap.new(int(profile.extra * part), f"what {node.name} saves"))
        heap.mark(int(profile.forward * part))
        tape.nodes.append(node)
        tape.saved[node.name] = kept
        for name in dead:
            if name in blocks:
                heap.drop(blocks.pop(name))
    return tape


def backward(
    heap: Heap,
    graph: Graph,
    profiles: Profiles,
    tape: TapeSizes,
    grads: dict[str, int],
    size: Bytes,
    share: Callable[[Node], float],
    grad: Callable[[str], bool],
    weight: Callable[[str], None],
    made: Bytes,
    read: Callable[[Node, str], int],
) -> None:
    """Run the tape; `grads` maps values to the blocks of their gradients and ends with those of values made
    outside.

    Args:
        weight: is told of each parameter gradient.
        made: bytes that a node computed to take its rows from, where those are more.
        read: bytes of an input that a node reads, where those are fewer.
    """
    for node in reversed(tape.nodes):
        profile = profiles[key_of(node)]
        own = grads.pop(node.name, None)
        found: list[tuple[str, int]] = []
        if own is not None and grad(node.name):
            if (full := made(node.name)) > size(node.name):
                own = widened(heap, own, full)
            again = [heap.new(size(n)) for n in tape.joined.get(node.name, ())]
            for name in graph.reads.get(node.name) or node.inputs:
                if not grad(name):
                    continue
                if graph.values[name].kind == "parameter":
                    weight(name)
                elif name in profile.grad_alias:
                    found.append((name, heap.ref(own)))
                else:
                    found.append((name, heap.new(read(node, name), f"the gradient of {name}")))
            heap.mark(int(profile.backward * share(node)))
            for block in again:
                heap.drop(block)
        for block in tape.saved.pop(node.name):
            heap.drop(block)
        if own is not None:
            heap.drop(own)
        for name, block in found:
            if read(node, name) < size(name):
                block = widened(heap, block, size(name))
            _accumulate(heap, grads, name, block, size(name))


def widened(heap: Heap, block: int, size: int) -> int:
    """A gradient of some rows among zeros for the others."""
    full = heap.new(size)
    heap.drop(block)
    return full


def _accumulate(heap: Heap, grads: dict[str, int], name: str, block: int, size: int) -> None:
    """As autograd adds: into the first gradient where nobody else looks at it, else into new memory."""
    old = grads.get(name)
    if old is None:
        grads[name] = block
    elif heap.refs[old] == 1:
        heap.drop(block)
    else:
        grads[name] = heap.new(size)
        heap.drop(old)
        heap.drop(block)
