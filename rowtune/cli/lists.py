"""`rowtune inspect plan.json`: whether PyTorch runs a segment, a list, or its schedule each time, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rowtune.cli.run import read_plan
from rowtune.cli.screen import Screen, plain_table

if TYPE_CHECKING:
    from rowtune.plan.program import SegmentProgram
    from rowtune.runtime.lists.run import Lists


def show_lists(screen: Screen, path: Path) -> None:
    """Write the plan's lists down, on tensors without data, and say of which segments there are some."""
    from rowtune.plan.lower import lower
    from rowtune.runtime.recorder import written_lists
    from rowtune.train.opened import open_plan

    file = read_plan(path)
    screen.opening(file.problem.model)
    work, _ = open_plan(file)
    screen.err.print("[dim]writing down a step ...[/]")
    program = lower(work.graph, file.plan)
    lists = written_lists(program)
    segments = [_described(one, lists) for segment in program.segments for one in _parts(segment)]
    table = plain_table(("from", "left"), ("to", "left"), ("policy", "left"), ("runs", "left"))
    for s in segments:
        why = f": {s['why']}" if s["why"] else ""
        table.add_row(s["first"], s["last"], s["policy"], s["runs"] + why)
    screen.out.print(table)
    screen.json({"status": "ok", "plan": str(path), "segments": segments})


def _parts(segment: SegmentProgram) -> Iterator[SegmentProgram]:
    """A segment, or those that it is made of."""
    from rowtune.plan.program import Checkpoint

    if not isinstance(segment.how, Checkpoint):
        yield segment
        return
    for part in segment.how.parts:
        yield from _parts(part)


def _described(segment: SegmentProgram, lists: Lists) -> dict[str, Any]:
    from rowtune.plan.program import Whole

    nodes = segment.part.nodes
    found = {"first": nodes[0].name, "last": nodes[-1].name, "policy": segment.decision.policy, "why": ""}
    if isinstance(segment.how, Whole):
        return {**found, "runs": "by PyTorch"}
    if id(segment) not in lists.kinds:
        return {**found, "runs": "traced each time", "why": NO_LIST}
    why = "; ".join(sorted(lists.why_traced(id(segment))))
    return {**found, "runs": "traced each time" if why else "from a list", "why": why}


NO_LIST = "it draws random numbers without a seed of its own, or gets rows of a store band by band"
