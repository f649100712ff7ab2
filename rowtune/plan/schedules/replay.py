"""A sweep whose backward has rows of its own: one piece a band and group forward, one backward.

Tapes that are made with the forward's rows must end where gradients arrive, so that none waits for the next
band (schedules/sweep.py): two pieces a band, some of them of very few rows. Here the forward keeps no tape at
all. When the gradient of some rows has arrived, their tape is made from the line buffers, which hold what
the group read and what it made: convolutions are left out (kernels/unvalued.py), so nothing costly is
computed twice.
"""

from __future__ import annotations

from rowtune.plan.frontier import Frontiers, frontiers, gradient_end
from rowtune.plan.groups import Group, any_joins, fuse, replay_joins, replayed
from rowtune.plan.program import Back, Drop, Replay, Run
from rowtune.plan.schedules.schedule import Request, Schedule, forward_pass
from rowtune.rows import Rows

JOINS = {"replay": (0, replay_joins), "late": (1, any_joins)}
"""By kind of tape: overlapping windows that may join a group, and what else may."""


def schedule(ask: Request) -> Schedule:
    found = fuse(ask.graph, ask.bands, ask.part, *JOINS[ask.decision.tapes])
    groups = [replayed(group) for group in found]
    front = frontiers(groups, frozenset(ask.outputs), ask.band_rows)
    made = Schedule(tuple(groups))
    forward_pass(made, groups, front)
    _backward(made, groups, front)
    return made


def _backward(made: Schedule, groups: list[Group], front: Frontiers) -> None:
    final = front.ends[-1]
    at_once = [all(ends[i] == ideal[i] for ends, ideal in zip(front.ends, front.ideal, strict=True))
               for i in range(len(groups))]  # fmt: skip
    before, done = [0] * len(groups), [0] * len(groups)
    for ends in front.ends:
        fresh: dict[int, int] = {}
        for i, end in enumerate(ends):
            if end > before[i]:
                fresh[i] = made.one(i, Rows(before[i], end))
                made.backward.append(Run(fresh[i], tape=at_once[i]))
        before = list(ends)
        for i in range(len(groups) - 1, -1, -1):
            ready = gradient_end(groups[i], front.readers, groups, done, final, ends[i])
            if ready <= done[i]:
                continue
            if at_once[i]:
                made.backward.append(Back(fresh[i]))
            else:
                piece = made.one(i, Rows(done[i], ready))
                made.backward += [Replay(piece), Back(piece)]
                made.backward += [Drop(output, ready) for output in groups[i].outputs]
            done[i] = ready
    assert tuple(done) == final, "rows are left over"
