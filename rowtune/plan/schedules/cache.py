"""halo=cache: boundary rows kept, every row computed once in forward (LR-CNN's 2PS, arXiv 2401.11471).

Forward goes top-down and keeps all line buffers that are live at a band's end. Backward goes bottom-up: a
band starts from the rows kept after the band above it; gradients of those rows go to the band that made them.
"""

from __future__ import annotations

from rowtune.plan.frontier import frontiers
from rowtune.plan.groups import fuse
from rowtune.plan.program import Back, Restore, Run, Stash, Step
from rowtune.plan.schedules.schedule import Request, Schedule, forward_pass
from rowtune.rows import Rows


def schedule(ask: Request) -> Schedule:
    groups = fuse(ask.graph, ask.bands, ask.part)
    front = frontiers(groups, frozenset(ask.outputs), ask.band_rows)
    made = Schedule(tuple(groups))
    live = forward_pass(made, groups, front)
    made.forward = _with_stashes(made.forward, live, made)
    bands = len(front.ends)
    first_piece: dict[tuple[int, int], int] = {
        (p.group, next(iter(p.outputs))[1].lo): i for i, p in enumerate(made.pieces)
    }
    for r in range(bands - 1, -1, -1):
        before = front.ends[r - 1] if r else (0,) * len(groups)
        made.backward.append(Restore(r - 1))
        mine = [first_piece[i, before[i]] for i in range(len(groups)) if front.ends[r][i] > before[i]]
        made.backward += [Run(p, tape=True) for p in mine]
        made.backward += [Back(p) for p in reversed(mine)]
    return made


def _with_stashes(forward: list[Step], live: list[dict[str, Rows]], made: Schedule) -> list[Step]:
    """Insert a Stash after each band but the last: after the drops that end it."""
    out: list[Step] = []
    band, dropping = 0, False
    for step in [*forward, None]:
        ends = dropping and (step is None or isinstance(step, Run))
        if ends and band < len(live) - 1:
            out.append(Stash(band, tuple(live[band])))
            band += 1
        dropping = step is not None and not isinstance(step, Run)
        if step is not None:
            out.append(step)
    return out
