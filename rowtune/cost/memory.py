"""Predict the peak of a training step by adding up the program that the runtime executes.

Live bytes are tracked block by block, in the order in which the step makes and frees them: parameters,
gradients and optimizer state, the batch, what autograd saves, line buffers, tapes and gradients under way.
Kernel temporaries are not tensors and are not counted (docs/sweep.md, "What a budget means").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rowtune.cost.banded import BandedSizes
from rowtune.cost.heap import Heap
from rowtune.cost.passes import PassesSizes
from rowtune.cost.profile import key_of, profiles
from rowtune.cost.tape import Bytes, TapeSizes, backward, forward
from rowtune.cost.time import seconds
from rowtune.graph.graph import Node
from rowtune.plan.program import Program, SegmentProgram, identity

Env = dict[str, int]
"""Blocks by name."""


@dataclass(frozen=True)
class Cost:
    """`activation_bytes` leaves out parameters, gradients and optimizer state; `peak_at` names the segment
    whose forward or backward sets the peak. Plans of one graph that run alike have the same `program`."""

    peak_bytes: int
    activation_bytes: int
    seconds: float
    peak_at: str
    program: str = ""


def predict(program: Program, optimizer_slots: int = 1) -> Cost:
    """Peak and time of one training step in steady state (gradients set to None between steps).

    Args:
        program: of a graph with a loss.
        optimizer_slots: parameter-sized states of the optimizer (SGD with momentum 1, Adam 2).
    """
    step = _Step(program, optimizer_slots)
    step.run()
    heap = step.heap
    return Cost(heap.peak, heap.peak_activations, seconds(program), heap.peak_at, identity(program))


class _Step:
    def __init__(self, program: Program, slots: int) -> None:
        self.program, self.graph = program, program.graph
        self.profiles = profiles(self.graph)
        weights = self.graph.parameters()
        trained = sum(v.bytes for v in weights if v.requires_grad)
        fixed = sum(v.bytes for v in self.graph.values.values() if v.kind in ("parameter", "buffer"))
        self.heap = Heap(fixed + slots * trained)
        self.weight_grads: dict[str, int] = {}
        self.env: Env = {}
        self.grads: dict[str, int] = {}

    def size(self, name: str) -> int:
        return self.graph.values[name].bytes

    def grad(self, name: str) -> bool:
        return name in self.graph.needs_grad

    def run(self) -> None:
        heap, graph = self.heap, self.graph
        batch = [heap.new(self.size(n), n) for n in (*graph.inputs, *graph.targets)]
        self.env = dict(zip((*graph.inputs, *graph.targets), map(heap.ref, batch), strict=True))
        left: list[object] = []
        for segment, dead in zip(self.program.segments, self.program.drops, strict=True):
            heap.label = f"forward of {segment.decision.first}..{segment.decision.last}"
            left.append(self._forward(segment))
            for name in dead:
                if name in self.env:
                    heap.drop(self.env.pop(name))
        self.grads = {graph.outputs[0]: heap.new(self.size(graph.outputs[0]))}
        for segment, kept in zip(reversed(self.program.segments), reversed(left), strict=True):
            heap.label = f"backward of {segment.decision.first}..{segment.decision.last}"
            self._backward(segment, kept)

    # -- forward ---------------------------------------------------------------------------------------------

    def _forward(self, segment: SegmentProgram) -> object:
        """Returns what backward needs."""
        if segment.inner:
            return self._inner(segment)
        if segment.banded is not None or segment.passes is not None:
            banded = self._sizes(segment)
            banded.forward(self.env)
            if banded.done:
                self._hand_on(banded)
            else:
                banded.hold(self.env)
            return banded
        if segment.decision.policy == "checkpoint":
            held = self._hold(segment)
            self._nodes(segment, self.env, grad=False)
            return held
        return self._nodes(segment, self.env, grad=True)

    def _sizes(self, segment: SegmentProgram) -> BandedSizes | PassesSizes:
        kind = PassesSizes if segment.passes else BandedSizes
        return kind(self.heap, self.graph, self.profiles, segment)

    def _hold(self, segment: SegmentProgram) -> Env:
        """A checkpoint's inputs; none where autograd keeps nothing and there is nothing to run again."""
        if not segment.inner and not any(self._saves(node) for node in segment.part.nodes):
            return {}
        return {n: self.heap.ref(self.env[n]) for n in segment.part.inputs if n in self.env}

    def _inner(self, segment: SegmentProgram) -> Env:
        """The first forward of a segment that is run again: only its inputs are kept."""
        held = self._hold(segment)
        self._through(segment)
        return held

    def _through(self, segment: SegmentProgram, again: bool = False) -> None:
        """All parts in forward, of which nothing is kept."""
        outside = set(self.env)
        for inner, dead in zip(segment.inner, segment.dead, strict=True):
            self._run(inner, again)
            self._dead(segment, dead)
        for name in set(self.env) - outside - set(segment.part.outputs):
            self.heap.drop(self.env.pop(name))

    def _run(self, segment: SegmentProgram, again: bool) -> None:
        """Forward, of which nothing is kept; `again`, when reductions are finished."""
        if segment.inner:
            self._through(segment, again)
        elif segment.banded is not None or segment.passes is not None:
            sizes = self._sizes(segment)
            run = sizes.again if again else sizes.forward
            run(self.env)
        else:
            self._nodes(segment, self.env, grad=False)

    def _made_again(self, segment: SegmentProgram) -> list[object]:
        """All parts once more, with what the backward of each needs."""
        left: list[object] = []
        for inner, dead in zip(segment.inner, segment.dead, strict=True):
            left.append(self._kept(inner, last=inner is segment.inner[-1]))
            self._dead(segment, dead)
        return left

    def _kept(self, segment: SegmentProgram, last: bool) -> object:
        """What the backward of a part needs. It runs for those after it, or where autograd must see it."""
        if segment.banded is not None or segment.passes is not None:
            sizes = self._sizes(segment)
            sizes.hold(self.env)
            kept: object = sizes
        elif segment.inner or segment.decision.policy == "checkpoint":
            kept = self._hold(segment)
        else:
            return self._nodes(segment, self.env, grad=True)
        if not last:
            self._run(segment, again=True)
        return kept

    def _dead(self, segment: SegmentProgram, names: Iterable[str]) -> None:
        for name in names:
            if name in self.env and name not in segment.part.inputs:
                self.heap.drop(self.env.pop(name))

    def _saves(self, node: Node) -> bool:
        """Whether autograd keeps anything for a node; if for none, checkpoint has nothing to recompute and
        lets go of its inputs."""
        profile = self.profiles[key_of(node)]
        return self.grad(node.name) and bool(profile.saves or profile.extra)

    def _recomputed(self, segment: SegmentProgram) -> Bytes:
        """Sizes for a checkpoint's second run, which ends where autograd saves the last of what it needs."""
        nodes = segment.part.nodes
        saving = [i for i, node in enumerate(nodes) if self._saves(node)]
        end = saving[-1] if saving else 0
        profile = self.profiles[key_of(nodes[end])]
        made_too = profile.extra or nodes[end].name in profile.saves  # inputs are saved before it runs
        left_out = {node.name for node in nodes[end + bool(made_too) :]}
        return lambda name: 0 if name in left_out else self.size(name)

    def _nodes(
        self, segment: SegmentProgram, blocks: Env, grad: bool, size: Bytes | None = None
    ) -> TapeSizes:
        wanted = self.grad if grad else lambda name: False
        return forward(
            self.heap, self.graph, self.profiles, segment.part.nodes, segment.drops, blocks,
            size or self.size, lambda node: 1.0, wanted,
        )  # fmt: skip

    # -- backward --------------------------------------------------------------------------------------------

    def _backward(self, segment: SegmentProgram, kept: object, turn: bool = False) -> None:
        """`turn`: of a part of a checkpoint. The recomputation around it hands its inputs over, and nobody
        else holds them when it has been run again itself."""
        if isinstance(kept, (BandedSizes, PassesSizes)):
            if not kept.done:
                kept.backward(self.grads)
                kept.release()
                self._hand_on(kept)
            for name in segment.part.outputs:
                if name in self.grads:
                    self.heap.drop(self.grads.pop(name))
            for name, block in kept.input_grads.items():
                self._add(name, block)
            kept.input_grads = {}
            return
        if isinstance(kept, TapeSizes):
            self._run_tape(kept)
            return
        assert isinstance(kept, dict)
        run_back = self._again(segment, kept) if segment.inner else self._once_more(segment, kept)
        if turn:
            self._let_go(kept)
        run_back()
        if not turn:
            self._let_go(kept)

    def _let_go(self, held: Env) -> None:
        for block in held.values():
            self.heap.drop(block)

    def _once_more(self, segment: SegmentProgram, held: Env) -> Callable[[], None]:
        """A checkpoint's nodes once more; returns what its backward does then."""
        blocks = dict(held)
        tape = self._nodes(segment, blocks, grad=True, size=self._recomputed(segment))
        for name, block in blocks.items():
            if name not in segment.part.inputs:
                self.heap.drop(block)
        return lambda: self._run_tape(tape)

    def _again(self, segment: SegmentProgram, held: Env) -> Callable[[], None]:
        """All parts once more, their inputs kept this time; returns what backward does then."""
        before, self.env = self.env, dict(held)
        left = self._made_again(segment)
        for name, block in self.env.items():
            if held.get(name) != block:
                self.heap.drop(block)
        self.env = before

        def run_back() -> None:
            for inner, kept in zip(reversed(segment.inner), reversed(left), strict=True):
                self._backward(inner, kept, turn=True)

        return run_back

    def _run_tape(self, tape: TapeSizes) -> None:
        backward(
            self.heap, self.graph, self.profiles, tape, self.grads, self.size, lambda node: 1.0, self.grad,
            self._weight, self.size, lambda node, name: self.size(name),
        )  # fmt: skip

    def _weight(self, name: str) -> None:
        """A gradient that becomes .grad, or is added to it."""
        if name in self.weight_grads:
            self.heap.mark(self.size(name))
        else:
            self.weight_grads[name] = self.heap.new(self.size(name), state=True)

    def _hand_on(self, banded: BandedSizes | PassesSizes) -> None:
        """Weight gradients of a rows segment are summed inside it and become .grad without a copy."""
        for name, block in banded.weight_grads.items():
            if name in self.weight_grads:
                self.heap.drop(block)
            else:
                self.weight_grads[name] = block
        banded.weight_grads = {}

    def _add(self, name: str, block: int) -> None:
        if name in self.graph.inputs or name in self.graph.targets:
            self.heap.drop(block)
        elif name in self.grads:
            self.heap.drop(block)
        else:
            self.grads[name] = block
