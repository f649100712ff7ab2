"""Execute a rows segment whose tensors at the barriers are made again in backward."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rowtune.graph.graph import Graph
from rowtune.plan.program import SegmentProgram
from rowtune.runtime.banded import BandedRun
from rowtune.runtime.gradients import Gradients, gather
from rowtune.runtime.passes import PassesRun


class AgainRun:
    """One forward call, and its backward; between them it keeps the finished reductions alone."""

    def __init__(
        self,
        graph: Graph,
        segment: SegmentProgram,
        tensors: dict[str, Tensor],
        wanted: frozenset[str],
        seed: int,
    ) -> None:
        self.graph, self.segment, self.tensors = graph, segment, tensors
        self.wanted, self.seed = wanted, seed
        self.carriers = _downstream(segment, wanted)
        self.runs: list[BandedRun | PassesRun] = []

    def recall(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def forget(self) -> None:
        self.tensors = {}

    def forward(self) -> dict[str, Tensor]:
        env = dict(self.tensors)
        for one, dead in zip(self.segment.inner, self.segment.dead, strict=True):
            kind = PassesRun if one.passes else BandedRun
            run = kind(self.graph, one, _given(one, env), self.carriers, self.seed)
            env |= run.forward()
            run.forget()
            self.runs.append(run)
            for name in dead:
                env.pop(name, None)
        return {o: env[o] for o in self.segment.part.outputs}

    def backward(self, grads: Mapping[str, Tensor]) -> Gradients:
        given = self._made_again()
        pending = dict(grads)
        total = Gradients({}, {})
        for one in reversed(self.segment.inner):
            run = self.runs.pop()
            run.recall(given.pop())
            made = run.backward({o: pending.pop(o) for o in one.part.outputs if o in pending})
            run.forget()
            for name, g in made.inputs.items():
                gather(total.inputs if name in self.segment.part.inputs else pending, name, g)
            for name, g in made.weights.items():
                gather(total.weights, name, g)
            made.inputs.clear()
        return total

    def _made_again(self) -> list[dict[str, Tensor]]:
        """What each part reads; the outputs of the last are not needed."""
        env = dict(self.tensors)
        found = []
        for one, dead, run in zip(self.segment.inner, self.segment.dead, self.runs, strict=True):
            found.append(_given(one, env))
            if run is self.runs[-1]:
                break
            run.recall(found[-1])
            env |= run.again()
            run.forget()
            for name in dead:
                env.pop(name, None)
        return found


def _given(one: SegmentProgram, env: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: env[n] for n in (*one.part.inputs, *one.part.weights)}


def _downstream(segment: SegmentProgram, wanted: frozenset[str]) -> frozenset[str]:
    found = set(wanted)
    for node in segment.part.nodes:
        if any(n in found for n in node.inputs):
            found.add(node.name)
    return frozenset(found)
