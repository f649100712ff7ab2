"""A segment's recording as a few numbers: how much is alive between the moments at which something begins or
ends that its neighbours hold as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rowtune.runtime.recording import Buffer
from rowtune.runtime.segment_recording import Crossing, SegmentRecording, Work

Bytes = NDArray[np.int64]


class Span(NamedTuple):
    """A stretch of calls. `ends` are gone when it begins, `begins` are there from then on; `activations` is
    the most of the segment's own that is alive in it, `total` the same with gradients of parameters, and
    `largest` is the largest (bytes, name) of them at that moment."""

    ends: tuple[int, ...]
    begins: tuple[int, ...]
    activations: int
    total: int
    largest: tuple[int, str]


class Side(NamedTuple):
    """A segment's forward or backward. When it is over, it leaves `activations` and `total` bytes alive."""

    spans: tuple[Span, ...]
    activations: int
    total: int


@dataclass(frozen=True)
class Footprint:
    """`shared` are the buffers that neighbours hold as well, with their bytes; of these, forward leaves those
    in `kept` for backward, and `host_bytes` on the host. `work` and `host` are its calls, for its time."""

    forward: Side
    backward: Side
    shared: dict[int, int]
    kept: frozenset[int]
    inputs: dict[str, int]
    outputs: tuple[Crossing, ...]
    outer: dict[str, int]
    gradients: tuple[Crossing, ...]
    work: Work = ()
    host: int = 0
    host_bytes: int = 0


def footprint(made: SegmentRecording) -> Footprint:
    buffers, start, stop = made.recording.buffers, made.forward, made.calls
    given = {*made.inputs.values(), *made.outer.values()}
    crossing = (given | {c.memory for c in (*made.outputs, *made.gradients)}) - {*made.weights.values()}
    mine = [b for n, b in enumerate(buffers) if b.role in ("activation", "temporary") and n not in crossing]
    own = _Curve([*mine, *made.left_out], stop)
    state = _Curve([b for b in buffers if b.role == "gradient"], stop)
    begins = {n: max(buffers[n].born, 0) for n in crossing - given}
    ends = {n: max(died + 1, start) for n in crossing if (died := buffers[n].died) is not None}
    forward = {n: at for n, at in begins.items() if at < start}
    sides = [
        Side(_spans(a, b, here, gone, own, state), own.left(b), own.left(b) + state.left(b))
        for a, b, here, gone in ((0, start, forward, {}), (start, stop, begins, ends))
    ]
    kept = frozenset(made.kept) & crossing - {*made.outer.values()}
    sizes = {n: buffers[n].bytes for n in crossing}
    return Footprint(
        sides[0], sides[1], sizes, kept, made.inputs, made.outputs, made.outer, made.gradients,
        made.work, made.host, made.host_bytes,
    )  # fmt: skip


class _Curve:
    """Bytes of some of a recording's buffers."""

    def __init__(self, buffers: Sequence[Buffer], stop: int) -> None:
        self.buffers = buffers
        self.bytes = np.array([b.bytes for b in buffers], np.int64)
        self.born = np.array([max(b.born, 0) for b in buffers], np.int64)
        self.gone = np.array([stop + 1 if b.died is None else b.died + 1 for b in buffers], np.int64)
        change = np.zeros(stop + 2, np.int64)
        np.add.at(change, self.born, self.bytes)
        np.subtract.at(change, self.gone, self.bytes)
        self.alive: Bytes = np.cumsum(change)

    def left(self, at: int) -> int:
        """Bytes alive between calls at - 1 and at."""
        return int(self.bytes[(self.born < at) & (self.gone > at)].sum())

    def largest(self, at: int) -> tuple[int, str]:
        """What takes most at the end of a call."""
        found = self.bytes * ((self.born <= at) & (self.gone > at))
        if not len(found) or not (most := int(found.max())):
            return 0, ""
        return most, self.buffers[int(found.argmax())].name


def _spans(
    start: int, stop: int, begins: dict[int, int], ends: dict[int, int], own: _Curve, state: _Curve
) -> tuple[Span, ...]:
    """Of calls [start, stop); what ends with the last is not said to end."""
    places = {start, *begins.values(), *ends.values()}
    at = sorted(t for t in places if start <= t < max(stop, start + 1))
    found = []
    for a, b in zip(at, [*at[1:], stop], strict=True):
        gone = tuple(n for n, t in ends.items() if t == a)
        here = tuple(n for n, t in begins.items() if t == a)
        if a == b:
            found.append(Span(gone, here, 0, 0, (0, "")))
            continue
        alive = own.alive[a:b]
        total = alive + state.alive[a:b]
        peak = a + int(total.argmax())
        found.append(Span(gone, here, int(alive.max()), int(total.max()), own.largest(peak)))
    return tuple(found)
