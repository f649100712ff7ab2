"""Graph and plan -> program: check every decision, then work out what runs on which rows."""

from __future__ import annotations

from dataclasses import replace

from rowtune.errors import PlanError
from rowtune.graph.bands import Banding, banding
from rowtune.graph.barriers import restored
from rowtune.graph.cuts import Stretch, barrier_parts, is_local, legal_cut, reduces, stretch, why_not
from rowtune.graph.graph import Graph, Node
from rowtune.graph.rules import Opaque
from rowtune.graph.training import LOSS, SUMS
from rowtune.plan.passes import passes
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.policies import SCHEDULES
from rowtune.plan.policies.schedule import Request
from rowtune.plan.program import Banded, Program, SegmentProgram
from rowtune.rows import Rows


def lower(graph: Graph, plan: Plan) -> Program:
    """The program of a plan on a graph.

    A plan made with a loss serves calls without one, where the loss is left out, and the other way round,
    where the loss joins the last segment if it can be banded with it.

    Raises:
        PlanError: segments do not cover the nodes in order, or a rows segment holds an operator that cannot
            be banded (named, with the reason).
    """
    spans = _spans(graph, plan)
    segments = tuple(made for s, a, b in spans for made in _segments(graph, plan, s, a, b))
    return Program(graph, plan, segments, _dead_after(graph, segments, [*graph.inputs, *graph.targets]))


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


def _segments(graph: Graph, plan: Plan, decision: Segment, start: int, stop: int) -> list[SegmentProgram]:
    """The programs of one segment: several where a rows segment stores the tensors at its barriers."""
    if decision.policy != "rows":
        return [_plain(graph, plan, decision, stretch(graph, start, stop))]
    axis = plan.axis if decision.band_rows else 0
    why = why_not(graph, start, stop, axis)
    if why:
        raise PlanError(f"segment {decision.first}..{decision.last} cannot be banded: {why}")
    parts = barrier_parts(graph, start, stop, axis)
    if decision.barriers != "store" and decision.halo == "cache" and len(parts) > 1:
        raise PlanError(
            f"segment {decision.first}..{decision.last}: halo cache keeps rows from forward to backward; "
            f"barriers {decision.barriers} takes halo sweep or recompute"
        )
    if decision.barriers == "passes" and len(parts) > 1:
        part = stretch(graph, start, stop)
        return [SegmentProgram(decision, part, passes=passes(graph, decision, part, axis, _banded))]
    inner = tuple(_part(graph, plan, decision, a, b, axis) for a, b in parts)
    if decision.barriers == "store" or len(parts) == 1:
        return list(inner)
    part = stretch(graph, start, stop)
    inner = tuple(_twice(i) for i in inner)
    return [SegmentProgram(decision, part, inner=inner, dead=_dead_after(graph, inner, list(part.inputs)))]


def _twice(inner: SegmentProgram) -> SegmentProgram:
    """A part that runs again in backward computes no gradients in forward."""
    return replace(inner, banded=replace(inner.banded, single_sweep=False)) if inner.banded else inner


def _part(graph: Graph, plan: Plan, decision: Segment, start: int, stop: int, axis: int) -> SegmentProgram:
    """The rows between two barriers; nodes without rows run as they are."""
    part = stretch(graph, start, stop)
    if why_not(graph, start, stop, axis):
        return _plain(graph, plan, Segment(part.nodes[0].name, part.nodes[-1].name), part)
    return SegmentProgram(
        decision, part, banded=_banded(graph, decision, part, banding(graph, axis), banding(graph, 0))
    )


def _plain(graph: Graph, plan: Plan, decision: Segment, part: Stretch) -> SegmentProgram:
    if decision.images and decision.policy == "keep":
        raise PlanError(f"segment {decision.first}..{decision.last}: keep takes no images")
    if decision.images:
        if not is_local(graph, part.start, part.stop, 0):
            raise PlanError(f"segment {decision.first}..{decision.last} mixes images; checkpoint it whole")
        return SegmentProgram(
            decision, part, banded=_banded(graph, decision, part, banding(graph, 0), banding(graph, 0))
        )
    part = restored(graph, part)
    return SegmentProgram(decision, part, _drops(part))


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


def _banded(graph: Graph, decision: Segment, part: Stretch, bands: Banding, images: Banding) -> Banded:
    """Bands along the rows, inside bands of images; along the images alone where no rows are given.

    Args:
        part: without barriers inside.
        bands, images: the axes that bands of rows and of images lie on.
    """
    axis = bands.axis
    if axis and decision.images and (why := _not_split(images, part)):
        raise PlanError(f"segment {decision.first}..{decision.last} cannot be split over images: {why}")
    main, post, sums = _reductions(bands, part)
    # Everything downstream of the bands, or only what the caller reads of them.
    outputs = tuple(dict.fromkeys([*(o for o in part.outputs if o not in {n.name for n in post}), *sums]))
    banded_part = replace(part, nodes=main, outputs=outputs)
    halo = decision.halo if decision.policy == "rows" else "recompute"
    band = decision.band_rows if axis else decision.images
    made = SCHEDULES[halo](Request(graph, bands, banded_part, outputs, decision, band))
    return Banded(
        bands,
        images,
        made.groups,
        tuple(made.pieces),
        post,
        sums,
        tuple(made.forward),
        tuple(made.backward),
        _image_ranges(graph, part, images, decision.images if axis else 0),
        halo == "sweep" and _single(graph, part, post),
    )


def _not_split(images: Banding, part: Stretch) -> str:
    """Why a part between barriers cannot take some images at a time."""
    sums: set[str] = set()
    for node in part.nodes:
        rule = images.rules[node.name]
        if isinstance(rule, Opaque) and not node.effect:
            return f"{node.name}: {rule.reason}"
        if rule.dim is not None and any(n in sums for n in node.inputs):
            return f"{node.name} needs all images"
        if reduces(rule):
            sums.add(node.name)
    return ""


def _reductions(bands: Banding, part: Stretch) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[str, ...]]:
    """(nodes that run band by band, nodes that read finished sums or change buffers, the sums)."""
    main, post, sums = [], [], []
    late: set[str] = set()
    for node in part.nodes:
        if node.effect or any(name in late for name in node.inputs):
            post.append(node)
            late.add(node.name)
            continue
        main.append(node)
        if reduces(bands.rules[node.name]):
            sums.append(node.name)
            late.add(node.name)
    return tuple(main), tuple(post), tuple(sums)


def _single(graph: Graph, part: Stretch, post: tuple[Node, ...]) -> bool:
    """Backward may run inside forward: the segment is the last, and ends in a loss linear in its sums."""
    ends = graph.loss is not None and graph.loss.linear and part.stop == len(graph.nodes)
    return bool(ends and [n.op for n in post if not n.effect] == ["loss_combine"])


def _image_ranges(graph: Graph, part: Stretch, images: Banding, count: int) -> tuple[Rows, ...]:
    total = max(
        (graph.values[n].shape[d] for n in part.inputs if (d := images.dims[n]) is not None), default=1
    )
    step = count or total
    return tuple(Rows(a, min(a + step, total)) for a in range(0, total, step))
