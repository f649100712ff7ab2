"""Graph and plan -> program: check every decision, then work out what runs on which rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rowtune.errors import PlanError
from rowtune.graph.bands import Banding, banding
from rowtune.graph.cuts import Stretch, legal_cut, stretch, why_not
from rowtune.graph.graph import Graph, Node
from rowtune.graph.rules import Opaque
from rowtune.graph.training import LOSS, SUMS
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.policies import SCHEDULES
from rowtune.plan.policies.schedule import Request, Schedule
from rowtune.plan.program import Banded, Program, SegmentProgram
from rowtune.rows import Rows

Scheduler = Callable[[str, Request], Schedule]


def by_policy(halo: str, ask: Request) -> Schedule:
    return SCHEDULES[halo](ask)


def lower(graph: Graph, plan: Plan, scheduler: Scheduler = by_policy) -> Program:
    """The program of a plan on a graph.

    A plan made with a loss serves calls without one, where the loss is left out, and the other way round,
    where the loss joins the last segment if it can be banded with it. Another `scheduler` may schedule fewer
    bands, for a program that is only predicted.

    Raises:
        PlanError: segments do not cover the nodes in order, or a rows segment holds an operator that cannot
            be banded (named, with the reason).
    """
    spans = _spans(graph, plan)
    with _uncollected():
        segments = tuple(_segment(graph, plan, s, start, stop, scheduler) for s, start, stop in spans)
    return Program(graph, plan, segments, _dead_after(graph, segments))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pieces are many and hold no cycles; looking for some among them takes as long as making them."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _spans(graph: Graph, plan: Plan) -> list[tuple[Segment, int, int]]:
    spans: list[tuple[Segment, int, int]] = []
    at = 0
    for segment in plan.segments:
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
    if at == graph.index.get(SUMS):
        return _with_loss(graph, plan, spans)
    if at != len(graph.nodes):
        raise PlanError(f"no segment covers {graph.nodes[at].name} and what follows it")
    return spans


def _with_loss(
    graph: Graph, plan: Plan, spans: list[tuple[Segment, int, int]]
) -> list[tuple[Segment, int, int]]:
    end = len(graph.nodes)
    segment, start, stop = spans[-1]
    if segment.policy == "rows" and not why_not(graph, start, end, plan.axis):
        return [*spans[:-1], (segment, start, end)]
    return [*spans, (Segment(SUMS, LOSS), stop, end)]


def _segment(
    graph: Graph, plan: Plan, decision: Segment, start: int, stop: int, scheduler: Scheduler
) -> SegmentProgram:
    part = stretch(graph, start, stop)
    drops = _drops(graph, part)
    if decision.policy == "rows" or (decision.policy == "checkpoint" and decision.images):
        return SegmentProgram(decision, part, drops, _banded(graph, plan, decision, part, scheduler))
    if decision.images:
        raise PlanError(f"segment {decision.first}..{decision.last}: keep takes no images")
    return SegmentProgram(decision, part, drops)


def _drops(graph: Graph, part: Stretch) -> tuple[tuple[str, ...], ...]:
    """What each node is the last to read, of what is made inside."""
    made = {node.name for node in part.nodes} - set(part.outputs)
    drops: list[list[str]] = [[] for _ in part.nodes]
    for name in made:
        readers = [c for c in graph.consumers[name] if c < part.stop]
        last = max(readers) if readers else graph.index[name]
        drops[last - part.start].append(name)
    return tuple(tuple(names) for names in drops)


def _dead_after(graph: Graph, segments: tuple[SegmentProgram, ...]) -> tuple[tuple[str, ...], ...]:
    dead: list[tuple[str, ...]] = []
    gone: set[str] = set()
    live = [*graph.inputs, *graph.targets]
    for segment in segments:
        live += segment.part.outputs
        here = [n for n in live if n not in gone and all(c < segment.part.stop for c in graph.consumers[n])]
        gone |= set(here)
        dead.append(tuple(here))
    return tuple(dead)


def _banded(graph: Graph, plan: Plan, decision: Segment, part: Stretch, scheduler: Scheduler) -> Banded:
    """Bands along the rows, inside bands of images; along the images alone where no rows are given."""
    axis = plan.axis if decision.policy == "rows" and decision.band_rows else 0
    band = decision.band_rows or decision.images
    if not band:
        raise PlanError(f"segment {decision.first}..{decision.last}: rows needs band_rows or images")
    why = why_not(graph, part.start, part.stop, axis)
    if why:
        raise PlanError(f"segment {decision.first}..{decision.last} cannot be banded: {why}")
    if axis and decision.images and (why := why_not(graph, part.start, part.stop, 0)):
        raise PlanError(f"segment {decision.first}..{decision.last} cannot be split over images: {why}")
    bands, images = banding(graph, axis), banding(graph, 0)
    main, post, sums = _reductions(graph, bands, part)
    # Everything downstream of the bands, or only what the caller reads of them.
    outputs = tuple(dict.fromkeys([*(o for o in part.outputs if o not in {n.name for n in post}), *sums]))
    banded_part = Stretch(part.start, part.stop - len(post), main, part.inputs, part.weights, outputs)
    halo = decision.halo if decision.policy == "rows" else "recompute"
    made = scheduler(halo, Request(graph, bands, banded_part, outputs, decision, band))
    single = halo == "sweep" and _single(graph, part, post)
    return Banded(
        made.groups[0].bands,
        images,
        made.groups,
        tuple(made.pieces),
        post,
        sums,
        tuple(made.forward),
        tuple(made.backward),
        _image_ranges(graph, part, images, decision.images if axis else 0),
        single,
    )


def _reductions(
    graph: Graph, bands: Banding, part: Stretch
) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[str, ...]]:
    """(nodes that run band by band, nodes that read finished sums, the sums)."""
    main, post, sums = [], [], []
    late: set[str] = set()
    for node in part.nodes:
        rule = bands.rules[node.name]
        if any(name in late for name in node.inputs):
            post.append(node)
            late.add(node.name)
            continue
        main.append(node)
        if not isinstance(rule, Opaque) and rule.reduces:
            sums.append(node.name)
            late.add(node.name)
    return tuple(main), tuple(post), tuple(sums)


def _single(graph: Graph, part: Stretch, post: tuple[Node, ...]) -> bool:
    """Backward may run inside forward: the segment is the last, and ends in a loss linear in its sums."""
    ends = graph.loss is not None and graph.loss.linear and part.stop == len(graph.nodes)
    return bool(ends and [n.op for n in post] == ["loss_combine"])


def _image_ranges(graph: Graph, part: Stretch, images: Banding, count: int) -> tuple[Rows, ...]:
    total = max(
        (graph.values[n].shape[d] for n in part.inputs if (d := images.dims[n]) is not None), default=1
    )
    step = count or total
    return tuple(Rows(a, min(a + step, total)) for a in range(0, total, step))
