"""Record one training step of a program, on tensors without data: nothing is computed, no memory taken."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rowtune.graph.graph import Graph, Value
from rowtune.plan.lower import uncollected
from rowtune.plan.program import Program
from rowtune.runtime.recording import Buffer, Call, Recording, Role, Way, check
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
    gc.collect()
    with uncollected():  # the collector would end buffers at any call; nothing here waits for it
        _Step(graph, program).run()  # constants are made once: by a step that nobody records
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


class Recorder(TorchDispatchMode):
    """Writes down every aten call while it is entered, below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place: tuple[int, Way] = (0, "forward")
        self._calls: list[Call] = []
        self._buffers: list[Buffer] = []
        self._number: dict[int, int] = {}  # storage -> buffer
        self._ends: list[Any] = []

    def know(self, tensor: Tensor, name: str, role: Role) -> int:
        """The buffer of a tensor; a new one where its memory was not seen before."""
        storage = tensor.untyped_storage()
        key = storage_of(tensor)
        if key in self._number:
            return self._number[key]
        number = self._number[key] = len(self._buffers)
        self._buffers.append(Buffer(name, storage.nbytes(), role, len(self._calls) - 1, None))

        def gone(_: object) -> None:
            del self._number[key]
            self._buffers[number] = replace(self._buffers[number], died=len(self._calls) - 1)

        self._ends.append(weakref.ref(storage, gone))
        return number

    def tag(self, tensor: Tensor, name: str, role: Role) -> None:
        number = self.know(tensor, name, role)
        self._buffers[number] = replace(self._buffers[number], name=name, role=role)

    def recording(self) -> Recording:
        """What was recorded; what is alive now is never freed."""
        return Recording(tuple(self._calls), tuple(self._buffers))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reads = tuple(dict.fromkeys(self.know(t, "a constant", "constant") for t in given))
        shapes = tuple(tuple(t.shape) for t in given)
        out = func(*args, **(kwargs or {}))
        before = len(self._buffers)
        segment, way = self.place
        self._calls.append(Call(func._schema.name, reads, (), shapes, segment, way))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.know(leaf, func._schema.name.partition("::")[2], "activation")
        if len(self._buffers) > before:
            made = tuple(range(before, len(self._buffers)))
            self._calls[-1] = replace(self._calls[-1], makes=made)
        return out
