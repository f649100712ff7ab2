"""What a schedule is asked and what it answers, and the forward pass that cache and sweep share."""

from __future__ import annotations

from dataclasses import dataclass, field

from rowtune.graph.bands import Banding
from rowtune.graph.cuts import Stretch
from rowtune.graph.graph import Graph
from rowtune.plan.frontier import Frontiers, keep_from
from rowtune.plan.groups import Group
from rowtune.plan.plan import Segment
from rowtune.plan.program import Drop, Piece, Repeat, Run, Step
from rowtune.rows import Rows


@dataclass(frozen=True)
class Request:
    """The banded nodes of a segment, in order; `outputs` includes the reductions that `post` reads."""

    graph: Graph
    bands: Banding
    part: Stretch
    outputs: tuple[str, ...]
    decision: Segment
    band_rows: int


@dataclass
class Schedule:
    """Pieces are numbered once; a forward and a backward step may name the same one."""

    groups: tuple[Group, ...]
    pieces: list[Piece] = field(default_factory=list)
    forward: list[Step] = field(default_factory=list)
    backward: list[Step] = field(default_factory=list)
    sketch: bool = False
    repeat: Repeat | None = None

    def piece(self, index: int, rows: dict[str, Rows]) -> int:
        self.pieces.append(Piece(index, tuple(rows.items()), self.groups[index].ranges(rows)))
        return len(self.pieces) - 1

    def one(self, index: int, rows: Rows) -> int:
        return self.piece(index, dict.fromkeys(self.groups[index].outputs, rows))


def forward_pass(made: Schedule, groups: list[Group], front: Frontiers) -> list[dict[str, Rows]]:
    """Bands top-down, every row once, rows dropped when no later band reads them. Returns the rows that are
    live after each band."""
    before = [0] * len(groups)
    live = []
    for ends in front.ends:
        for i, end in enumerate(ends):
            if end > before[i]:
                made.forward.append(Run(made.one(i, Rows(before[i], end)), tape=False))
        before = list(ends)
        kept = keep_from(groups, front.readers, ends, front.ends[-1])
        made.forward += [Drop(name, rows.lo) for name, rows in kept.items()]
        live.append({name: rows for name, rows in kept.items() if rows.size})
    return live
