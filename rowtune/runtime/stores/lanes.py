"""Copies between a device and the host's memory, in order.

On a card they are made on a stream of their own. Events order the streams, and the host waits for nothing:
what leaves is held until the device was told to wait for its copy, what is likely to be wanted next is on its
way while this is at work, and memory on the host that is used again is written to by a later copy of the same
stream. `Ahead` is that order; what a stream is, is the card's, or a test's. (The card's was not run yet.)

On the CPU there is one memory. The copies are real, but made where no meter and no recorder looks: they are
host bytes, which the pool counts, and not the device's.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rowtune.kernels.rounding import order_of
from rowtune.runtime.stores.store import Part, cut
from rowtune.torch_private import without_modes

LEAVING = 1
"""Pieces that are held while they leave."""
PIECES = 8
"""A tensor that does not lie on the device as it will on the host leaves in so many."""

Sizes = tuple[tuple[int, int], ...]


class Place:
    """A tensor's place on the host: there the dimensions that parts are cut `along` are outermost, so that
    rows are one block, or one for each image.

    `before` is what was put before it, which backward mostly wants next.
    """

    def __init__(
        self,
        t: Tensor,
        along: tuple[int, ...],
        buffer: Tensor,
        lane: Lane,
        before: weakref.ref[Place] | None,
    ) -> None:
        self.dtype, self.device, self.lane, self.before = t.dtype, t.device, lane, before
        self.order = (*along, *(d for d in order_of(t.stride()) if d not in along))
        shape = [t.shape[d] for d in self.order]
        whole = buffer.view(t.dtype).view(shape)
        self.host = whole.permute([self.order.index(d) for d in range(t.dim())])
        self.coming: dict[Part, Way] = {}
        self.last: dict[Sizes, Part] = {}
        self.step: dict[Sizes, tuple[int, ...]] = {}

    def next_part(self, part: Part) -> Part | None:
        """The part that lies as far behind this as this behind the last one of its sizes."""
        sizes = tuple((dim, many) for dim, _, many in part)
        last = self.last.get(sizes, part)
        if last != part:
            self.step[sizes] = tuple(b - a for (_, a, _), (_, b, _) in zip(last, part, strict=True))
        self.last[sizes] = part
        if (step := self.step.get(sizes)) is None:
            return None
        found = tuple((dim, at + by, many) for (dim, at, many), by in zip(part, step, strict=True))
        inside = all(0 <= at <= self.host.shape[dim] - many for dim, at, many in found)
        return found if inside else None


class Way(NamedTuple):
    """A tensor whose copy is under way, and what marks its end."""

    tensor: Tensor
    mark: Any


class Stream(Protocol):
    """What makes copies, in order."""

    def copy(self, into: Tensor, of: Tensor) -> Any:
        """Copy, after all that the device was asked for so far. Returns what marks the end."""

    def wait(self, mark: Any) -> None:
        """What the device is asked for from now on comes after the mark."""


class Prompt:
    """Copies that are done when they return."""

    def copy(self, into: Tensor, of: Tensor) -> None:
        with without_modes():
            into.copy_(of)

    def wait(self, mark: None) -> None:
        pass


Told = Callable[[Tensor, Tensor], None]


def nobody(into: Tensor, of: Tensor) -> None:
    """Nobody is told."""


class Blank:
    """Copies of tensors without data: whoever counts calls is told of them."""

    def __init__(self, told: Told = nobody) -> None:
        self.told = told

    def copy(self, into: Tensor, of: Tensor) -> None:
        self.told(into, of)

    def wait(self, mark: None) -> None:
        pass


class Side:
    """A card's stream beside that at work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, into: Tensor, of: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), without_modes():
            into.copy_(of, non_blocking=True)
        done: torch.cuda.Event = self.stream.record_event()
        return done

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)


class Lane(Protocol):
    """To a device and back."""

    stream: Stream

    def leave(self, t: Tensor, place: Place) -> None:
        """The tensor may be let go of, or written to."""

    def settle(self) -> None:
        """Nothing is held any more that leaves."""

    def fetch(self, place: Place, size: list[int], stride: list[int], part: Part) -> Tensor:
        """A part of what is there, of this size and these strides, in new memory."""


class Here:
    """Copies that are made when they are asked for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def leave(self, t: Tensor, place: Place) -> None:
        self.stream.copy(place.host, t)

    def settle(self) -> None:
        pass

    def fetch(self, place: Place, size: list[int], stride: list[int], part: Part) -> Tensor:
        found = torch.empty_strided(size, stride, dtype=place.dtype, device=place.device)
        with without_modes():
            there = cut(place.host, part)
        self.stream.copy(found, there)
        return found


class Ahead:
    """Copies beside the work of the device, one ahead."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.leaving: deque[Way] = deque()

    def leave(self, t: Tensor, place: Place) -> None:
        for piece, room in _pieces(t, place):
            self._let_go(LEAVING - 1)
            self.leaving.append(Way(piece, self.stream.copy(room, piece)))

    def settle(self) -> None:
        self._let_go(0)

    def fetch(self, place: Place, size: list[int], stride: list[int], part: Part) -> Tensor:
        self.settle()  # forward is over, or waits for what it needs again
        way = place.coming.pop(part, None) or self._start(place, part)
        self._look_ahead(place, part)
        self.stream.wait(way.mark)
        if way.tensor.stride() == tuple(stride):
            return way.tensor
        made = torch.empty_strided(size, stride, dtype=place.dtype, device=place.device)
        return made.copy_(way.tensor)

    def _let_go(self, most: int) -> None:
        while len(self.leaving) > most:
            self.stream.wait(self.leaving[0].mark)
            self.leaving.popleft()

    def _look_ahead(self, place: Place, part: Part) -> None:
        if not part:
            before = place.before() if place.before is not None else None
            if before is not None and () not in before.coming:
                before.coming[()] = self._start(before, ())
            return
        after = place.next_part(part)
        sizes = [many for _, _, many in part]
        for other in [p for p in place.coming if p != after and [many for _, _, many in p] == sizes]:
            self.stream.wait(place.coming[other].mark)
            del place.coming[other]
        if after is not None and after not in place.coming:
            place.coming[after] = self._start(place, after)

    def _start(self, place: Place, part: Part) -> Way:
        """The memory comes from the stream at work, whose earlier readers of it have to be done."""
        with without_modes():
            there = cut(place.host, part).permute(place.order)
        made = torch.empty(there.shape, dtype=place.dtype, device=place.device)
        mark = None
        with without_modes():
            blocks = [*zip(_blocks(made, there), _blocks(there, there), strict=True)]
        for into, of in blocks:
            mark = self.stream.copy(into, of)
        return Way(made.permute([place.order.index(d) for d in range(made.dim())]), mark)


def ended(coming: dict[Part, Way], stream: Stream) -> None:
    """What is on its way is not wanted any more: its memory is not used again before it came."""
    for way in coming.values():
        stream.wait(way.mark)
    coming.clear()


def _pieces(t: Tensor, place: Place) -> Iterator[tuple[Tensor, Tensor]]:
    """What leaves, as it will lie on the host, and the room for it there."""
    t = t.permute(place.order)
    with without_modes():
        room = place.host.permute(place.order)
        rooms = [room] if t.is_contiguous() else room.chunk(PIECES)
    at = 0
    for each in rooms:
        yield (t if len(rooms) == 1 else t.narrow(0, at, each.shape[0])).contiguous(), each
        at += each.shape[0] if each.dim() else 0


def _blocks(t: Tensor, there: Tensor) -> Iterator[Tensor]:
    """Of a tensor, what lies in one block on the host each."""
    if there.is_contiguous():
        yield t
        return
    for one, other in zip(t, there, strict=True):
        yield from _blocks(one, other)
