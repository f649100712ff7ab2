"""halo=sweep: one pass of line buffers. Forward runs ahead, backward follows a receptive field behind.

What is live is a window of about a band and a receptive field, whatever the number of bands; nothing is
kept between forward and backward but the segment's inputs.
"""

from __future__ import annotations

from itertools import pairwise

from rowtune.plan.frontier import Frontiers, frontiers, gradient_end
from rowtune.plan.groups import Group, fuse
from rowtune.plan.program import Back, Run
from rowtune.plan.schedules import replay
from rowtune.plan.schedules.schedule import Request, Schedule, forward_pass
from rowtune.rows import Rows, between


def schedule(ask: Request) -> Schedule:
    if ask.decision.tapes in replay.JOINS:
        return replay.schedule(ask)
    groups = fuse(ask.graph, ask.bands, ask.part)
    front = frontiers(groups, frozenset(ask.outputs), ask.band_rows)
    made = Schedule(tuple(groups))
    forward_pass(made, groups, front)
    _backward(made, groups, front, ask.decision.tapes)
    return made


def split_points(groups: list[Group], front: Frontiers, tapes: str) -> list[list[int]]:
    """Where each group's tapes end: at every forward frontier, and with split tapes also where gradients
    arrive, so that no tape waits for the next band."""
    points = []
    for i in range(len(groups)):
        found = {ends[i] for ends in front.ends}
        if tapes != "whole":
            found |= {ideal[i] for ideal in front.ideal}
        points.append(sorted(found))
    return points


def _backward(made: Schedule, groups: list[Group], front: Frontiers, tapes: str) -> None:
    points = split_points(groups, front, tapes)
    final = front.ends[-1]
    before, done = [0] * len(groups), [0] * len(groups)
    waiting: list[list[tuple[int, Rows]]] = [[] for _ in groups]
    for ends in front.ends:
        for i, end in enumerate(ends):
            rows = Rows(before[i], end)
            cuts = [rows.lo, *between(points[i], rows), rows.hi]
            for a, b in pairwise(cuts):
                if b > a:
                    piece = made.one(i, Rows(a, b))
                    made.backward.append(Run(piece, tape=True))
                    waiting[i].append((piece, Rows(a, b)))
        before = list(ends)
        for i in range(len(groups) - 1, -1, -1):
            ready = gradient_end(groups[i], front.readers, groups, done, final, ends[i])
            while waiting[i] and waiting[i][0][1].hi <= ready:
                piece, rows = waiting[i].pop(0)
                made.backward.append(Back(piece))
                done[i] = rows.hi
    assert not any(waiting), "a tape is left over"
