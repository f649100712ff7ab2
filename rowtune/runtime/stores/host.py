"""Offload: kept in the host's memory, exactly.

On a card tensors leave and come back on a stream of their own, in pinned memory that is used again (to pin
it takes milliseconds). Events order the streams, and the host waits for nothing: what leaves is held until
the next one leaves, and while one tensor is fetched, the one that was put before it is on its way. (The paths
of a card were not run yet.)

On the CPU there is one memory. The copies are real, but made where no meter and no recorder looks: they are
host bytes, which the pool counts, and not the device's.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from rowtune.runtime.stores.store import Part, cut
from rowtune.torch_private import FakeTensor, without_modes


class HostPool:
    """Host memory of one module's steps. `bytes` are in use, `peak_bytes` were at most."""

    def __init__(self) -> None:
        self.bytes = self.peak_bytes = 0
        self._free: defaultdict[tuple[int, bool], list[Tensor]] = defaultdict(list)
        self._lanes: dict[torch.device, _Lane] = {}

    def take(self, size: int, device: torch.device) -> Tensor | None:
        """Memory of `size` bytes, pinned for a card; none for tensors without data."""
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        if device.type == "meta":
            return None
        free = self._free[size, device.type == "cuda"]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def give_back(self, size: int, buffer: Tensor | None, device: torch.device) -> None:
        self.bytes -= size
        if buffer is not None:
            self._free[size, device.type == "cuda"].append(buffer)

    def lane(self, device: torch.device) -> _Lane:
        """Copies to and from a device, in order: what a buffer is used for next waits for what it was."""
        if device not in self._lanes:
            self._lanes[device] = _CardLane(device) if device.type == "cuda" else _Lane()
        return self._lanes[device]


class _Held:
    """A tensor's place on the host, and what it was like. `before` is what was put before it."""

    def __init__(self, t: Tensor, device: torch.device, pool: HostPool, before: _Held | None) -> None:
        like = torch.empty_like(torch.empty_strided(t.shape, t.stride(), device="meta"))  # dense
        self.shape, self.stride, self.dtype, self.device = t.shape, like.stride(), t.dtype, t.device
        size = t.numel() * t.itemsize
        buffer = pool.take(size, device)
        self.host = None if buffer is None else buffer.view(t.dtype).as_strided(self.shape, self.stride)
        self.before = None if before is None else weakref.ref(before)
        weakref.finalize(self, pool.give_back, size, buffer, device).atexit = False

    def blank(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class Host:
    def __init__(self, pool: HostPool) -> None:
        self.pool = pool
        self._last: weakref.ref[_Held] | None = None

    def takes(self, t: Tensor) -> bool:
        return t.numel() > 0

    def put(self, t: Tensor) -> _Held:
        with without_modes():
            device = torch.device("meta") if isinstance(t, FakeTensor) else t.device
            held = _Held(t, device, self.pool, self._last() if self._last else None)
            if held.host is not None:
                self.pool.lane(t.device).leave(t, held.host)
        self._last = weakref.ref(held)
        return held

    def get(self, handle: _Held) -> Tensor:
        if handle.host is None:
            return handle.blank()
        return self.pool.lane(handle.device).fetch(handle)

    def rows(self, handle: _Held, part: Part, out: Tensor) -> None:
        if handle.host is not None:
            self.pool.lane(handle.device).fetch_rows(handle, part, out)

    def bytes(self, handle: _Held) -> int:
        return 0


class _Lane:
    """Copies that are done when they return."""

    def leave(self, t: Tensor, host: Tensor) -> None:
        host.copy_(t)

    def fetch(self, held: _Held) -> Tensor:
        found = held.blank()
        assert held.host is not None
        with without_modes():
            found.copy_(held.host)
        return found

    def fetch_rows(self, held: _Held, part: Part, out: Tensor) -> None:
        assert held.host is not None
        with without_modes():
            out.copy_(cut(held.host, part))


class _Way(NamedTuple):
    """A tensor whose copy is under way, and what marks its end."""

    tensor: Tensor
    done: torch.cuda.Event


class _CardLane(_Lane):
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.leaving: _Way | None = None
        self.coming: weakref.WeakKeyDictionary[_Held, _Way] = weakref.WeakKeyDictionary()

    def leave(self, t: Tensor, host: Tensor) -> None:
        """The tensor is held until the next one leaves: its memory is not used again before it is copied."""
        current = torch.cuda.current_stream(t.device)
        if self.leaving is not None:
            current.wait_event(self.leaving.done)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            host.copy_(t, non_blocking=True)
        self.leaving = _Way(t, self.stream.record_event())

    def fetch(self, held: _Held) -> Tensor:
        way = self._way(held)
        self._start_before(held)
        torch.cuda.current_stream(held.device).wait_event(way.done)
        return way.tensor

    def fetch_rows(self, held: _Held, part: Part, out: Tensor) -> None:
        """By way of all that was put at once: some rows of it are in many places on the host, and copies from
        there that are no single block would be made by the host, and waited for."""
        way = self._way(held)
        torch.cuda.current_stream(held.device).wait_event(way.done)
        out.copy_(cut(way.tensor, part))

    def _start_before(self, held: _Held) -> None:
        """Backward mostly wants next what was put before."""
        before = held.before() if held.before is not None else None
        if before is not None and before.device == held.device and before not in self.coming:
            self.coming[before] = self._start(before)

    def _way(self, held: _Held) -> _Way:
        if self.leaving is not None:  # forward is over, or waits for what it needs again
            torch.cuda.current_stream(held.device).wait_event(self.leaving.done)
            self.leaving = None
        return self.coming.pop(held, None) or self._start(held)

    def _start(self, held: _Held) -> _Way:
        """The memory comes from the stream at work, whose earlier readers of it have to be done."""
        found = held.blank()
        assert held.host is not None
        self.stream.wait_stream(torch.cuda.current_stream(held.device))
        with torch.cuda.stream(self.stream), without_modes():
            found.copy_(held.host, non_blocking=True)
        return _Way(found, self.stream.record_event())
