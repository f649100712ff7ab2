"""The program: what runs, on which rows, what is kept and dropped.

The runtime executes it; what it does then is recorded, and predictions are made of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rowtune.graph.bands import Banding
from rowtune.graph.cuts import Stretch
from rowtune.graph.graph import Graph, Node
from rowtune.graph.rules.rule import Reduction
from rowtune.plan.groups import Group
from rowtune.plan.plan import Plan, Segment
from rowtune.rows import Rows


class Piece(NamedTuple):
    """One group on one range of rows: `ranges` are the rows of every value in it and of what it reads."""

    group: int
    outputs: tuple[tuple[str, Rows], ...]
    ranges: dict[str, Rows]


class Run(NamedTuple):
    """Compute a piece; its output rows join the line buffers. With `tape`, keep what its backward needs."""

    piece: int
    tape: bool


class Replay(NamedTuple):
    """Make a piece's tape from rows that are in the line buffers: those that it reads and those it made."""

    piece: int


class Back(NamedTuple):
    """Run a piece's tape: gradients go to what it read, then its tape and its rows are dropped."""

    piece: int


class Drop(NamedTuple):
    """Rows of a line buffer below `below` are not read again."""

    value: str
    below: int


class Stash(NamedTuple):
    """Keep the live rows of these line buffers until backward (the boundary rows of LR-CNN's 2PS)."""

    band: int
    values: tuple[str, ...]


class Restore(NamedTuple):
    """Start a band of the backward with the rows stashed after `band`, and nothing else."""

    band: int


Step = Run | Replay | Back | Drop | Stash | Restore


class Repeat(NamedTuple):
    """In a program that is only predicted, with fewer bands than there are: the `pieces` of one period stand
    for `more` others each. What it keeps until backward lies between the stashes after bands `stashes`."""

    more: int
    pieces: frozenset[int]
    stashes: tuple[int, int] | None


class Shares(NamedTuple):
    """Of a reduction whose shares lie side by side until all are in: the place that a piece's share has among
    the `bands` of its images, and the elements that each share is of. Bands of images come one after another
    where statistics are of all of them; bands of rows that a prediction leaves out come last."""

    places: Mapping[int, int]
    bands: int
    counts: tuple[int, ...]


class Finish(NamedTuple):
    """Once a segment's backward knows the gradient of the reduction `total`, it adds to that of `source` what
    comes of it, by `reduction.add_gradient`."""

    total: str
    source: str
    reduction: Reduction


@dataclass(frozen=True)
class Banded:
    """How a rows segment runs: `forward` and `backward` are repeated for each range of `images`.

    `post` are the nodes that read finished reductions (a loss's combine). With `single_sweep`, `backward`
    runs inside forward, for a unit gradient of the loss, and autograd's backward only scales. Backward leaves
    out the reductions `spared`, whose gradients later segments finish, and the values of `unread`.
    """

    bands: Banding
    images: Banding
    groups: tuple[Group, ...]
    pieces: tuple[Piece, ...]
    post: tuple[Node, ...]
    sums: tuple[str, ...]
    shares: Mapping[str, Shares]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    image_ranges: tuple[Rows, ...]
    single_sweep: bool
    sketch: bool = False
    """Only predicted: bands of rows and of images that are like others may be left out."""
    repeat: Repeat | None = None
    spared: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()

    def spares(self, group: Group, tape: bool) -> bool:
        """Whether backward has no use for a run of this group."""
        return all(o in self.spared or (o in self.unread and not tape) for o in group.outputs)


@dataclass(frozen=True)
class Passes:
    """A rows segment with barriers inside, streamed once more for each: `forward` finishes the reductions of
    one barrier after another, then the outputs; `backward` finds the gradients of the last barrier's
    reductions first, and those of inputs and weights at the end.

    Every pass is a rows segment of its own, that reads finished reductions like any other input. A pass
    that hands gradients on to later reductions makes them again under another name, their twin.
    """

    forward: tuple[SegmentProgram, ...]
    backward: tuple[SegmentProgram, ...]
    levels: tuple[tuple[str, ...], ...]
    """By barrier: the reductions and what is made from them without rows, in order."""
    twins: dict[str, str]
    twin_graph: Graph
    """The graph with the twins' values."""


@dataclass(frozen=True)
class Whole:
    """Node by node, as PyTorch does. `drops[i]` names the values that nothing reads after node i."""

    drops: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """`parts` one after another, all of them again in backward: a part that is whole, those that a checkpoint
    is said to be made of, or the rows segments between barriers that are made again. `dead[i]` names the
    values that nothing reads after part i."""

    parts: tuple[SegmentProgram, ...]
    dead: tuple[tuple[str, ...], ...]


How = Whole | Checkpoint | Banded | Passes


@dataclass(frozen=True)
class SegmentProgram:
    """One segment: its decision, the nodes it covers, and how they run. At the end of its backward it
    `finishes` gradients of statistics that it reads. Gradients of what it reads from further away are in
    `leaves`: they wait on the host; of what it makes so many come back as `returns` say."""

    decision: Segment
    part: Stretch
    how: How
    finishes: tuple[Finish, ...] = ()
    leaves: tuple[str, ...] = ()
    returns: tuple[tuple[str, int], ...] = ()

    @property
    def parts(self) -> tuple[SegmentProgram, ...]:
        """The segments that this one is made of."""
        match self.how:
            case Checkpoint(parts):
                return parts
            case Passes(forward, backward):
                return *forward, *backward
            case _:
                return ()

    @property
    def single_sweep(self) -> bool:
        """Whether its backward runs inside forward."""
        return isinstance(self.how, Banded) and self.how.single_sweep

    def with_parts(self, parts: Iterable[SegmentProgram]) -> SegmentProgram:
        """The same, made of others, as many."""
        made, how = tuple(parts), self.how
        if isinstance(how, Checkpoint):
            return replace(self, how=replace(how, parts=made))
        if isinstance(how, Passes):
            there = len(how.forward)
            return replace(self, how=replace(how, forward=made[:there], backward=made[there:]))
        assert not made
        return self


@dataclass(frozen=True)
class Program:
    graph: Graph
    plan: Plan
    segments: tuple[SegmentProgram, ...]
    drops: tuple[tuple[str, ...], ...]
    """Per segment: the activations that no later segment reads."""


def steps_of(segment: SegmentProgram, called: Callable[[str], str] = str) -> Any:
    """All that decides what a segment runs and keeps, with values `called` by other names."""
    waits = [*map(called, segment.leaves)], [(called(n), many) for n, many in segment.returns]
    return segment.decision.store, segment.decision.cheap, waits, _steps_of(segment, called)


def _steps_of(segment: SegmentProgram, called: Callable[[str], str]) -> Any:
    nodes = [called(node.name) for node in segment.part.nodes]
    nodes += [*map(called, segment.part.inputs), *map(called, segment.part.outputs)]
    finishes = [[called(n) for n in finish[:2]] for finish in segment.finishes]
    inside = [steps_of(part, called) for part in segment.parts]
    match segment.how:
        case Banded() as run:
            return nodes, finishes, *_banded_steps(run, called)
        case how:
            return type(how).__name__, nodes, finishes, inside


def _banded_steps(run: Banded, called: Callable[[str], str]) -> Any:
    def several(names: Iterable[str]) -> list[str]:
        return sorted(map(called, names))

    groups = [
        ([called(n.name) for n in g.nodes],
         g.replay and [several(g.replay.unread), several(g.replay.blank), several(g.replay.known)])
        for g in run.groups
    ]  # fmt: skip
    pieces = [
        (p.group, [(called(n), rows) for n, rows in p.outputs],
         sorted((called(n), rows) for n, rows in p.ranges.items()))
        for p in run.pieces
    ]  # fmt: skip
    repeat = run.repeat and (run.repeat.more, sorted(run.repeat.pieces), run.repeat.stashes)
    ways = [[_called(step, called) for step in way] for way in (run.forward, run.backward)]
    order = (*ways, run.image_ranges, run.single_sweep)
    return groups, pieces, order, repeat, several(run.spared), several(run.unread)


def _called(step: Step, called: Callable[[str], str]) -> Step:
    if type(step) is Drop:
        return Drop(called(step.value), step.below)
    if type(step) is Stash:
        return Stash(step.band, tuple(map(called, step.values)))
    return step
