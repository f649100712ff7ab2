"""Execute a rows segment that is streamed once for each barrier inside it (rowtune/plan/passes.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rowtune.graph.graph import Graph
from rowtune.plan.program import Passes, SegmentProgram
from rowtune.runtime.banded import BandedRun
from rowtune.runtime.dropout import Seed
from rowtune.runtime.gradients import Gradients, add, apart, finish, gather
from rowtune.runtime.stores.shelf import Shelf


class PassesRun:
    """One forward call, and its backward; between them it keeps the finished reductions alone."""

    def __init__(
        self,
        graph: Graph,
        segment: SegmentProgram,
        tensors: Mapping[str, Tensor | Shelf],
        wanted: frozenset[str],
        seed: Seed,
        *,
        first_time: bool = True,
    ) -> None:
        assert isinstance(segment.how, Passes)
        self.graph, self.segment, self.program = graph, segment, segment.how
        self.tensors, self.wanted, self.seed = tensors, wanted, seed
        self.first_time = first_time
        self.known: dict[str, Tensor] = {}
        self.runs: list[BandedRun] = []

    def recall(self, tensors: Mapping[str, Tensor | Shelf]) -> None:
        self.tensors = tensors
        for one, run in zip(self.program.forward, self.runs, strict=True):
            run.recall(self._given(one))

    def forget(self) -> None:
        self.tensors = {}
        for run in self.runs:
            run.forget()

    def again(self) -> dict[str, Tensor]:
        """The outputs once more: the last pass, with the reductions that the others finished."""
        made = self.runs[-1].again()
        return {o: made[o] if o in made else self.known[o] for o in self.segment.part.outputs}

    def single_sweep(self, scale: Tensor | float) -> tuple[dict[str, Tensor], Gradients]:
        raise AssertionError("barriers lie before a loss")

    def forward(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for one in self.program.forward:
            run = BandedRun(
                self.graph, one, self._given(one), self.wanted, self.seed, first_time=self.first_time
            )
            made = run.forward()
            self.known |= {n: t for n, t in made.items() if n in self._finished}
            self.runs.append(run)
        found = {**self.known, **made}
        return {o: found[o] for o in self.segment.part.outputs}

    def backward(self, grads: Mapping[str, Tensor]) -> Gradients:
        pending = {n: g for n, g in grads.items() if n in self._finished}
        outer = {n: g for n, g in grads.items() if n not in self._finished}
        total = Gradients({}, {})
        seeds: dict[str, Tensor] = {}
        for at in range(len(self.program.levels) - 1, -1, -1):
            self._reduced(at, pending, seeds, total)
            one = self.program.backward[len(self.program.levels) - 1 - at]
            found = self._pass(one, at, outer, seeds)
            for name, g in found.inputs.items():
                gather(pending if name in self._finished else total.inputs, name, g)
            for name, g in found.weights.items():
                gather(total.weights, name, g)
        finish(self.graph, self.segment, self.tensors, total, self.wanted)
        return total

    @property
    def _finished(self) -> set[str]:
        return {n for names in self.program.levels for n in names}

    def _given(self, one: SegmentProgram) -> dict[str, Tensor | Shelf]:
        read = {*one.part.inputs, *one.part.weights}
        return {n: t for n, t in {**self.tensors, **self.known}.items() if n in read}

    def _reduced(
        self, at: int, pending: dict[str, Tensor], seeds: dict[str, Tensor], total: Gradients
    ) -> None:
        """Gradients of the reductions behind `at` barriers, from those of what is made of them."""
        sums = self.runs[at].sums
        made = {n: pending[n] for n in self.program.levels[at] if n in pending}
        beyond = sums.backward(made, self.wanted | self._finished)
        for name, g in apart(beyond, (*pending.values(), *sums.gradients.values())).items():
            own = total.inputs if name in self.segment.part.inputs else total.weights
            add(pending if name in self._finished else own, name, g)
        seeds |= {self.program.twins[n]: g for n, g in sums.gradients.items()}

    def _pass(
        self, one: SegmentProgram, at: int, outer: Mapping[str, Tensor], seeds: Mapping[str, Tensor]
    ) -> Gradients:
        """Gradients of what the barrier before is made of; of inputs and weights, before the first."""
        wanted = frozenset(self.program.levels[at - 1]) if at else self.wanted
        totals = {t: self.known[n] for n, t in self.program.twins.items() if n in self.known}
        graph = self.program.twin_graph
        run = BandedRun(graph, one, self._given(one), wanted, self.seed, first_time=False, totals=totals)
        given = {n: g for n, g in {**outer, **seeds}.items() if n in one.part.outputs}
        return run.backward(given)
