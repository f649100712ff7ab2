"""A recording: the aten calls of one training step in order, over buffers whose life is known.

It is what the runtime does, not a description of it: `runtime/recorder.py` runs the same code on tensors
without data and writes down what comes by. Memory is the peak of the list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Role = Literal["parameter", "buffer", "batch", "constant", "gradient", "activation"]
Way = Literal["forward", "backward"]

STATE: frozenset[str] = frozenset({"parameter", "buffer", "gradient"})
"""What every plan holds alike: a plan's own share of the memory is the rest."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of `bytes` bytes, alive from the end of call `born` (-1: before the first) to the end of call
    `died` (None: beyond the last). `name` is that of a value or of the operator that made it."""

    name: str
    bytes: int
    role: Role
    born: int
    died: int | None


@dataclass(frozen=True, slots=True)
class Call:
    """One aten operator: what it reads and makes, by number of buffer. `segment` is the position in the
    program of the segment whose forward it is part of; a backward is not told apart by segments."""

    op: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    segment: int
    way: Way


@dataclass(frozen=True)
class Recording:
    """One step, from the first operator of the forward to the last of the backward."""

    calls: tuple[Call, ...]
    buffers: tuple[Buffer, ...]

    @cached_property
    def live_bytes(self) -> tuple[int, ...]:
        """Bytes alive at the end of each call, before what dies with it is gone; the batch and parameters
        included."""
        return tuple(self._curve(frozenset()))

    @cached_property
    def activation_bytes(self) -> int:
        """The peak of what is neither parameter nor gradient nor buffer of the model."""
        return max(self._curve(STATE), default=0)

    @cached_property
    def peak_bytes(self) -> int:
        """The peak of all that is alive; an optimizer's state comes on top."""
        return max(self.live_bytes, default=0)

    @property
    def peak_call(self) -> int:
        """The call at whose end the peak is."""
        return max(range(len(self.calls)), key=self.live_bytes.__getitem__)

    def alive_at(self, call: int) -> list[Buffer]:
        """What is alive at the end of a call, the largest first."""
        found = [b for b in self.buffers if b.born <= call and (b.died is None or call <= b.died)]
        return sorted(found, key=lambda b: -b.bytes)

    def _curve(self, without: frozenset[str]) -> Iterator[int]:
        gained: defaultdict[int, int] = defaultdict(int)
        lost: defaultdict[int, int] = defaultdict(int)
        for buffer in self.buffers:
            if buffer.role not in without:
                gained[buffer.born] += buffer.bytes
                if buffer.died is not None:
                    lost[buffer.died] += buffer.bytes
        live = gained[-1] - lost[-1]
        for i in range(len(self.calls)):
            live += gained[i]
            yield live
            live -= lost[i]


def check(recording: Recording) -> Recording:
    """Assert what every recording must satisfy: what is read is alive, what is made was not there before,
    what is left over at the end belongs to the model, the batch or its gradients."""
    for i, call in enumerate(recording.calls):
        for number in call.reads:
            buffer = recording.buffers[number]
            assert buffer.born < i, f"{call.op} (call {i}) reads {buffer.name} before it is made"
            assert buffer.died is None or buffer.died >= i, f"{call.op} (call {i}) reads {buffer.name}, gone"
        for number in call.makes:
            assert recording.buffers[number].born == i, f"{call.op} (call {i}) makes what was made before"
    for buffer in recording.buffers:
        assert buffer.died is None or buffer.died >= buffer.born, f"{buffer.name} ends before it begins"
        left = buffer.died is None and buffer.role == "activation"
        assert not left, f"{buffer.name} ({buffer.bytes} bytes) is left over"
    return recording
