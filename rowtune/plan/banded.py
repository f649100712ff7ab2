"""The rows between two barriers -> how their bands run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rowtune.errors import PlanError
from rowtune.graph.bands import Banding
from rowtune.graph.cuts import Stretch, reduces
from rowtune.graph.graph import Graph, Node
from rowtune.graph.rules import Opaque
from rowtune.plan.plan import Segment
from rowtune.plan.program import Banded, Run, Shares
from rowtune.plan.schedules import SCHEDULES
from rowtune.plan.schedules.schedule import Request, Schedule
from rowtune.rows import Rows

NOTHING = Rows(0, 0)
MOST_SHARES = 1 << 14
"""Shares of bands that a prediction counts, at most: a damaged file may ask for any number of rows."""

Scheduler = Callable[[str, Request], Schedule]


def by_policy(halo: str, ask: Request) -> Schedule:
    return SCHEDULES[halo](ask)


def banded(
    graph: Graph, decision: Segment, part: Stretch, bands: Banding, images: Banding, scheduler: Scheduler
) -> Banded:
    """Bands along the rows, inside bands of images; along the images alone where no rows are given.

    Args:
        part: without barriers inside.
        bands, images: the axes that bands of rows and of images lie on.
        scheduler: orders the bands.

    Raises:
        PlanError: images are to be split that cannot be.
    """
    axis = bands.axis
    if axis and decision.images and (why := _not_split(bands, images, part)):
        raise PlanError(f"segment {decision.first}..{decision.last} cannot be split over images: {why}")
    main, post, sums = _reductions(bands, part)
    # Everything downstream of the bands, or only what the caller reads of them.
    outputs = tuple(dict.fromkeys([*(o for o in part.outputs if o not in {n.name for n in post}), *sums]))
    banded_part = replace(part, nodes=main, outputs=outputs)
    halo = decision.halo if decision.policy == "rows" else "recompute"
    band = decision.band_rows if axis else decision.images
    made = scheduler(halo, Request(graph, bands, banded_part, outputs, decision, band))
    ranges = _image_ranges(graph, part, images, decision.images if axis else 0)
    return Banded(
        made.groups[0].bands,
        images,
        made.groups,
        tuple(made.pieces),
        post,
        sums,
        {n: s for n in sums if (s := _shares(graph, made, n, images, ranges)) is not None},
        tuple(made.forward),
        tuple(made.backward),
        ranges,
        halo == "sweep" and _single(graph, part, post),
        made.sketch,
        made.repeat,
    )


def _shares(
    graph: Graph, made: Schedule, name: str, images: Banding, ranges: tuple[Rows, ...]
) -> Shares | None:
    """Of a reduction whose shares wait for all others; a single sweep has none."""
    bands = made.groups[0].bands
    rule = bands.rule(name)
    if rule.reduces is None or rule.reduces.total is None:
        return None
    source = next(iter(rule.reads))
    dim = bands.dims[source]
    assert dim is not None
    runs = dict.fromkeys(step.piece for step in made.forward if type(step) is Run)
    makers = [p for p in runs if made.pieces[p].ranges.get(name, NOTHING).size]
    rows = [made.pieces[p].ranges[name].size for p in makers]
    if made.repeat is not None:
        again = [r for p, r in zip(makers, rows, strict=True) if p in made.repeat.pieces]
        rows += min(made.repeat.more, MOST_SHARES // max(len(again), 1)) * again
    every = ranges if images.dims[name] is None else ranges[-1:]
    of_all = graph.values[source].shape[dim] * (sum(r.size for r in every))
    counts = tuple(rule.reduces.count * r * some.size // of_all for some in every for r in rows)
    return Shares({p: i for i, p in enumerate(makers)}, len(rows), counts)


def _not_split(bands: Banding, images: Banding, part: Stretch) -> str:
    """Why a part between barriers cannot take some images at a time."""
    sums: set[str] = set()
    late: set[str] = set()  # behind reductions over rows: run once, for all images
    for node in part.nodes:
        rule, own = images.rules[node.name], bands.rules[node.name]
        behind = any(n in late for n in node.inputs)
        if isinstance(rule, Opaque) and not node.effect:
            return f"{node.name}: {rule.reason}"
        if rule.dim is not None and any(n in sums for n in node.inputs):
            return f"{node.name} needs all images"
        if reduces(rule) and not reduces(own) and not behind:
            return f"{node.name} adds up images, but not rows"
        if reduces(rule):
            sums.add(node.name)
        if behind or node.effect or reduces(own):
            late.add(node.name)
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
    main, early = _moved(bands, main, post, part.outputs)
    return tuple(main), (*early, *post), tuple(sums)


def _moved(
    bands: Banding, main: list[Node], post: list[Node], outputs: tuple[str, ...]
) -> tuple[list[Node], list[Node]]:
    """(main without the nodes that no band reads, the nodes to run before `post`): what is computed from
    weights alone, and is read by both, is computed by both."""
    late = {n for node in post for n in node.inputs} | set(outputs)
    banded: set[str] = set()
    kept: list[Node] = []
    early: list[Node] = []
    for node in reversed(main):
        rule = bands.rule(node.name)
        whole = rule.dim is None and not reduces(rule)
        if whole and node.name in late:
            early.insert(0, node)
            late |= set(node.inputs)
            if node.name not in banded:
                continue
        kept.insert(0, node)
        banded |= set(node.inputs)
    return kept, early


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
