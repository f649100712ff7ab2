"""The segments of one graph that were lowered and recorded before, and how a plan is put together of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

from rowtune.cost.alike import Alike, alike, digest
from rowtune.cost.compose import Linked
from rowtune.cost.footprint import Footprint, footprint
from rowtune.cost.last_use import at_last_use
from rowtune.graph.graph import Graph, Value
from rowtune.plan.banded import by_policy
from rowtune.plan.lower import Lowered, lower, uncollected
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.program import Banded, Passes, Program, SegmentProgram, steps_of
from rowtune.plan.repeat import shortened
from rowtune.plan.schedules.schedule import Request, Schedule
from rowtune.runtime.blank import Answers
from rowtune.runtime.layout import ORDERS, strides
from rowtune.runtime.recorder import Brought
from rowtune.runtime.segment_recorder import How, SegmentRun
from rowtune.runtime.segment_recording import Crossing
from rowtune.runtime.step_run import Engine
from rowtune.runtime.writer import Counted

GIVEN = ("input", "target", "norms")


class RecordedStep(NamedTuple):
    """A training step: its segments, linked, and the names of the memory that they share."""

    segments: list[Linked]
    names: dict[int, str]
    outer: dict[int, int]
    """Bytes of the gradients that backward begins with, by block."""
    copies: dict[str, tuple[int, int]]
    """Block and bytes of the inputs that lie otherwise in a step than the user has them, by name."""
    program: str
    blocks: dict[str, int]
    """The memory of each value that crosses a cut."""


class _At(NamedTuple):
    """A tensor between segments, and the step's block that it lies in (None: the model's own)."""

    crossing: Crossing
    block: int | None


Key = tuple[str, tuple[Crossing, ...], tuple[tuple[str, bool], ...], How]
"""A segment's program, its inputs and the parameters that it shares with others, by the names that they
have in all segments like it, and the step that it is part of."""


class _Forward:
    """A segment on certain inputs: a run whose backward is still to come, if there is one, and footprints by
    the gradients that were handed to it. The run is that of the first of all segments like it."""

    def __init__(self, run: _Run) -> None:
        self.run: _Run | None = run
        self.outputs = run.outputs
        self.made_of = {buffer: run.names[name] for name, buffer in run.made.given.items()}
        self.footprints: dict[tuple[Crossing, ...], Footprint] = {}


class _Run:
    """A run of a segment, by the names that its values have in all segments like it."""

    def __init__(
        self, graph: Graph, segment: SegmentProgram, key: Key, names: dict[str, str], answers: Answers
    ) -> None:
        self.segment, self.names = segment, names
        self.own = {common: name for name, common in names.items()}
        inputs, shared = self._own(key[1]), {self.own[n]: earlier for n, earlier in key[2]}
        try:
            self.made = SegmentRun(graph, segment, inputs, shared, Counted(answers), key[3])
        except Exception as error:
            raise _unlike(segment, error) from error
        self.outputs = self._common(self.made.outputs)

    def backward(self, outer: tuple[Crossing, ...], engine: Engine) -> Footprint:
        try:
            recorded = self.made.backward(self._own(outer))
            listed = engine == "listed" and _listed(self.segment)
            found = footprint(at_last_use(recorded) if listed else recorded)
        except Exception as error:
            raise _unlike(self.segment, error) from error
        return replace(
            found,
            inputs={self.names[n]: b for n, b in found.inputs.items()},
            outer={self.names[n]: b for n, b in found.outer.items()},
            outputs=self.outputs,
            gradients=self._common(found.gradients),
        )

    def _own(self, crossings: Iterable[Crossing]) -> tuple[Crossing, ...]:
        return tuple(c._replace(name=self.own[c.name]) for c in crossings)

    def _common(self, crossings: Iterable[Crossing]) -> tuple[Crossing, ...]:
        return tuple(c._replace(name=self.names[c.name]) for c in crossings)


class Seen:
    """By one engine. Nothing here holds on to the graph."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = engine
        self.recorded = 0
        self.lowered: Lowered = {}
        self._whole: set[Segment] = set()
        self._answers = Answers()
        self._forwards: dict[Key, _Forward] = {}
        self._digests: dict[int, tuple[object, str]] = {}
        self._alike: dict[str, Alike] = {}

    def step(self, graph: Graph, plan: Plan, brought: Brought = ()) -> RecordedStep:
        """`brought` is what the optimizer brings to the device to use a gradient in backward."""
        with uncollected():  # what is noted of a recording are many small things as well
            while True:
                program = lower(graph, plan, self._schedule, self.lowered)
                try:
                    return _Linker(self, program, brought).step()
                except _Unlike as error:
                    self._in_full(error.segment)

    # -- lowering ------------------------------------------------------------------------------------------

    def _schedule(self, halo: str, ask: Request) -> Schedule:
        return (by_policy if ask.decision in self._whole else shortened)(halo, ask)

    def _in_full(self, decision: Segment) -> None:
        """An operator does not run on a shortened image: all bands of the segment are to be recorded."""
        self._whole.add(decision)
        for key in [k for k in self.lowered if decision == k[0] or decision in k[0].inside]:
            del self.lowered[key]

    # -- recordings ----------------------------------------------------------------------------------------

    def digest(self, segment: SegmentProgram) -> str:
        """Segments that run alike have it in common."""
        if segment.leaves or segment.returns:
            here = replace(segment, leaves=(), returns=())
            return digest([self.digest(here), segment.leaves, segment.returns])
        run = segment.how
        if segment.parts:
            how = type(run).__name__, segment.decision.policy, segment.decision.store
            return digest([how, _finishes(segment), *map(self.digest, segment.parts)])
        if not isinstance(run, Banded):
            return digest(steps_of(segment))
        # Neighbours decide what is spared and finished; the bands are the same object all the while.
        found = self._digests.get(id(run.pieces))
        if found is None or found[0] is not run.pieces:
            bare = replace(run, spared=frozenset(), unread=frozenset())
            steps = steps_of(replace(segment, how=bare, finishes=()))
            found = self._digests[id(run.pieces)] = run.pieces, digest(steps)
        return digest(
            [found[1], run.single_sweep, sorted(run.spared), sorted(run.unread), _finishes(segment)]
        )

    def alike(self, graph: Graph, segment: SegmentProgram, known: str) -> Alike:
        if known not in self._alike:
            self._alike[known] = alike(graph, segment)
        return self._alike[known]

    def forward(self, graph: Graph, segment: SegmentProgram, key: Key, names: dict[str, str]) -> _Forward:
        found = self._forwards.get(key)
        if found is None:
            found = self._forwards[key] = _Forward(_Run(graph, segment, key, names, self._answers))
        return found

    def footprint(
        self,
        graph: Graph,
        segment: SegmentProgram,
        key: Key,
        names: dict[str, str],
        outer: tuple[Crossing, ...],
    ) -> Footprint:
        known = self._forwards[key]
        found = known.footprints.get(outer)
        if found is None:
            run = known.run or _Run(graph, segment, key, names, self._answers)
            known.run = None
            self.recorded += 1
            found = known.footprints[outer] = run.backward(outer, self.engine)
        return found


def _listed(segment: SegmentProgram) -> bool:
    """Whether the segment runs from lists."""
    return isinstance(segment.how, Banded | Passes)


class _Unlike(Exception):
    """A segment does not run on fewer bands than it has."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)
        self.segment = segment


def _unlike(segment: SegmentProgram, error: Exception) -> Exception:
    found = next(_repeated(segment), None)
    return error if found is None else _Unlike(found)


def _repeated(segment: SegmentProgram) -> Iterator[Segment]:
    if isinstance(segment.how, Banded) and segment.how.repeat is not None:
        yield segment.decision
    for part in segment.parts:
        yield from _repeated(part)


def _finishes(segment: SegmentProgram) -> list[tuple[str, str]]:
    return [finish[:2] for finish in segment.finishes]


class _Linker:
    """Walks through a step: forward for values, backward for their gradients."""

    def __init__(self, seen: Seen, program: Program, brought: Brought) -> None:
        plan = program.plan
        self.how = How(plan.dtype, plan.step_in_backward, brought if plan.step_in_backward else ())
        self.seen, self.program, self.graph = seen, program, program.graph
        self.blocks = count()
        self.names: dict[int, str] = {}
        self.copies: dict[str, tuple[int, int]] = {}
        self.values = {v.name: self._given(v) for v in self.graph.values.values() if v.kind in GIVEN}
        self.gradients: dict[str, _At] = {}

    def step(self) -> RecordedStep:
        segments = self.program.segments
        digests = [self.seen.digest(s) for s in segments]
        shared = _shared(self.graph, segments)
        keys = [self._forward(*each) for each in zip(segments, digests, shared, strict=True)]
        outer = dict(self._outer(name) for name in dict.fromkeys(self._trained()))
        linked = [
            self._backward(*each)
            for each in zip(reversed(segments), reversed(keys), reversed(self.program.drops), strict=True)
        ]
        blocks = {name: at.block for name, at in self.values.items() if at.block is not None}
        return RecordedStep(linked[::-1], self.names, outer, self.copies, digest(digests), blocks)

    def _given(self, value: Value) -> _At:
        found, block = _dense(value), self._block(value.name)
        rearranged = value.kind == "input" and len(value.shape) in ORDERS
        if self.program.plan.layout == "channels_last" and rearranged:
            found = found._replace(stride=strides(value.shape))
            if value.shape[1] > 1:
                self.copies[value.name] = block, value.bytes
        return _At(found, block)

    def _trained(self) -> list[str]:
        """The outputs that backward begins with: the loss, or all that have a gradient."""
        outputs = self.graph.outputs[: 1 if self.graph.loss is not None else None]
        return [n for n in outputs if n in self.values and self.values[n].crossing.wanted]

    def _outer(self, name: str) -> tuple[int, int]:
        """Block and bytes of an output's gradient."""
        block = self._block(f"the gradient of {name}")
        value = replace(self.graph.values[name], dtype=self.values[name].crossing.dtype)
        self.gradients[name] = _At(_dense(value), block)
        return block, value.bytes

    def _block(self, name: str) -> int:
        block = next(self.blocks)
        self.names[block] = name
        return block

    def _forward(
        self, segment: SegmentProgram, known: str, shared: tuple[tuple[str, bool], ...]
    ) -> tuple[Key, dict[str, str]]:
        common, names = self.seen.alike(self.graph, segment, known)
        inputs = segment.part.inputs
        given = _numbered((self.values[n] for n in inputs), [names[n] for n in inputs])
        key = common, given, tuple((names[n], earlier) for n, earlier in shared if n in names), self.how
        forward = self.seen.forward(self.graph, segment, key, names)
        own = {common: name for name, common in names.items()}
        fresh: dict[int, int] = {}
        for crossing in forward.outputs:
            name, source = own[crossing.name], forward.made_of.get(crossing.memory)
            if source is not None:
                block = self.values[own[source]].block if own[source] in self.values else None
            else:
                if crossing.memory not in fresh:
                    fresh[crossing.memory] = self._block(name)
                block = fresh[crossing.memory]
            self.values[name] = _At(crossing, block)
        return key, names

    def _backward(
        self, segment: SegmentProgram, key: tuple[Key, dict[str, str]], drops: Sequence[str]
    ) -> Linked:
        (_, _, shared, _), names = key
        own = {common: name for name, common in names.items()}
        there = (*segment.part.outputs, *segment.part.inputs)
        reached = [n for n in there if n in self.gradients and self.values[n].crossing.wanted]
        reached += [own[n] for n, _ in shared if own[n] in self.gradients]
        handed = [self.gradients.pop(n) for n in reached]
        outer = _numbered(handed, [names[n] for n in reached])
        made = self.seen.footprint(self.graph, segment, key[0], names, outer)
        blocks: dict[int, int | None] = {}
        for name, buffer in made.inputs.items():
            blocks[buffer] = self.values[own[name]].block if own[name] in self.values else None
        for crossing in made.outputs:
            blocks[crossing.memory] = self.values[own[crossing.name]].block
        for name, at in zip(reached, handed, strict=True):
            blocks[made.outer[names[name]]] = at.block
        for crossing in made.gradients:
            number, name = crossing.memory, own[crossing.name]
            if number not in blocks:
                known = number in made.shared
                blocks[number] = self._block(f"the gradient of {name}") if known else None
            self.gradients[name] = _At(crossing, blocks[number])
        title = f"{segment.decision.first}..{segment.decision.last}"
        known_blocks = {n: b for n, b in blocks.items() if b is not None}
        return Linked(made, known_blocks, own, title, drops, segment.decision.policy)


def _dense(value: Value) -> Crossing:
    strides: list[int] = []
    step = 1
    for size in reversed(value.shape):
        strides.append(step)
        step *= max(size, 1)
    return Crossing(value.name, value.shape, tuple(strides[::-1]), 0, value.dtype, value.bytes, 0)


def _numbered(found: Iterable[_At], names: Sequence[str]) -> tuple[Crossing, ...]:
    """Crossings whose memories are numbered in order, so that like ones are equal; called `names`."""
    numbers: dict[Any, int] = {}
    made = []
    for (crossing, block), name in zip(found, names, strict=True):
        at = numbers.setdefault(object() if block is None else block, len(numbers))
        made.append(crossing._replace(name=name, memory=at))
    return tuple(made)


def _shared(graph: Graph, segments: Sequence[SegmentProgram]) -> list[tuple[tuple[str, bool], ...]]:
    """By segment, the parameters that others read as well, and whether an earlier one does."""
    found: list[tuple[tuple[str, bool], ...]] = [() for _ in segments]
    for value in graph.parameters():
        places = graph.consumers[value.name]
        if len(places) < 2 or not value.requires_grad:
            continue
        at = [k for k, s in enumerate(segments) if any(s.part.start <= c < s.part.stop for c in places)]
        for k in at if len(at) > 1 else ():
            found[k] += ((value.name, k > at[0]),)
    return found
