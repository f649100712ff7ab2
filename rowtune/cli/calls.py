"""`rowtune inspect plan.json --calls`: what one step of a plan runs, call by call, and what is alive then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rowtune.cli.run import read_plan
from rowtune.cli.screen import SOFT, Screen, facts

if TYPE_CHECKING:
    from rowtune.runtime.recording import Recording

# Tensors named at the peak.
LARGEST = 8


def show_calls(screen: Screen, path: Path) -> None:
    """Record one step of the plan, on tensors without data, and list it."""
    from rowtune.plan.lower import lower
    from rowtune.runtime.recorder import record
    from rowtune.train.opened import open_plan

    file = read_plan(path)
    screen.opening(file.problem.model)
    work, _ = open_plan(file)
    screen.err.print("[dim]recording a step ...[/]")
    recording = record(lower(work.graph, file.plan))
    _list(screen, recording)
    screen.json(as_dict(recording, str(path)))


def _list(screen: Screen, recording: Recording) -> None:
    from rowtune.tune.sizes import format_bytes

    for i, call in enumerate(recording.calls):
        made = sum(recording.buffers[n].bytes for n in recording.made_by(i))
        shapes = " ".join("x".join(map(str, recording.views[v].shape)) or "scalar" for v in call.reads)
        place = f"{call.way} {call.segment}" if call.way == "forward" else call.way
        alive = format_bytes(recording.live_bytes[i])
        line = Text.assemble(
            (f"{i:>6}  {place:<11} ", SOFT), f"{call.name:<38} ", f"{format_bytes(made) if made else '':>8} ",
            (f"{alive:>9} alive  {shapes}", SOFT),
        )  # fmt: skip
        screen.out.print(line, soft_wrap=True)
    peak = recording.peak_call
    most = format_bytes(recording.peak_bytes)
    largest = ", ".join(f"{b.name} {format_bytes(b.bytes)}" for b in recording.alive_at(peak)[:LARGEST])
    screen.out.print(
        facts(
            [
                ("calls", f"{len(recording.calls)}"),
                (
                    "peak",
                    f"{most} without the optimizer's state, at call {peak}",
                ),
                ("activations", format_bytes(recording.activation_bytes)),
                ("alive then", largest),
            ]
        )
    )


def as_dict(recording: Recording, plan: str) -> dict[str, Any]:
    """The JSON of inspect --calls: buffers are numbers into `buffers`."""
    return {
        "status": "ok",
        "plan": plan,
        "peak_bytes": recording.peak_bytes,
        "activation_bytes": recording.activation_bytes,
        "peak_call": recording.peak_call,
        "calls": [
            {
                "op": call.name,
                "way": call.way,
                "segment": call.segment,
                "reads": list(recording.read_by(call)),
                "makes": list(recording.made_by(i)),
            }
            for i, call in enumerate(recording.calls)
        ],
        "buffers": [
            {"name": b.name, "bytes": b.bytes, "role": b.role, "born": b.born, "died": b.died}
            for b in recording.buffers
        ],
    }
