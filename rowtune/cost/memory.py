"""Predict the peak of a training step by adding up the program that the runtime executes.

Live bytes are tracked block by block, in the order in which the step makes and frees them: parameters,
gradients and optimizer state, the batch, what autograd saves, line buffers, tapes and gradients under way.
Kernel temporaries are not tensors and are not counted (DESIGN.md, "What a budget means").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rowtune.cost.banded import BandedSizes
from rowtune.cost.heap import Heap
from rowtune.cost.profile import profiles
from rowtune.cost.tape import TapeSizes, backward, forward
from rowtune.cost.time import seconds
from rowtune.plan.program import Program, SegmentProgram
from rowtune.plan.repeat import Repeat


@dataclass(frozen=True)
class Cost:
    """`activation_bytes` leaves out parameters, gradients and optimizer state; `peak_at` names the segment
    whose forward or backward sets the peak."""

    peak_bytes: int
    activation_bytes: int
    seconds: float
    peak_at: str


def predict(program: Program, optimizer_slots: int = 1, repeats: Mapping[int, Repeat] | None = None) -> Cost:
    """Peak and time of one training step in steady state (gradients set to None between steps).

    Args:
        program: of a graph with a loss.
        optimizer_slots: parameter-sized states of the optimizer (SGD with momentum 1, Adam 2).
        repeats: of a program of fewer bands than there are: the pieces that stand for the others. Given at
            all, bands of images are passed over as well (cost/estimate.py).
    """
    step = _Step(program, optimizer_slots, repeats)
    step.run()
    heap = step.heap
    return Cost(heap.peak, heap.peak_activations, seconds(program, repeats), heap.peak_at)


class _Step:
    def __init__(self, program: Program, slots: int, repeats: Mapping[int, Repeat] | None) -> None:
        self.repeats, self.shortened = repeats or {}, repeats is not None
        self.program, self.graph = program, program.graph
        self.profiles = profiles(self.graph)
        weights = self.graph.parameters()
        self.slots = slots
        self.largest = max((v.bytes for v in weights), default=0)
        trained = sum(v.bytes for v in weights if v.requires_grad)
        fixed = sum(v.bytes for v in self.graph.values.values() if v.kind in ("parameter", "buffer"))
        self.heap = Heap(fixed + slots * trained)
        self.weight_grads: dict[str, int] = {}
        self.env: dict[str, int] = {}
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
        heap.label = "the optimizer's step"
        if self.slots >= 2:  # Adam's denominator, one parameter at a time
            heap.mark(2 * self.largest)

    # -- forward ---------------------------------------------------------------------------------------------

    def _forward(self, segment: SegmentProgram) -> object:
        if segment.banded is not None:
            repeat = self.repeats.get(segment.part.start)
            banded = BandedSizes(self.heap, self.graph, self.profiles, segment, repeat, self.shortened)
            banded.forward(self.env)
            if segment.banded.single_sweep:
                self._hand_on(segment, banded)
            else:
                banded.hold(self.env)
            return banded
        checkpointed = segment.decision.policy == "checkpoint"
        blocks = self.env
        held: list[int] = []
        if checkpointed and any(self._saves(node.name) for node in segment.part.nodes):
            held = [self.heap.ref(blocks[n]) for n in segment.part.inputs if n in blocks]
        tape = self._nodes(segment, blocks, grad=not checkpointed)
        return held if checkpointed else tape

    def _saves(self, name: str) -> bool:
        """Whether autograd keeps anything for a node; if for none, checkpoint has nothing to recompute and
        lets go of its inputs."""
        profile = self.profiles[name]
        return self.grad(name) and bool(profile.saves or profile.extra)

    def _nodes(self, segment: SegmentProgram, blocks: dict[str, int], grad: bool) -> TapeSizes:
        wanted = self.grad if grad else lambda name: False
        return forward(
            self.heap, self.graph, self.profiles, segment.part.nodes, segment.drops, blocks, self.size,
            lambda node: 1.0, wanted,
        )  # fmt: skip

    # -- backward --------------------------------------------------------------------------------------------

    def _backward(self, segment: SegmentProgram, kept: object) -> None:
        if isinstance(kept, BandedSizes):
            if not kept.done:
                kept.backward(self.grads)
                kept.release()
                self._hand_on(segment, kept)
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
        assert isinstance(kept, list)
        blocks = {n: b for n, b in zip(segment.part.inputs, kept, strict=False)}
        tape = self._nodes(segment, blocks, grad=True)
        for name, block in blocks.items():
            if name not in segment.part.inputs:
                self.heap.drop(block)
        self._run_tape(tape)
        for block in kept:
            self.heap.drop(block)

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

    def _hand_on(self, segment: SegmentProgram, banded: BandedSizes) -> None:
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
