"""Record one training step of a program, on tensors without data: nothing is computed, no memory taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rowtune.graph.graph import Graph, Value
from rowtune.kernels.constants import standing_for
from rowtune.plan.lower import uncollected
from rowtune.plan.program import Program
from rowtune.runtime.blank import Answers
from rowtune.runtime.layout import arranged
from rowtune.runtime.lists.run import Lists
from rowtune.runtime.precision import autocast, blank_mode
from rowtune.runtime.recording import Recording, Role, check
from rowtune.runtime.segments import run_segment
from rowtune.runtime.step_run import Engine, StepRun
from rowtune.runtime.stores.host import HostPool
from rowtune.runtime.waiting import Skips
from rowtune.runtime.writer import Recorder
from rowtune.torch_private import storage_of

ROLES: dict[str, Role] = {
    "parameter": "parameter", "buffer": "buffer", "constant": "constant",
    "input": "batch", "target": "batch", "norms": "constant",
}  # fmt: skip

Sized = tuple[tuple[int, ...], torch.dtype]
Brought = tuple[tuple[Sized, int], ...]
"""Bytes of an optimizer's state for a parameter of each size and type."""


def record(program: Program, engine: Engine = "listed", brought: Brought = ()) -> Recording:
    """The calls of one step of a program whose graph ends in a loss: forward, then backward.

    The runtime itself runs, on PyTorch's meta tensors. What a first step alone does (tables that are made
    once) and the optimizer's step are outside. `engine` is what runs rows segments; `brought` is what the
    optimizer brings to the device to use a gradient in backward.
    """
    with uncollected():  # the collector would end buffers at any call; nothing here waits for it
        lists = Lists(after=0) if engine == "listed" else None
        step = _Step(program.graph, program, lists, dict(brought))
        with step.mode, standing_for(program.graph.device), step.recorder:
            step.run()
        step.gradients()
        made = step.recorder.recording()
        del step
    return check(made)


def written_lists(program: Program) -> Lists:
    """The lists that its rows segments run from, written down in one step on tensors without data."""
    lists = Lists(after=0)
    with uncollected():
        step = _Step(program.graph, program, lists, {})
        with step.mode, standing_for(program.graph.device), step.recorder:
            step.run()
    return lists


class _Step:
    """Tensors without data for all that a step is given, and the step."""

    def __init__(
        self, graph: Graph, program: Program, lists: Lists | None, brought: Mapping[Sized, int]
    ) -> None:
        self.graph, self.program, self.lists = graph, program, lists
        dtype = program.plan.dtype
        self.mode, device = blank_mode(dtype)
        self.cast = autocast(dtype, device.type)
        with self.mode:
            self.given = {v.name: _blank(v, device) for v in graph.values.values() if v.kind in ROLES}
        self.recorder = Recorder(Answers().call)

        def use(parameter: Tensor) -> None:
            use_gradient(parameter, brought)

        for name, tensor in self.given.items():
            self.recorder.know(tensor, name, ROLES[graph.values[name].kind])
            if tensor.requires_grad and program.plan.step_in_backward:
                tensor.register_post_accumulate_grad_hook(use)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        env: dict[str, Any] = dict(self.given)
        inputs = self.graph.inputs
        env |= zip(inputs, arranged((env[n] for n in inputs), self.program.plan.layout), strict=True)
        outside = frozenset(map(storage_of, self.given.values()))
        step = StepRun(self.program, lists=self.lists, outside=outside, skips=Skips(HostPool()))
        with self.cast:
            for i, (segment, dead) in enumerate(zip(self.program.segments, self.program.drops, strict=True)):
                self.recorder.place = (i, "forward")
                run_segment(step, segment, env)
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


def use_gradient(parameter: Tensor, brought: Mapping[Sized, int]) -> Tensor | None:
    """A gradient that is used in backward and let go of: an optimizer in place takes no memory for that but
    for the state that it brings, which is returned."""
    size = brought.get((tuple(parameter.shape), parameter.dtype), 0)
    made = torch.empty(size, dtype=torch.uint8, device=parameter.device) if size else None
    parameter.grad = None
    return made


def _blank(value: Value, device: torch.device) -> Tensor:
    made = torch.empty(value.shape, dtype=value.dtype, device=device)
    wanted = value.kind == "parameter" and value.requires_grad and made.is_floating_point()
    return made.requires_grad_(wanted)
