"""Record one training step of a program, on tensors without data: nothing is computed, no memory taken."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rowtune.graph.graph import Graph, Value
from rowtune.plan.lower import uncollected
from rowtune.plan.program import Program
from rowtune.runtime.blank import Answers
from rowtune.runtime.recording import At, Buffer, Call, Recording, Role, View, Way, check
from rowtune.runtime.segments import run_segment

ROLES: dict[str, Role] = {
    "parameter": "parameter", "buffer": "buffer", "constant": "constant",
    "input": "batch", "target": "batch", "norms": "constant",
}  # fmt: skip


def record(program: Program) -> Recording:
    """The calls of one step of a program whose graph ends in a loss: forward, then backward.

    The runtime itself runs, on PyTorch's meta tensors. What a first step alone does (tables that are made
    once) and the optimizer's step are outside.
    """
    graph = program.graph
    with uncollected():  # the collector would end buffers at any call; nothing here waits for it
        step = _Step(graph, program)
        with step.recorder:
            step.run()
        step.gradients()
        made = step.recorder.recording()
        del step
    return check(made)


class _Step:
    """Tensors without data for all that a step is given, and the step."""

    def __init__(self, graph: Graph, program: Program) -> None:
        self.graph, self.program = graph, program
        self.given = {v.name: _blank(v) for v in graph.values.values() if v.kind in ROLES}
        self.recorder = Recorder()
        for name, tensor in self.given.items():
            self.recorder.know(tensor, name, ROLES[graph.values[name].kind])

    def run(self) -> None:
        env: dict[str, Any] = dict(self.given)
        for i, (segment, dead) in enumerate(zip(self.program.segments, self.program.drops, strict=True)):
            self.recorder.place = (i, "forward")
            run_segment(self.program, segment, env, 0, 1.0)
            for name in dead:
                env.pop(name, None)
        loss = env.pop(self.graph.outputs[0])
        env.clear()
        self.recorder.place = (len(self.program.segments) - 1, "backward")
        loss.backward()

    def gradients(self) -> None:
        """Tell the recorder which buffers turned out to be gradients of parameters."""
        for name, tensor in self.given.items():
            if tensor.grad is not None:
                self.recorder.tag(tensor.grad, f"the gradient of {name}", "gradient")


def _blank(value: Value) -> Tensor:
    made = torch.empty(value.shape, dtype=value.dtype, device="meta")
    wanted = value.kind == "parameter" and value.requires_grad and made.is_floating_point()
    return made.requires_grad_(wanted)


class Lives(TorchDispatchMode):
    """Counts calls below autograd while it is entered, and notes when memory is made and when it is gone.
    Several that share their answers ask PyTorch once."""

    def __init__(self, answers: Answers | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place: tuple[int, Way] = (0, "forward")
        self.calls = self.live = 0  # so far; bytes
        self._buffers: list[Buffer] = []
        self._known: dict[int, _Life] = {}  # by storage
        self._died: dict[int, int] = {}
        self._named: set[int] = set()
        self._answers = Answers() if answers is None else answers

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles this, and to keep a compiler off every call takes longer than the call."""
        return False

    def buffer_of(self, tensor: Tensor, name: str, role: Role) -> int:
        """The number of a tensor's memory; a new one where that was not seen before."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None:
            return known.number
        number = len(self._buffers)
        life = self._known[storage._cdata] = _Life(storage, self._gone)
        life.key, life.number = storage._cdata, number
        size = storage.nbytes()
        self._buffers.append(Buffer(name, size, role, self.calls - 1, None))
        self.live += size
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
        died = self._died
        return tuple(replace(b, died=died[n]) if n in died else b for n, b in enumerate(self._buffers))

    def recording(self) -> Recording:
        """What was recorded."""
        return Recording((), (), self.finished())

    def _gone(self, life: _Life) -> None:
        del self._known[life.key]
        self.live -= self._buffers[life.number].bytes
        self._died[life.number] = self.calls - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._answers.call(func, args, kwargs or {})
        self.calls += 1
        if isinstance(out, Tensor):
            self.buffer_of(out, func._opname, "activation")
        elif isinstance(out, (list, tuple)):
            for t in out:
                if isinstance(t, Tensor):
                    self.buffer_of(t, func._opname, "activation")
        return out


class _Life(weakref.ref[torch.UntypedStorage]):
    """Calls back when a storage is gone, and knows which it was."""

    __slots__ = ("key", "number")
    key: int
    number: int


class Recorder(Lives):  # type: ignore[no-untyped-call]
    """Writes down every aten call as well, with the views of buffers that it reads and makes."""

    def __init__(self, answers: Answers | None = None) -> None:
        super().__init__(answers)
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
            _, offset, shape, stride, dtype = seen
            self._views.append(View(buffer, int(offset), tuple(shape), stride, dtype))
        return view

    def recording(self) -> Recording:
        return Recording(tuple(self._calls), tuple(self._views), self.finished())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads: list[int] = []
        given = tuple(self._given(a, reads) for a in args)
        named = {k: self._given(a, reads) for k, a in kwargs.items()} if kwargs else {}
        out = self._answers.call(func, args, kwargs or {})
        self._calls.append(Call(func, given, named, tuple(reads), (), *self.place))
        self.calls += 1
        makes = self._made(out, func._schema.name.partition("::")[2])
        if makes:
            self._calls[-1] = self._calls[-1]._replace(makes=makes)
        return out

    def _given(self, argument: Any, reads: list[int]) -> Any:
        if isinstance(argument, Tensor):
            view = self.know(argument, "a constant", "constant")
            reads.append(view)
            return At(view)
        if isinstance(argument, (list, tuple)):
            return type(argument)([self._given(a, reads) for a in argument])
        return argument

    def _made(self, out: Any, name: str) -> tuple[int, ...]:
        if isinstance(out, Tensor):
            return (self.know(out, name, "activation"),)
        if isinstance(out, (list, tuple)):
            return tuple(self.know(t, name, "activation") for t in out if isinstance(t, Tensor))
        return ()
