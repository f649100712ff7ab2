"""A recording: the aten calls of one training step, or of one segment's, in order, over buffers whose life is
known.

It is what the runtime does, not a description of it: `runtime/recorder.py` runs the same code and writes down
what comes by. Memory is the peak of the list; a step can be run again from it (`runtime/listed.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import torch

from rowtune.runtime.blank import Signature
from rowtune.torch_private import OpOverload

Role = Literal["parameter", "buffer", "batch", "constant", "gradient", "activation", "temporary"]
Way = Literal["forward", "backward"]

STATE: frozenset[str] = frozenset({"parameter", "buffer", "gradient"})
"""What every plan holds alike: a plan's own share of the memory is the rest."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of `bytes` bytes, alive from the end of call `born` (-1: before the first) to the end of call
    `died` (None: beyond the last). `name` is that of a value or of the operator that made it; what is
    temporary is a kernel's own, of one call (runtime/temporary.py)."""

    name: str
    bytes: int
    role: Role
    born: int
    died: int | None


class View(NamedTuple):
    """A tensor: how a buffer is looked at."""

    buffer: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class At(NamedTuple):
    """Stands for a tensor, by its number among the views, in a call's arguments."""

    view: int


class Turn(NamedTuple):
    """A call is number `at` of those of a turn of a loop, as it was recorded."""

    loop: int
    turn: int
    at: int


class Call(NamedTuple):
    """One aten operator on views: the arguments with an `At` for every tensor, and the numbers of the views
    that it returns, in order (a view of what was there is no new one where it was seen before; -1 for what is
    no tensor). `segment` is
    the position in the program of the segment whose forward it is part of."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    segment: int
    way: Way
    turn: Turn | None = None

    @property
    def name(self) -> str:
        return self.op._schema.name


class Use(NamedTuple):
    """What call number `call` does, where no more is noted of it: the buffers that it looks at, those that
    what it returns lies in, whether it writes to what it is given, its signature (None: it has none) and how
    many calls it stands for."""

    call: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    writes: bool
    does: Signature | None
    times: int


@cache
def written_arguments(op: OpOverload) -> tuple[Any, ...]:
    """Positions and names of the arguments that an operator writes to."""
    found: list[Any] = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [i, argument.name]
    return tuple(found)


@dataclass(frozen=True)
class Recording:
    """From the first operator to the last."""

    calls: tuple[Call, ...]
    views: tuple[View, ...]
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

    def read_by(self, call: Call) -> tuple[int, ...]:
        """The buffers that a call looks at."""
        return tuple(dict.fromkeys(self.views[v].buffer for v in call.reads))

    def made_by(self, number: int) -> tuple[int, ...]:
        """The buffers that call `number` makes."""
        found = dict.fromkeys(self.views[v].buffer for v in self.calls[number].makes if v >= 0)
        return tuple(b for b in found if self.buffers[b].born == number)

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
    made: set[int] = set()
    for i, call in enumerate(recording.calls):
        for number in recording.read_by(call):
            buffer = recording.buffers[number]
            assert buffer.born < i, f"{call.name} (call {i}) reads {buffer.name} before it is made"
            assert buffer.died is None or buffer.died >= i, (
                f"{call.name} (call {i}) reads {buffer.name}, gone"
            )
        fresh = recording.made_by(i)
        assert not made & {*fresh}, f"{call.name} (call {i}) makes what was made before"
        made |= {*fresh}
    for number, buffer in enumerate(recording.buffers):
        assert buffer.died is None or buffer.died >= buffer.born, f"{buffer.name} ends before it begins"
        given = buffer.born < 0 or buffer.role in ("constant", "temporary")
        assert given or number in made, f"no call makes {buffer.name}, or one made before"
        left = buffer.died is None and buffer.role == "activation"
        assert not left, f"{buffer.name} ({buffer.bytes} bytes) is left over"
    return recording
