"""Record one training step of a program, on tensors without data: nothing is computed, no memory taken."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rowtune.graph.graph import Graph, Value
from rowtune.plan.lower import uncollected
from rowtune.plan.program import Program
from rowtune.runtime.blank import Answers
from rowtune.runtime.recording import At, Buffer, Call, Recording, Role, View, Way, check
from rowtune.runtime.segments import run_segment
from rowtune.runtime.storage import storage_of

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


class _Known(NamedTuple):
    """A storage that is alive: its buffer, and the views of it that were seen."""

    buffer: int
    views: dict[tuple[Any, ...], int]


class Recorder(TorchDispatchMode):
    """Writes down every aten call while it is entered, below autograd. Recorders that share their answers
    ask PyTorch once."""

    def __init__(self, answers: Answers | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place: tuple[int, Way] = (0, "forward")
        self._calls: list[Call] = []
        self._views: list[View] = []
        self._buffers: list[Buffer] = []
        self._known: dict[int, _Known] = {}  # by storage
        self._ends: list[Any] = []
        self.live = 0  # bytes
        self._named: set[int] = set()
        self._answers = Answers() if answers is None else answers

    def know(self, tensor: Tensor, name: str, role: Role) -> int:
        """The number of a tensor as a view; of a new buffer where its memory was not seen before."""
        storage = tensor.untyped_storage()
        key = storage_of(tensor)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(len(self._buffers), {})
            self._buffers.append(Buffer(name, storage.nbytes(), role, len(self._calls) - 1, None))
            self._ends.append(weakref.ref(storage, partial(self._gone, key, known.buffer)))
            self.live += storage.nbytes()
        seen = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        view = known.views.get(seen)
        if view is None:
            view = known.views[seen] = len(self._views)
            offset, shape, stride, dtype = seen
            self._views.append(View(known.buffer, int(offset), tuple(shape), stride, dtype))
        return view

    def buffer_of(self, tensor: Tensor, name: str, role: Role) -> int:
        """The number of a tensor's memory; a new one where that was not seen before."""
        known = self._known.get(storage_of(tensor))
        return self._views[self.know(tensor, name, role)].buffer if known is None else known.buffer

    def tag(self, tensor: Tensor, name: str, role: Role) -> int:
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
    def calls(self) -> int:
        """So far."""
        return len(self._calls)

    @property
    def buffers(self) -> int:
        """So far, in the order of their birth."""
        return len(self._buffers)

    def alive(self, start: int) -> list[int]:
        """Of the buffers from number `start` on, those that are still there."""
        return [n for n in range(start, len(self._buffers)) if self._buffers[n].died is None]

    def recording(self) -> Recording:
        """What was recorded; what is alive now is never freed."""
        return Recording(tuple(self._calls), tuple(self._views), tuple(self._buffers))

    def _gone(self, key: int, number: int, _: object) -> None:
        del self._known[key]
        gone = self._buffers[number]
        self.live -= gone.bytes
        self._buffers[number] = replace(gone, died=len(self._calls) - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads: list[int] = []
        given = tuple(self._given(a, reads) for a in args)
        named = {k: self._given(a, reads) for k, a in kwargs.items()} if kwargs else {}
        out = self._answers.call(func, args, kwargs or {})
        number = len(self._calls)
        self._calls.append(Call(func, given, named, tuple(reads), (), *self.place))
        makes = self._made(out, func._schema.name.partition("::")[2])
        if makes:
            self._calls[number] = self._calls[number]._replace(makes=makes)
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
