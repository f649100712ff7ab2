"""The sizes of a rows segment that is streamed once for each barrier inside it."""

from __future__ import annotations

from collections.abc import Mapping

from rowtune.cost.banded import BandedSizes
from rowtune.cost.finish import finish
from rowtune.cost.heap import Heap
from rowtune.cost.post import PostSizes
from rowtune.cost.profile import Profiles, key_of
from rowtune.graph.graph import Graph
from rowtune.plan.program import Passes, SegmentProgram


class PassesSizes:
    """Mirrors runtime.passes.PassesRun."""

    def __init__(self, heap: Heap, graph: Graph, profiles: Profiles, segment: SegmentProgram) -> None:
        assert segment.passes is not None
        self.heap, self.graph, self.segment, self.passes = heap, graph, segment, segment.passes
        twins = {
            (node.op, self.passes.twins[node.name]): profiles[key_of(node)]
            for node in segment.part.nodes
            if node.name in self.passes.twins
        }
        self.profiles = {**profiles, **twins}
        self.done = False
        self.known: dict[str, int] = {}
        self.held: list[int] = []
        self.weight_grads: dict[str, int] = {}
        self.input_grads: dict[str, int] = {}

    def forward(self, env: dict[str, int]) -> None:
        for one in self.passes.forward:
            made: dict[str, int] = {}
            sizes = BandedSizes(self.heap, self.graph, self.profiles, one)
            sizes.forward(made)
            self.known |= made
        for name in self.segment.part.outputs:
            env[name] = self.known.pop(name)

    def again(self, env: dict[str, int]) -> None:
        """The last pass once more: the others' reductions are known."""
        sizes = BandedSizes(self.heap, self.graph, self.profiles, self.passes.forward[-1])
        made: dict[str, int] = {}
        sizes.forward(made)
        for name in self.segment.part.outputs:
            env[name] = made.pop(name) if name in made else self.heap.new(self.graph.values[name].bytes)
        for block in made.values():
            self.heap.drop(block)

    def hold(self, env: Mapping[str, int]) -> None:
        self.held = [self.heap.ref(env[n]) for n in self.segment.part.inputs if n in env]

    def release(self) -> None:
        for block in (*self.held, *self.known.values()):
            self.heap.drop(block)
        self.held, self.known = [], {}

    def backward(self, outer: Mapping[str, int]) -> None:
        given = {**outer, **dict.fromkeys(self.passes.twins.values(), 0)}
        wanted_by_pass = wanted_in(self.graph, self.passes)
        pending: dict[str, int] = {}  # gradients of what earlier passes finish
        for forward, one, wanted in zip(
            reversed(self.passes.forward), self.passes.backward, wanted_by_pass, strict=True
        ):
            assert forward.banded is not None
            post = PostSizes(self.heap, self.graph, self.profiles, forward.banded.post)
            post.backward({**pending, **outer}, self.weight_grads)
            sizes = BandedSizes(self.heap, self.passes.twin_graph, self.profiles, one, wanted)
            sizes.backward({n: b for n, b in given.items() if n in one.part.outputs})
            for name, block in sizes.input_grads.items():
                if name in self.segment.part.inputs:
                    self.input_grads[name] = block
                elif name in pending:
                    self.heap.drop(block)
                else:
                    pending[name] = block
            self.weight_grads |= sizes.weight_grads
        for block in pending.values():
            self.heap.drop(block)
        finish(self.heap, self.graph, self.segment, self.input_grads)


def wanted_in(graph: Graph, passes: Passes) -> list[frozenset[str]]:
    """Values that carry a gradient in each backward pass: what follows one barrier's reductions, and in the
    last pass everything."""
    found = []
    for at, one in zip(range(len(passes.levels) - 1, -1, -1), passes.backward, strict=True):
        if not at:
            found.append(graph.needs_grad | frozenset(passes.twins.values()))
            continue
        reached = set(passes.levels[at - 1])
        for node in one.part.nodes:
            if any(n in reached for n in node.inputs):
                reached.add(node.name)
        found.append(frozenset(reached))
    return found
