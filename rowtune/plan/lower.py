"""Graph and plan -> program: check every decision, then work out what runs on which rows."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rowtune.errors import PlanError
from rowtune.graph.bands import banding
from rowtune.graph.barriers import restored
from rowtune.graph.cuts import Stretch, barrier_parts, is_local, legal_cut, reduces, stretch, why_not
from rowtune.graph.graph import Graph
from rowtune.graph.training import LOSS, SUMS
from rowtune.plan.banded import Scheduler, banded, by_policy
from rowtune.plan.finish import finished
from rowtune.plan.legal import there
from rowtune.plan.narrow import divided
from rowtune.plan.passes import passes
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.program import Banded, Checkpoint, Program, SegmentProgram, Whole
from rowtune.plan.waiting import with_waits

Lowered = dict[Any, list[SegmentProgram]]
"""Segments lowered before, of one graph and by one scheduler."""


def lower(
    graph: Graph, plan: Plan, scheduler: Scheduler = by_policy, lowered: Lowered | None = None
) -> Program:
    """The program of a plan on a graph.

    A plan made with a loss serves calls without one, where the loss is left out, and the other way round,
    where the loss joins the last segment if it can be banded with it. Another `scheduler` may schedule fewer
    bands, for a program that is only predicted. What is in `lowered` is not lowered again.

    Raises:
        PlanError: segments do not cover the nodes in order, or a rows segment holds an operator that cannot
            be banded (named, with the reason).
    """
    spans = _spans(graph, plan)
    with uncollected():
        places = [_Place(graph, *span, plan.axis) for span in spans]
        segments = tuple(made for place in places for made in _known(place, scheduler, lowered))
    segments = finished(graph, segments)
    if plan.waiting_gradients == "host":
        segments = with_waits(graph, segments)
    return Program(graph, plan, segments, _dead_after(graph, segments, [*graph.inputs, *graph.targets]))


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: pieces are many and hold no cycles; looking for some among them takes
    as long as making them."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


Span = tuple[Segment, int, int]


def _spans(graph: Graph, plan: Plan) -> list[Span]:
    spans = _in_order(graph, plan.segments, 0)
    at = spans[-1][2] if spans else 0
    if at == graph.index.get(SUMS):
        return _with_loss(graph, plan, spans)
    if at != len(graph.nodes):
        raise PlanError(f"no segment covers {graph.nodes[at].name} and what follows it")
    return spans


def _in_order(graph: Graph, segments: tuple[Segment, ...], at: int) -> list[Span]:
    """(segment, start, stop) of segments that follow each other from node `at` on."""
    spans: list[Span] = []
    for segment in segments:
        start = graph.index.get(segment.first)
        if segment.first in (SUMS, LOSS) and start is None:
            continue
        if start != at:
            raise PlanError(
                f"segments cover the nodes in order: {segment.first!r} should be "
                f"{graph.nodes[at].name if at < len(graph.nodes) else 'nothing'!r}"
            )
        lossless = segment.last in (SUMS, LOSS) and not graph.targets
        stop = len(graph.nodes) if lossless else graph.index.get(segment.last, -1) + 1
        if stop <= at:
            raise PlanError(f"segment {segment.first}..{segment.last} ends before it begins")
        if not legal_cut(graph, stop):
            raise PlanError(
                f"no segment may end after {segment.last}: an operator's several outputs would be torn"
            )
        spans.append((segment, at, stop))
        at = stop
    return spans


def _with_loss(graph: Graph, plan: Plan, spans: list[Span]) -> list[Span]:
    end = len(graph.nodes)
    segment, start, stop = spans[-1]
    if segment.policy == "rows" and not why_not(graph, start, end, plan.axis):
        return [*spans[:-1], (segment, start, end)]
    return [*spans, (Segment(SUMS, LOSS), stop, end)]


@dataclass(frozen=True)
class _Place:
    """A segment, and what a graph says of the nodes that it covers (rowtune/plan/legal.py: Place)."""

    graph: Graph
    decision: Segment
    start: int
    stop: int
    along: int
    inside: bool = False

    @property
    def axis(self) -> int:
        """What its bands lie along."""
        return self.along if self.decision.band_rows else 0

    @property
    def part(self) -> Stretch:
        return stretch(self.graph, self.start, self.stop)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """What lies between barriers."""
        return barrier_parts(self.graph, self.start, self.stop, self.axis)

    @property
    def not_banded(self) -> str:
        return why_not(self.graph, self.start, self.stop, self.axis) if self.part.nodes else ""

    @property
    def barriers(self) -> int:
        return len(self.parts) - 1

    @property
    def mixes_images(self) -> bool:
        return bool(self.part.nodes) and not is_local(self.graph, self.start, self.stop, 0)


def _known(at: _Place, scheduler: Scheduler, lowered: Lowered | None) -> list[SegmentProgram]:
    if lowered is None:
        return _segments(at, scheduler)
    key = at.decision, at.start, at.stop, at.along
    if key not in lowered:
        lowered[key] = _segments(at, scheduler)
    return lowered[key]


def _segments(at: _Place, scheduler: Scheduler) -> list[SegmentProgram]:
    """The programs of one segment: several where a rows segment stores the tensors at its barriers."""
    graph, decision, axis, part = at.graph, at.decision, at.axis, at.part
    if why := there(decision, at):
        raise PlanError(why)
    if decision.inside:
        return [_nested(at, scheduler)]
    if decision.policy != "rows":
        return [_plain(graph, decision, part, scheduler)]
    if not part.nodes:
        return [_nothing(decision, part)]
    parts = at.parts
    if decision.barriers == "passes" and len(parts) > 1:
        return [_streamed(graph, decision, at.start, at.stop, axis, scheduler)]
    if decision.barriers == "narrow" and len(parts) > 1:
        inner = tuple(
            _streamed(graph, decision, a, b, axis, scheduler)
            if several
            else _part(graph, decision, a, b, axis, scheduler)
            for a, b, several in divided(graph, at.start, at.stop, axis)
        )
    else:
        inner = tuple(_part(graph, decision, a, b, axis, scheduler) for a, b in parts)
    if decision.barriers == "store" or len(parts) == 1:
        return list(inner)
    return [_checkpoint(graph, decision, part, tuple(map(_twice, inner)))]


def _nested(at: _Place, scheduler: Scheduler) -> SegmentProgram:
    """A checkpoint made of segments."""
    graph, decision = at.graph, at.decision
    spans = _in_order(graph, decision.inside, at.start)
    if not spans or spans[-1][2] != at.stop:
        raise PlanError(
            f"the segments inside {decision.first}..{decision.last} end at "
            f"{spans[-1][0].last if spans else 'nothing'}, not at {decision.last}"
        )
    places = [_Place(graph, s, a, b, at.along, inside=True) for s, a, b in spans]
    inner = tuple(made for place in places for made in _segments(place, scheduler))
    return _checkpoint(graph, decision, at.part, finished(graph, tuple(map(_twice, inner))))


def _checkpoint(
    graph: Graph, decision: Segment, part: Stretch, parts: tuple[SegmentProgram, ...]
) -> SegmentProgram:
    return SegmentProgram(decision, part, Checkpoint(parts, _dead_after(graph, parts, list(part.inputs))))


def _streamed(
    graph: Graph, decision: Segment, start: int, stop: int, axis: int, scheduler: Scheduler
) -> SegmentProgram:
    part = stretch(graph, start, stop)
    return SegmentProgram(decision, part, passes(graph, decision, part, axis, scheduler))


def _twice(inner: SegmentProgram) -> SegmentProgram:
    """A part that runs again in backward computes no gradients in forward."""
    how = inner.how
    return replace(inner, how=replace(how, single_sweep=False)) if isinstance(how, Banded) else inner


def _part(
    graph: Graph, decision: Segment, start: int, stop: int, axis: int, scheduler: Scheduler
) -> SegmentProgram:
    """The rows between two barriers: each begins with a node that has some."""
    part = stretch(graph, start, stop)
    if not part.nodes:
        return _nothing(decision, part)
    bands, images = banding(graph, axis), banding(graph, 0)
    rules = [bands.rule(node.name) for node in part.nodes]
    if all(rule.dim is None and not reduces(rule) for rule in rules):  # nobody reads what has rows
        kept = Segment(decision.first, decision.last, "keep", store=decision.store)
        return _plain(graph, kept, part, scheduler)
    return SegmentProgram(decision, part, banded(graph, decision, part, bands, images, scheduler))


def _nothing(decision: Segment, part: Stretch) -> SegmentProgram:
    """A segment of which nobody reads anything: a head that the loss leaves out."""
    return SegmentProgram(Segment(decision.first, decision.last, "keep"), part, Whole())


def _plain(graph: Graph, decision: Segment, part: Stretch, scheduler: Scheduler) -> SegmentProgram:
    if not part.nodes:
        return _nothing(decision, part)
    if decision.images:
        images = banding(graph, 0)
        return SegmentProgram(decision, part, banded(graph, decision, part, images, images, scheduler))
    part = restored(graph, part)
    if decision.policy == "keep":
        return SegmentProgram(decision, part, Whole(_drops(part)))
    kept = SegmentProgram(Segment(decision.first, decision.last, "keep"), part, Whole(_drops(part)))
    return _checkpoint(graph, decision, part, (kept,))


def _drops(part: Stretch) -> tuple[tuple[str, ...], ...]:
    """What each node is the last to read, of what is made inside."""
    last = {node.name: i for i, node in enumerate(part.nodes)}
    for i, node in enumerate(part.nodes):
        last |= {name: i for name in node.inputs if name in last}
    drops: list[list[str]] = [[] for _ in part.nodes]
    for name, at in last.items():
        if name not in part.outputs:
            drops[at].append(name)
    return tuple(tuple(names) for names in drops)


def _dead_after(
    graph: Graph, segments: tuple[SegmentProgram, ...], live: list[str]
) -> tuple[tuple[str, ...], ...]:
    """What no later segment reads, after each; `live` is there from the start."""
    dead: list[tuple[str, ...]] = []
    gone: set[str] = set()
    for segment in segments:
        live += segment.part.outputs
        here = [n for n in live if n not in gone and all(c < segment.part.stop for c in graph.consumers[n])]
        gone |= set(here)
        dead.append(tuple(here))
    return tuple(dead)
