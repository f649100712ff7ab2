"""A card that is not there: tensors made while a cap holds are counted, and one too many is out of memory.

Only the cap and what is free are simulated; everything runs on the CPU. What lives when the cap is set is the
model, whose bytes count from then on.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PLACES = ("tune.measure", "train.loop")


class Card(TorchDispatchMode):
    """Enter it to be on the card; `caps` are the caps that were set, `refused` the allocations past one."""

    def __init__(self, total: int, resident: int) -> None:
        super().__init__()
        self.total, self.resident = total, resident
        self.limit: int | None = None
        self.caps: list[int | None] = []
        self.refused = 0
        self._live: dict[int, tuple[int, Any]] = {}

    def cap(self, device: str, limit: int | None) -> None:
        gc.collect()
        if limit is not None and self.limit is None:
            self._live = {}
            for thing in gc.get_objects():  # the model, and what is the host's
                if type(thing) in (Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
                    self._see(thing, counted=False)
        self.limit = limit
        self.caps.append(limit)

    def free(self, device: str) -> int:
        return self.total

    @property
    def used(self) -> int:
        return self.resident + sum(size for size, _ in self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.limit is not None:
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor) and not isinstance(leaf, torch._subclasses.FakeTensor):
                    self._see(leaf)
            if self.used > self.limit:
                self.refused += 1
                raise torch.OutOfMemoryError("simulated card out of memory")
        return out

    def _see(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live and tensor.device.type == "cpu":
            gone = weakref.ref(storage, lambda _: self._live.pop(key, None))
            self._live[key] = (storage.nbytes() if counted else 0, gone)


def insert(monkeypatch: pytest.MonkeyPatch, card: Card) -> Card:
    """Put the card into this process: rowtune's own functions ask it."""
    for place in PLACES:
        monkeypatch.setattr(f"rowtune.{place}.cap_memory", card.cap)
    monkeypatch.setattr("rowtune.tune.reference.free_bytes", card.free)
    return card
