"""What a list takes less than the schedule that it was written from.

A list (rowtune/runtime/lists) leaves out calls whose results nobody reads, and lets go of a tensor after the
last call that looks at it, however long the schedule's Python held it. Here the same is worked out from notes
of which call looks at which buffer.
"""

from __future__ import annotations

from dataclasses import replace

from rowtune.runtime.recording import Buffer
from rowtune.runtime.segment_recording import SegmentRecording, work_of


def at_last_use(made: SegmentRecording) -> SegmentRecording:
    """A schedule's recording as its lists run it, one for forward and one for backward: what forward leaves
    for backward is in that one's hands when it begins, wanted or not."""
    buffers = made.recording.buffers
    shared = {*made.inputs.values(), *made.outer.values(), *made.weights.values(), *made.used}
    shared |= {c.memory for c in (*made.outputs, *made.gradients)}
    lasting = {n for n, b in enumerate(buffers) if b.role != "activation" or b.born < 0 or b.died is None}
    lasting |= shared
    kept = {n for n, b in enumerate(buffers) if b.born < made.forward <= (b.died or 0)}
    dead, last = _reads(made, lasting, kept)

    def shortened(number: int, b: Buffer) -> Buffer:
        if number in lasting:
            return b
        if number not in last:
            return replace(b, bytes=0)  # of a call that is left out
        return Buffer(b.name, b.bytes, b.role, b.born, max(b.born, last[number]))

    recording = replace(made.recording, buffers=tuple(shortened(n, b) for n, b in enumerate(buffers)))
    uses = tuple(use for i, use in enumerate(made.uses) if i not in dead)
    host = made.host - sum(made.uses[i].times for i in dead)
    return replace(made, recording=recording, uses=uses, work=work_of(uses), host=host)


def _reads(made: SegmentRecording, lasting: set[int], kept: set[int]) -> tuple[set[int], dict[int, int]]:
    """Which uses are by calls that are left out, and the last call that reads each buffer."""
    dead: set[int] = set()
    last: dict[int, int] = {}
    wanted = set(lasting)
    forward = False
    for i in reversed(range(len(made.uses))):
        use = made.uses[i]
        if use.call < made.forward and not forward:
            forward = True
            wanted |= kept
            last |= {n: max(last.get(n, 0), made.forward) for n in kept}
        written = use.writes and not wanted.isdisjoint(use.reads)
        if use.makes and wanted.isdisjoint(use.makes) and not written:
            dead.add(i)
            continue
        wanted.update(use.reads)
        for n in (*use.reads, *use.makes):
            last.setdefault(n, use.call)
    return dead, last
