"""Bands that do what the band before did are not traced: one turn of the schedule stands for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rowtune.plan.program import Step
from rowtune.plan.turns import Turns, turns_of
from rowtune.runtime.banded import BandedRun
from rowtune.runtime.moved import move, room, seen_from

if TYPE_CHECKING:
    from rowtune.runtime.lists.tracer import Tracer


Way = Callable[["Tracer", BandedRun, tuple[Step, ...]], None]
"""How a tracer runs the steps of a schedule."""


def each(tracer: Tracer, run: BandedRun, steps: Sequence[Step]) -> None:
    """All steps."""
    for step in steps:
        run.step(step)


def in_turns(tracer: Tracer, run: BandedRun, steps: tuple[Step, ...]) -> None:
    """Steps up to a turn that leaves behind what the one before left, and those after the last such turn."""
    turns = turns_of(run.program, steps)
    if turns is None:
        each(tracer, run, steps)
        return
    each(tracer, run, steps[: turns.start])
    at = _run_turns(tracer, run, steps, turns)
    each(tracer, run, steps[at:])


def _run_turns(tracer: Tracer, run: BandedRun, steps: tuple[Step, ...], turns: Turns) -> int:
    """The step to go on with. The last turn runs by itself: what those after the loop read and write of the
    loop's is then what a turn does, and the same calls go in all of them."""
    loop, at, before = tracer.begin_loop(), turns.start, seen_from(run, turns, -1)
    for turn in range(turns.times):
        with tracer.turn(loop, turn):
            each(tracer, run, steps[at : at + turns.length])
        at += turns.length
        now = seen_from(run, turns, turn)
        oldest = tracer.oldest(loop, turn) if now == before else None
        before = now
        if oldest is None:
            continue
        left = min(turns.times - turn - 2, room(run, steps, turns))
        if left > 1:
            move(run, steps, turns, left)
            tracer.more[loop] = left
            return at + left * turns.length
    return at
