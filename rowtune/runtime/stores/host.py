"""Offload: kept in the host's memory, exactly.

On a card in pinned memory that is used again (to pin it takes milliseconds), with copies beside the card's
work: see `rowtune/runtime/stores/lanes.py`.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.kernels.constants import STANDS_FOR, TRACING
from rowtune.runtime.stores import calls
from rowtune.runtime.stores.lanes import (
    Ahead,
    Blank,
    Here,
    Lane,
    Place,
    Prompt,
    Side,
    Stream,
    Told,
    Way,
    ended,
    nobody,
)
from rowtune.runtime.stores.store import Lay, Part
from rowtune.torch_private import FakeTensor, without_modes

META = torch.device("meta")


class HostPool:
    """Host memory of one module's steps. `bytes` are in use, `peak_bytes` were at most.

    Args:
        told: of copies of tensors without data, where those of the device are not made beside its work.
    """

    def __init__(self, told: Told = nobody) -> None:
        self.told = told
        self.bytes = self.peak_bytes = 0
        self._free: defaultdict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self._lanes: dict[tuple[torch.device, str], Lane] = {}

    def take(self, size: int, device: torch.device) -> Tensor:
        """Memory of `size` bytes, pinned for a card; without data for tensors without data."""
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        free = self._free[size, device.type]
        if free:
            return free.pop()
        there = META if device.type == "meta" else torch.device("cpu")
        return torch.empty(size, dtype=torch.uint8, device=there, pin_memory=device.type == "cuda")

    def give_back(self, buffer: Tensor, device: torch.device) -> None:
        """Whoever takes it next writes to it in a later copy of the same stream."""
        self.bytes -= buffer.numel()
        self._free[buffer.numel(), device.type].append(buffer)

    def settle(self) -> None:
        """A segment's forward is over: what leaves is not held beyond it, so that a segment takes by itself
        what it takes among others."""
        for lane in self._lanes.values():
            lane.settle()

    def lane(self, device: torch.device) -> Lane:
        """Copies to and from a device, in order: what a buffer is used for next waits for what it was."""
        key = device, STANDS_FOR.get() if device.type == "meta" else ""
        if key not in self._lanes:
            self._lanes[key] = _lane(device, key[1], self.told)
        return self._lanes[key]


def _lane(device: torch.device, stands_for: str, told: Told) -> Lane:
    if device.type == "cuda":
        return Ahead(Side(device))
    if device.type == "meta":
        return Ahead(Blank()) if stands_for.startswith("cuda") else Here(Blank(told))
    return Here(Prompt())


class Away(NamedTuple):
    """A tensor of this shape and these strides, and its place on the host: a tensor without data stands for
    that where a list is written."""

    place: Place | Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Host:
    def __init__(self, pool: HostPool) -> None:
        self.pool = pool
        self._last: weakref.ref[Place] | None = None

    def takes(self, t: Tensor) -> bool:
        return t.numel() > 0

    def put(self, t: Tensor, along: tuple[int, ...] = ()) -> Away:
        with without_modes():
            like = torch.empty_like(torch.empty_strided(t.shape, t.stride(), device=META))  # dense
        place = self.leave(t, along) if TRACING.get() is None else calls.leave(t, along)
        return Away(place, tuple(t.shape), like.stride())

    def get(self, handle: Away) -> Tensor:
        return calls.fetch(handle.place, [*handle.shape], [*handle.stride], ())

    def rows(self, handle: Away, part: Part, lay: Lay) -> Tensor:
        return calls.fetch(handle.place, *lay.cut(part), part)

    def bytes(self, handle: Away) -> int:
        return 0

    def leave(self, t: Tensor, along: tuple[int, ...]) -> Place:
        """The place where the tensor goes."""
        device = META if isinstance(t, FakeTensor) else t.device
        lane = self.pool.lane(device)
        with without_modes():
            buffer = self.pool.take(t.numel() * t.itemsize, device)
            place = Place(t, along, buffer, lane, None if along else self._last)
        weakref.finalize(place, _ended, place.coming, lane.stream, self.pool, buffer, device).atexit = False
        lane.leave(t, place)
        if not along:
            self._last = weakref.ref(place)
        return place


def _ended(
    coming: dict[Part, Way], stream: Stream, pool: HostPool, buffer: Tensor, device: torch.device
) -> None:
    ended(coming, stream)
    pool.give_back(buffer, device)
