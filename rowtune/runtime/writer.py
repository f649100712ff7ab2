"""Writes down what comes by below autograd: aten calls, what they look at, the memory that they make."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from rowtune.runtime.recording import At, Buffer, Call, Recording, Role, View, Way
from rowtune.torch_private import TorchDispatchMode, key_of

Answer = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class _Known(NamedTuple):
    """A storage that is alive: its buffer, and the views of it that were seen."""

    buffer: int
    views: dict[tuple[Any, ...], int]


class Recorder(TorchDispatchMode):
    """Writes down every aten call while it is entered, below autograd.

    Args:
        answer: runs an operator.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answer = answer
        self.place: tuple[int, Way] = (0, "forward")
        self._calls: list[Call] = []
        self._views: list[View] = []
        self._buffers: list[Buffer] = []
        self._known: dict[int, _Known] = {}  # by storage
        self._ends: list[Any] = []

    def know(self, tensor: Tensor, name: str, role: Role, born: int | None = None) -> int:
        """The number of a tensor as a view; of a new buffer where its memory was not seen before, `born` at
        the end of the last call if nothing else is said."""
        storage = tensor.untyped_storage()
        key = key_of(storage)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(len(self._buffers), {})
            born = len(self._calls) - 1 if born is None else born
            self._buffers.append(Buffer(name, storage.nbytes(), role, born, None))
            self._ends.append(weakref.ref(storage, partial(self._gone, key, known.buffer)))
        seen = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        view = known.views.get(seen)
        if view is None:
            view = known.views[seen] = len(self._views)
            self._views.append(View(known.buffer, *seen))  # type: ignore[arg-type]
        return view

    def tag(self, tensor: Tensor, name: str, role: Role) -> None:
        number = self._views[self.know(tensor, name, role)].buffer
        self._buffers[number] = replace(self._buffers[number], name=name, role=role)

    def recording(self) -> Recording:
        """What was recorded; what is alive now is never freed."""
        return Recording(tuple(self._calls), tuple(self._views), tuple(self._buffers))

    def _gone(self, key: int, number: int, _: object) -> None:
        del self._known[key]
        self._buffers[number] = replace(self._buffers[number], died=len(self._calls) - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("prim::"):  # questions to a tensor
            return func(*args, **(kwargs or {}))
        self._allow(name)
        reads: list[int] = []
        given = tuple([self._given(a, reads) for a in args])
        named = {k: self._given(a, reads) for k, a in kwargs.items()} if kwargs else {}
        out = self._answer(func, args, kwargs or {})
        makes = self._made(out, name)
        self._calls.append(Call(func, given, named, tuple(reads), makes, *self.place))
        return out

    def _allow(self, operator: str) -> None:
        """Raises where an operator cannot be recorded."""

    def _given(self, argument: Any, reads: list[int]) -> Any:
        if isinstance(argument, Tensor):
            view = self.know(argument, "a constant", "constant")
            reads.append(view)
            return At(view)
        if isinstance(argument, (list, tuple)):
            return type(argument)([self._given(a, reads) for a in argument])
        return argument

    def _made(self, out: Any, operator: str) -> tuple[int, ...]:
        name, now = operator.partition("::")[2], len(self._calls)
        if isinstance(out, Tensor):
            return (self.know(out, name, "activation", now),)
        if isinstance(out, (list, tuple)):
            return tuple(
                [self.know(t, name, "activation", now) if isinstance(t, Tensor) else -1 for t in out]
            )
        return ()
