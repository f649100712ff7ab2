"""Writes down what comes by below autograd: aten calls, what they look at, the memory that they make."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rowtune.kernels.constants import STANDS_FOR
from rowtune.runtime.blank import Answers, Like, Signature
from rowtune.runtime.recording import (
    At,
    Buffer,
    Call,
    Recording,
    Role,
    Turn,
    Use,
    View,
    Way,
    written_arguments,
)
from rowtune.runtime.temporary import temporary_bytes
from rowtune.torch_private import TorchDispatchMode, key_of

COPY = torch.ops.aten.copy_.default

Answer = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class Lives(TorchDispatchMode):
    """Counts calls below autograd while it is entered, and notes when memory is made and when it is gone.

    Args:
        answer: runs an operator.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answer = answer
        self.place: tuple[int, Way] = (0, "forward")
        self.calls = self.live = 0  # so far; bytes
        self.times = 1  # as many calls does one stand for now
        self._buffers: list[Buffer] = []
        self._known: dict[int, _Life] = {}  # by storage
        self._died: dict[int, int] = {}
        self._named: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles this, and to keep a compiler off every call takes longer than the call."""
        return False

    def buffer_of(self, tensor: Tensor, name: str, role: Role) -> int:
        """The number of a tensor's memory; a new one where that was not seen before."""
        storage = tensor.untyped_storage()
        key = key_of(storage)
        known = self._known.get(key)
        if known is not None:
            return known.number
        number, size = len(self._buffers), storage.nbytes()
        self._buffers.append(Buffer(name, size, role, self.calls - 1, None))
        self.live += size
        life = _Life(storage, self._gone)  # which may be called as soon as it is known, by an interrupt
        life.key, life.number = key, number
        self._known[key] = life
        return number

    def tag(self, tensor: Tensor, name: str, role: Role) -> int:
        """This is a tensor's name and role, and has been since it was made."""
        number = self.buffer_of(tensor, name, role)
        self._buffers[number] = replace(self._buffers[number], name=name, role=role)
        return number

    def named(self, tensor: Tensor, name: str) -> int:
        """The number of a tensor's memory, which has this name if it had none but an operator's."""
        number = self.buffer_of(tensor, name, "activation")
        found = self._buffers[number]
        if found.role == "activation" and found.born >= 0 and number not in self._named:
            self._buffers[number] = replace(found, name=name)
            self._named.add(number)
        return number

    @property
    def buffers(self) -> int:
        """So far, in the order of their birth."""
        return len(self._buffers)

    def alive(self, start: int) -> list[int]:
        """Of the buffers from number `start` on, those that are still there."""
        return [n for n in range(start, len(self._buffers)) if n not in self._died]

    def finished(self) -> tuple[Buffer, ...]:
        """All buffers; what is alive now is never freed."""
        died = self._died.get
        return tuple([Buffer(b.name, b.bytes, b.role, b.born, died(n)) for n, b in enumerate(self._buffers)])

    def recording(self) -> Recording:
        """What was recorded."""
        return Recording((), (), self.finished())

    def _note_temporary(self, func: Any, args: tuple[Any, ...]) -> None:
        """What the call's kernel takes for itself."""
        size = temporary_bytes(func, args, STANDS_FOR.get())
        if size:
            now = self.calls - 1
            self._died[len(self._buffers)] = now
            self._buffers.append(Buffer(f"{func._opname}'s copies", size, "temporary", now, None))

    def _gone(self, life: _Life) -> None:
        self._known.pop(life.key, None)
        self.live -= self._buffers[life.number].bytes
        self._died[life.number] = self.calls - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._answered(func, args, kwargs)[0]

    def _answered(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, tuple[int, ...]]:
        """What a call returns, and the buffers that it lies in."""
        out = self._answer(func, args, kwargs or {})
        self.calls += 1
        self._note_temporary(func, args)
        if isinstance(out, Tensor):
            return out, (self.buffer_of(out, func._opname, "activation"),)
        several = out if isinstance(out, (list, tuple)) else ()
        made = [self.buffer_of(t, func._opname, "activation") for t in several if isinstance(t, Tensor)]
        return out, tuple(made)


class _Life(weakref.ref[torch.UntypedStorage]):
    """Calls back when a storage is gone, and knows which it was."""

    __slots__ = ("key", "number")
    key: int
    number: int


class Counted(Lives):  # type: ignore[no-untyped-call]
    """Notes as well what every call does and which buffers it looks at, and counts all calls: `host`, views
    included, with the bands that are left out."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(answers.call)
        self.answers = answers
        self.uses: list[Use] = []
        self.host = 0

    def _numbers(self, given: Iterable[Any]) -> list[int]:
        """The buffers of what a call is given."""
        known, found = self._known, []
        for a in given:
            if isinstance(a, Tensor):
                life = known.get(key_of(a.untyped_storage()))
                if life is not None:
                    found.append(life.number)
            elif isinstance(a, (list, tuple)):
                found += self._numbers(a)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, made = self._answered(func, args, kwargs)
        self.host += self.times
        asked = self.answers.asked
        if not func.is_view or asked is not None:
            reads = tuple(self._numbers((*args, *kwargs.values()) if kwargs else args))
            writes = bool(written_arguments(func))
            self.uses.append(Use(self.calls - 1, reads, made, writes, asked, self.times))
        return out

    def copied(self, into: Tensor, of: Tensor) -> None:
        """To the host's memory or from there: work, of which no call comes by."""
        likes = tuple(Like(tuple(t.shape), t.stride(), t.dtype) for t in (into, of))
        self.host += self.times
        self.uses.append(Use(self.calls - 1, (), (), True, Signature(COPY, likes, ()), self.times))


class Recorder(Lives):  # type: ignore[no-untyped-call]
    """Writes down every aten call as well, with the views of buffers that it reads and makes."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._calls: list[Call] = []
        self._views: list[View] = []
        self._seen: dict[tuple[Any, ...], int] = {}

    def know(self, tensor: Tensor, name: str, role: Role) -> int:
        """The number of a tensor as a view; of a new buffer where its memory was not seen before."""
        buffer = self.buffer_of(tensor, name, role)
        seen = (buffer, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        view = self._seen.get(seen)
        if view is None:
            view = self._seen[seen] = len(self._views)
            self._views.append(View(*seen))  # type: ignore[arg-type]
        return view

    def recording(self) -> Recording:
        return Recording(tuple(self._calls), tuple(self._views), self.finished())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("prim::"):  # questions to a tensor
            return func(*args, **(kwargs or {}))
        self._allow(name)
        reads: list[int] = []
        given = tuple([self._given(a, reads) for a in args])
        named = {k: self._given(a, reads) for k, a in kwargs.items()} if kwargs else {}
        out = self._answer(func, args, kwargs or {})
        self.calls += 1
        self._note_temporary(func, args)
        self._calls.append(Call(func, given, named, tuple(reads), self._made(out, name), *self._placed()))
        return out

    def _placed(self) -> tuple[int, Way, Turn | None]:
        """Where in the step, or in a list, a call is."""
        return (*self.place, None)

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
        name = operator.partition("::")[2]
        if isinstance(out, Tensor):
            return (self.know(out, name, "activation"),)
        if isinstance(out, (list, tuple)):
            return tuple([self.know(t, name, "activation") if isinstance(t, Tensor) else -1 for t in out])
        return ()
