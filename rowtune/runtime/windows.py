"""Windows of rows that span several chunks of a line buffer: joined for one step, saved by name."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rowtune.kernels.constants import rows_of_now
from rowtune.rows import Rows
from rowtune.runtime.lines import Lines
from rowtune.torch_private import storage_of


class _Placed(torch.autograd.Function):
    """Give a tensor a place in the autograd graph that does not hold on to its memory (a leaf would)."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, box: list[Tensor]) -> Tensor:
        return box.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Window(NamedTuple):
    name: str
    rows: Rows
    tensor: weakref.ref[Tensor]


class Windows:
    """The joined windows of one step. Their rows are in the line buffers until the step's tape has run, so
    what operators save of them is saved by name and joined again when it is needed."""

    def __init__(self, lines: Lines, token: Tensor) -> None:
        self.lines, self.token = lines, token
        self.found: dict[int, _Window] = {}

    def placed(self, tensor: Tensor) -> Tensor:
        """The tensor, with a place in autograd's graph."""
        box = [tensor]
        del tensor
        with torch.enable_grad():
            return _Placed.apply(self.token, box)  # type: ignore[no-untyped-call, no-any-return]

    def add(self, name: str, rows: Rows, tensor: Tensor) -> None:
        self.found[storage_of(tensor)] = _Window(name, rows, weakref.ref(tensor))

    def saved_by_name(self) -> contextlib.AbstractContextManager[Any]:
        return saved_tensors_hooks(self._pack, self._unpack) if self.found else contextlib.nullcontext()

    def _pack(self, t: Tensor) -> Any:
        """Once a window is gone its storage may be another tensor's, hence the weak reference."""
        found = self.found.get(storage_of(t)) if t.numel() else None
        if found is None or found.tensor() is None:
            return t
        rows = found.rows.shifted(-self.lines.moved.get(found.name, 0))
        return found.name, rows, t.size(), t.stride(), t.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, rows, size, stride, offset = packed
        rows = rows.shifted(self.lines.moved.get(name, 0))
        with rows_of_now():
            return self.lines.get(name, rows)[0].as_strided(size, stride, offset)
