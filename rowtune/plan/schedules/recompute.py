"""halo=recompute: every band on its own, halo rows computed twice (LR-CNN's OverL, arXiv 2401.11471)."""

from __future__ import annotations

from rowtune.plan.groups import make_group
from rowtune.plan.program import Back, Run
from rowtune.plan.schedules.schedule import Request, Schedule
from rowtune.rows import Rows, band_ends


def schedule(ask: Request) -> Schedule:
    """One group for the whole segment, so that a band is one slab that runs and backs like a small image."""
    group = make_group(ask.graph, ask.bands, ask.part.nodes, ask.outputs)
    made = Schedule((group,))
    heights = {o: group.heights[o] for o in ask.outputs}
    tallest = max(heights.values())
    bands = -(-tallest // ask.band_rows)
    ends = {o: band_ends(h, bands, tallest, ask.band_rows) for o, h in heights.items()}
    for r in range(bands):
        rows = {o: Rows(ends[o][r - 1] if r else 0, ends[o][r]) for o in ask.outputs}
        piece = made.piece(0, {o: rs for o, rs in rows.items() if rs.size})
        made.forward.append(Run(piece, tape=False))
        made.backward += [Run(piece, tape=True), Back(piece)]
    return made
