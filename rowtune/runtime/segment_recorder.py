"""Record one segment by itself: its forward, then its backward, on tensors without data.

The schedule itself runs, not the lists that it leaves (rowtune/runtime/lists): writing those takes longer
than a prediction may. They let go of tensors earlier: a step mostly takes less than is predicted.

Its neighbours are two kinds of nodes in autograd's graph. A *head* is where a value comes from that wants a
gradient: it catches that gradient. A *tail* is where a value goes: it hands over the gradient, which the
engine alone holds then, as in a real step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowtune.graph.graph import Graph
from rowtune.kernels.constants import standing_for
from rowtune.plan.choices import Precision
from rowtune.plan.lower import uncollected
from rowtune.plan.plan import Plan
from rowtune.plan.program import Checkpoint, Program, SegmentProgram
from rowtune.runtime.blank import Answers
from rowtune.runtime.layout import differs
from rowtune.runtime.left_out import LeftOut
from rowtune.runtime.precision import autocast, blank_mode
from rowtune.runtime.recorder import ROLES, Brought, use_gradient
from rowtune.runtime.segment_recording import Crossing, SegmentRecording, work_of
from rowtune.runtime.segments import run_segment
from rowtune.runtime.step_run import StepRun
from rowtune.runtime.stores.host import HostPool
from rowtune.runtime.stores.lanes import nobody
from rowtune.runtime.waiting import Skips
from rowtune.runtime.writer import Counted, Lives, Recorder
from rowtune.torch_private import storage_of

NOTHING: Mapping[str, bool] = {}


class How(NamedTuple):
    """What of a plan holds for the whole step, and how its segments are recorded. `brought` is what the
    optimizer brings to the device to use a gradient in backward."""

    dtype: Precision = "as given"
    step_in_backward: bool = False
    brought: Brought = ()


AS_GIVEN = How()


class SegmentRun:
    """A segment whose forward has run, and whose backward will, once.

    Args:
        segment: of a program of `graph`.
        inputs: what it reads, but for the model's own tensors.
        shared: parameters that other segments read as well; of those that an earlier one reads (True), the
            gradient is handed on.
        recorder: a `Lives` notes no calls, and takes half the time.
        how: the step that it is part of.
    """

    def __init__(
        self,
        graph: Graph,
        segment: SegmentProgram,
        inputs: Collection[Crossing],
        shared: Mapping[str, bool] = NOTHING,
        recorder: Lives | None = None,
        how: How = AS_GIVEN,
    ) -> None:
        self.graph, self.how = graph, how
        self.mode, self.blank = blank_mode(how.dtype)
        self.recorder = Recorder(Answers().call) if recorder is None else recorder
        self.caught: dict[str, Tensor] = {}
        self.tails: dict[str, _Tail] = {}
        self.weights: dict[str, Tensor] = {}
        told = self.recorder.copied if isinstance(self.recorder, Counted) else nobody
        host = HostPool(told)
        self.left_out = LeftOut(self.recorder, host)
        self.model = _model(segment)
        with self.mode, standing_for(graph.device), uncollected():
            env = self._environment(inputs, shared)
            self.given = {n: self._know(n, t) for n, t in env.items()}
            one = Program(graph, Plan(()), (self.left_out.marked(segment),), ((),))
            outside = frozenset(storage_of(t) for n, t in env.items() if self._outside(n, t))
            skips = Skips(HostPool(told))
            step = StepRun(one, outside=outside, host=host, skips=skips)
            with self.recorder, autocast(how.dtype, self.blank.type):
                run_segment(step, one.segments[0], env)
            waits = sum(_bytes(env[n]) for n in segment.leaves if env[n].requires_grad)
            self.host_bytes = self.left_out.host_bytes + waits
            self.returning = [n for n, _ in segment.returns if env[n].requires_grad]
            for name, many in segment.returns:  # what others put there
                for _ in range(many):
                    skips.put(name, torch.empty_like(env[name]))
            del step, skips
            self.forward = self.recorder.calls
            self.outputs = tuple(self._crossing(n, n, env[n]) for n in segment.part.outputs)
            for name, tensor in env.items():
                if tensor.requires_grad and (name in shared or name not in self.weights):
                    self.tails[name] = _Tail(tensor)
            env.clear()
            tensor = None

    def _environment(self, inputs: Collection[Crossing], shared: Mapping[str, bool]) -> dict[str, Any]:
        env: dict[str, Any] = {}
        memory: dict[int, Tensor] = {}
        for crossing in inputs:
            box = [self._like(crossing, memory)]
            env[crossing.name] = self._head(crossing.name, box) if crossing.wanted else box.pop()
        for name in self.model:
            value = self.graph.values[name]
            made = torch.empty(value.shape, dtype=value.dtype, device=self.blank)
            wanted = value.kind == "parameter" and value.requires_grad and made.is_floating_point()
            if wanted and shared.get(name):
                env[name] = self._head(name, [made])
            else:
                env[name] = self.weights[name] = made.requires_grad_(wanted)
        return env

    def _outside(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor lives anyway: the model's, or the batch's unless it was laid out anew."""
        return self.graph.values[name].kind in ROLES and not differs(tensor)

    def _head(self, name: str, box: list[Tensor]) -> Tensor:
        token = torch.zeros((), requires_grad=True)
        return _Head.apply(token, box, self.caught, name)  # type: ignore[no-untyped-call, no-any-return]

    def _know(self, name: str, tensor: Tensor) -> int:
        return self.recorder.buffer_of(tensor, name, ROLES.get(self.graph.values[name].kind, "activation"))

    def _crossing(self, name: str, title: str, tensor: Tensor) -> Crossing:
        number = self.recorder.named(tensor, title)
        return Crossing(
            name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype,
            tensor.untyped_storage().nbytes(), number, tensor.requires_grad,
        )  # fmt: skip

    def backward(self, outer: Collection[Crossing]) -> SegmentRecording:
        """The recording, with these gradients of its outputs and of inputs that later segments read too."""
        assert self.recorder.calls == self.forward, "a backward is recorded once"
        self.recorder.place = (0, "backward")
        used: set[int] = set()
        brought = dict(self.how.brought)

        def use(weight: Tensor) -> None:
            assert weight.grad is not None
            used.add(self.recorder.buffer_of(weight.grad, "", "gradient"))
            made = use_gradient(weight, brought)
            used.update(() if made is None else [self.recorder.named(made, "the state of the optimizer")])

        for weight in self.weights.values() if self.how.step_in_backward else ():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(use)  # type: ignore[no-untyped-call]
        with self.mode, standing_for(self.graph.device), uncollected():
            handed = self._hand_over(outer)
            roots = [self.tails[n].root for n in dict.fromkeys([*(c.name for c in outer), *self.returning])]
            ones = [torch.ones(()) for _ in roots]
            with self.recorder:
                self.tails.clear()
                if roots:
                    torch.autograd.backward(roots, ones)
                roots.clear()
        caught = tuple(self._crossing(n, _gradient(n), g) for n, g in self.caught.items())
        added = {
            n: self.recorder.tag(t.grad, _gradient(n), "gradient")
            for n, t in self.weights.items()
            if t.grad is not None
        }
        recording = self.recorder.recording()
        counted = self.recorder if isinstance(self.recorder, Counted) else None
        self.caught.clear()
        return SegmentRecording(
            recording, self.forward, self.recorder.calls,
            inputs={n: b for n, b in self.given.items() if n not in self.model},
            weights={n: self.given[n] for n in self.model},
            outputs=self.outputs, outer=handed, gradients=caught, weight_gradients=added,
            left_out=self.left_out.buffers(recording.buffers), host_bytes=self.host_bytes,
            uses=tuple(counted.uses) if counted else (), work=work_of(counted.uses) if counted else (),
            host=counted.host if counted else 0, used=frozenset(used),
        )  # fmt: skip

    def _hand_over(self, outer: Collection[Crossing]) -> dict[str, int]:
        memory: dict[int, Tensor] = {}
        handed = {}
        for crossing in outer:
            tensor = self._like(crossing, memory)
            handed[crossing.name] = self.recorder.buffer_of(tensor, _gradient(crossing.name), "activation")
            self.tails[crossing.name].box.append(tensor)
        return handed

    def _like(self, crossing: Crossing, memory: dict[int, Tensor]) -> Tensor:
        """A tensor without data that lies in memory as the crossing does."""
        if crossing.memory not in memory:
            memory[crossing.memory] = torch.empty(crossing.bytes, dtype=torch.uint8, device=self.blank)
        typed = memory[crossing.memory].view(crossing.dtype)
        return typed.as_strided(crossing.shape, crossing.stride, crossing.offset).detach()


def _bytes(t: Tensor) -> int:
    return t.numel() * t.itemsize


def _gradient(name: str) -> str:
    return f"the gradient of {name}"


def _model(segment: SegmentProgram) -> list[str]:
    """Parameters, buffers and constants that a segment reads, also by operators that were put back."""
    own = {node.name for node in segment.part.nodes}
    read = dict.fromkeys(n for node in segment.part.nodes for n in node.inputs if n not in own)
    inside = segment.how.parts if isinstance(segment.how, Checkpoint) else ()
    read |= dict.fromkeys(n for part in inside for n in _model(part))
    made = own | {*segment.part.inputs} | {o for part in inside for o in part.part.outputs}
    return [n for n in dict.fromkeys([*segment.part.weights, *read]) if n not in made]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, box: list[Tensor], caught: dict[str, Tensor], name: str) -> Tensor:
        ctx.caught, ctx.name = caught, name
        ctx.set_materialize_grads(False)
        return box.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.caught[ctx.name] = grad
        return None, None, None, None


class _Tail:
    """Where a value goes: backward from `root` hands over what is in the `box`."""

    def __init__(self, value: Tensor) -> None:
        self.box: list[Tensor] = []
        self.root: Tensor = _HandOver.apply(self.box, value)  # type: ignore[no-untyped-call]


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, box: list[Tensor], value: Tensor) -> Tensor:
        ctx.box = box
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor | None]:
        return None, ctx.box.pop() if ctx.box else None
