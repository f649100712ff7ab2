"""What a segment keeps from forward to backward, put into a store and got back.

Autograd asks when it saves a tensor and when it wants it again; a rows segment does likewise for its inputs
and stashes. A tensor that is saved twice is stored once, and is there from its first reader in backward to
the last, as if it had never left. What lives anyway (parameters, the batch) and what is small stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rowtune.runtime.stores.shelf import Cut, Shelf
from rowtune.runtime.stores.store import Store
from rowtune.torch_private import storage_of

LEAST_BYTES = 1 << 14
"""Smaller tensors stay: there are many, and they take nothing."""


class Keeping:
    """For one call of a segment.

    Args:
        outside: memory that lives anyway, by `storage_of`.
    """

    def __init__(self, store: Store, outside: Collection[int]) -> None:
        self.store, self.outside = store, outside
        self.known: dict[Any, _Known] = {}

    def pack(self, t: Tensor) -> Tensor | Kept:
        if not self._stored(t):
            return t
        key = storage_of(t), t._version, t.storage_offset(), t.shape, t.stride(), t.dtype
        known = self.known.get(key)
        if known is None or known.storage() is None:
            with torch.no_grad():
                kept = Kept(self.store, self.store.put(t.detach()))
            self.known[key] = known = _Known(weakref.ref(t.untyped_storage()), kept)
        known.kept.readers += 1
        return known.kept

    def over(self, outside: Collection[int]) -> Keeping:
        """For a run on other tensors, of which this is the memory that lives anyway."""
        return Keeping(self.store, outside)

    def shelved(self, t: Tensor, where: Cut) -> Shelf | None:
        """The tensor in the store, to be got back a part at a time; None: it stays."""
        return Shelf(self.store, t.detach(), *where) if self._stored(t) else None

    def unpack(self, kept: Tensor | Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.get()

    def forget(self) -> None:
        """Forward is over: nothing more is put, and what nobody wants back is let go of."""
        self.known.clear()

    def _stored(self, t: Tensor) -> bool:
        size = t.numel() * t.itemsize
        if t.layout != torch.strided or size < LEAST_BYTES or 0 in t.stride():
            return False
        return storage_of(t) not in self.outside and self.store.takes(t)


class Hooks(Protocol):
    """What autograd asks when it saves a tensor and when it wants it again; and that forward is over."""

    def pack(self, t: Tensor) -> Any: ...

    def unpack(self, kept: Any) -> Tensor: ...

    def forget(self) -> None: ...


@contextmanager
def saving(keeping: Hooks | None) -> Iterator[None]:
    """Inside, what autograd saves is kept in a store."""
    if keeping is None:
        yield
        return
    with saved_tensors_hooks(keeping.pack, keeping.unpack):
        yield
    keeping.forget()


class Kept:
    """A tensor in a store, and how many will want it."""

    def __init__(self, store: Store, handle: Any) -> None:
        self.store, self.handle, self.readers = store, handle, 0
        self.here: Tensor | None = None

    def get(self) -> Tensor:
        found = self.here
        if found is None:
            with torch.no_grad():
                found = self.store.get(self.handle)
        self.readers -= 1
        self.here = found if self.readers > 0 else None
        return found


class _Known(NamedTuple):
    """While the memory that was stored lives, it may be saved again."""

    storage: weakref.ref[Any]
    kept: Kept
