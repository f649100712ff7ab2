"""The sizes of what is made of finished reductions: a gate, or a classifier on pooled features."""

from __future__ import annotations

from collections.abc import Mapping

from rowtune.cost.heap import Heap
from rowtune.cost.profile import Profiles
from rowtune.cost.tape import TapeSizes, backward, forward
from rowtune.graph.graph import Graph, Node


class PostSizes:
    """Mirrors runtime.sums.Sums; every value lives until all are made."""

    def __init__(self, heap: Heap, graph: Graph, profiles: Profiles, nodes: tuple[Node, ...]) -> None:
        self.heap, self.graph, self.profiles = heap, graph, profiles
        self.nodes = tuple(node for node in nodes if not node.effect)

    def forward(self) -> dict[str, int]:
        """Blocks of all that is made."""
        blocks: dict[str, int] = {}
        self._run(blocks, grad=False)
        return {node.name: blocks[node.name] for node in self.nodes}

    def backward(self, outer: Mapping[str, int], weight_grads: dict[str, int]) -> None:
        """Once more with gradients on, and back; `outer` are gradients of what was made."""
        grads = {node.name: self.heap.ref(outer[node.name]) for node in self.nodes if node.name in outer}
        if not grads:
            return
        blocks: dict[str, int] = {}
        tape = self._run(blocks, grad=True)

        def weight(name: str) -> None:
            size = self._size(name)
            if name in weight_grads:
                self.heap.mark(size)
            else:
                weight_grads[name] = self.heap.new(size, state=True)

        backward(
            self.heap, self.graph, self.profiles, tape, grads, self._size, lambda node: 1.0, self._grad,
            weight, self._size, lambda node, name: self._size(name),
        )  # fmt: skip
        for block in (*blocks.values(), *grads.values()):
            self.heap.drop(block)

    def _run(self, blocks: dict[str, int], grad: bool) -> TapeSizes:
        return forward(
            self.heap, self.graph, self.profiles, self.nodes, [()] * len(self.nodes), blocks, self._size,
            lambda node: 1.0, self._grad if grad else lambda name: False,
        )  # fmt: skip

    def _size(self, name: str) -> int:
        return self.graph.values[name].bytes

    def _grad(self, name: str) -> bool:
        return name in self.graph.needs_grad
