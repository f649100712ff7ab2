"""What a run of a segment knows of its bands, as seen from one of them: two turns of a schedule leave the
same behind if it looks the same from both. And a run that goes on further down, as if turns between had run.

It is for tracers: rows, pieces and what else counts bands changes, tensors stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rowtune.plan.program import Back, Replay, Run, Step
from rowtune.plan.turns import Turns
from rowtune.rows import Rows
from rowtune.runtime.banded import BandedRun
from rowtune.runtime.lines import Chunk, Share


def seen_from(run: BandedRun, turns: Turns, turn: int) -> Any:
    """All that the steps to come depend on, with rows and pieces counted from the end of a turn on."""

    def rows(name: str, found: Rows) -> Rows:
        return found.shifted(-turn * turns.shift.get(name, 0))

    def piece(number: int) -> int:
        return turns.first[number] - turn * turns.length

    lines = {n: [(rows(n, r), _like(t)) for r, t in c] for n, c in run.lines.chunks.items() if c}
    shares = {
        (piece(p), n): [(rows(n, s.rows), s.owned, _like(s.tensor)) for s in found]
        for (p, n), found in run.shares.shares.items()
    }
    tapes = {
        piece(p): ([(n, rows(n, r)) for n, r, _ in tape.slabs], tape.weights, [*tape.outputs])
        for p, tape in run.tapes.items()
    }
    arriving = {n: (r.lo, rows(n, r).hi) for n, r in run.arriving.filled.items()}
    sums = {n: {at: _like(t) for at, t in found.items()} for n, found in run.sums.shares.items()}
    whole = [*run.outputs], [*run.gradients.inputs], [*run.gradients.weights], [*run.stash]
    return lines, shares, tapes, arriving, sums, whole, [[*some] for some in run.summing.waiting]


def _like(t: Tensor) -> Any:
    return t.shape, t.stride(), t.dtype


def room(run: BandedRun, steps: Sequence[Step], turns: Turns) -> int:
    """How many turns further down there are pieces for all that waits."""
    waiting = [*run.tapes, *(piece for piece, _ in run.shares.shares)]
    last = max((turns.first[piece] for piece in waiting), default=0)
    end = min(turns.start + turns.times * turns.length, len(steps))
    return (end - 1 - last) // turns.length


def move(run: BandedRun, steps: Sequence[Step], turns: Turns, by: int) -> None:
    """The run as it would be `by` turns later."""
    shift = {name: by * rows for name, rows in turns.shift.items()}

    def piece(number: int) -> int:
        step = steps[turns.first[number] + by * turns.length]
        assert isinstance(step, Run | Replay | Back)
        return step.piece

    for name, found in run.lines.chunks.items():
        run.lines.chunks[name] = [Chunk(r.shifted(shift.get(name, 0)), t) for r, t in found]
    for name, rows in shift.items():
        run.lines.moved[name] = run.lines.moved.get(name, 0) + rows
    run.shares.shares = {
        (piece(p), n): [Share(s.rows.shifted(shift.get(n, 0)), s.tensor, s.owned) for s in found]
        for (p, n), found in run.shares.shares.items()
    }
    run.tapes = {piece(p): tape for p, tape in run.tapes.items()}
    for tape in run.tapes.values():
        tape.slabs = [(n, r.shifted(shift.get(n, 0)), edge) for n, r, edge in tape.slabs]
    for name, rows_there in run.arriving.filled.items():
        run.arriving.filled[name] = Rows(rows_there.lo, rows_there.hi + shift.get(name, 0))
