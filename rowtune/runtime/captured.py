"""Forward and backward of a step as one CUDA graph: the host then launches one thing, not thousands.

What a step launches depends neither on what is in its tensors nor on which step it is: bands are the same,
seeds and loss scales are tensors. So its second run is captured and every further one replayed, in the memory
of the graph: inputs are copied to where the captured step read them, gradients lie where it made them. (CUDA
graphs: see "CUDA semantics" in PyTorch's notes.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rowtune.errors import UsageError
from rowtune.plan.legal import not_captured
from rowtune.runtime.module import RowtuneModule
from rowtune.runtime.precision import autocast_key
from rowtune.torch_private import storage_of

Backward = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""Forward and backward of a batch, which leave gradients at the parameters; returns the loss, detached."""

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""Writes down what a device does in a call, without its being done; returns what the call made, and what does
it."""


def cuda_graph(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """A CUDA graph of what `work` launches, whichever threads do (autograd's); what others do meanwhile (pin
    memory for the next batch) is no part of it and no error."""
    graph = torch.cuda.CUDAGraph()
    failed: list[Exception] = []
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                made = work()
            except Exception as error:
                failed.append(error)
                raise
    except Exception:
        if failed:  # what ends a capture that failed fails as well, and would hide that memory ran out
            raise failed[0] from None
        raise
    return made, graph.replay


def recorder_for(device: torch.device) -> Record | None:
    """What writes down the work of a device; None: nothing does."""
    return cuda_graph if device.type == "cuda" else None


def capture(module: RowtuneModule) -> Captured:
    """Forward and backward of a planned module, captured in a CUDA graph at the second call of a size.

        step = rowtune.capture(rowtune.apply(model, plan, loss="mse"))
        loss = step(x, targets=y)  # and gradients are in .grad, as after loss.backward()

    Batches of another size than the first run as ever. The graph's memory stays the module's until `release`:
    what a step took, and one batch more.

    Raises:
        UsageError: the module is on no CUDA device, or its plan does what no graph can hold; says what.
    """
    record = recorder_for(next(module.parameters()).device)
    if record is None:
        raise UsageError("a CUDA graph is of a CUDA device, and the module's parameters lie on none")
    return Captured(module, backward_of(module), record)


def backward_of(module: RowtuneModule) -> Backward:
    """Forward and backward as one's own loop has them."""

    def backward(inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        loss: Tensor = module(*inputs, targets=targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return backward


# -- what cannot be captured -----------------------------------------------------------------------------


def _by_plan(module: RowtuneModule) -> str:
    return not_captured(module.plan)


def _lies_in_parts(module: RowtuneModule) -> str:
    whole = all(type(p) in (Tensor, nn.Parameter) for p in module.parameters())
    return "" if whole else "its parameters lie in parts (fully_shard)"


NOT_CAPTURED: tuple[Callable[[RowtuneModule], str], ...] = (_by_plan, _lies_in_parts)
"""A rule says why a module's steps cannot be captured, or nothing."""


class _Step(NamedTuple):
    """A captured step: where it reads and what it makes, and what makes it again."""

    addresses: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    targets: Tensor
    seed: Tensor
    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    replay: Callable[[], object]


class Captured:
    """Does what `backward` does, which is forward and backward of `module` and nothing else.

    Args:
        record: how device work is written down (a CUDA graph).

    Raises:
        UsageError: the module's plan does what cannot be written down.
    """

    def __init__(self, module: RowtuneModule, backward: Backward, record: Record) -> None:
        if why := next((why for rule in NOT_CAPTURED if (why := rule(module))), ""):
            raise UsageError(
                f"steps of this plan cannot be captured in a CUDA graph: {why}; train without capture"
            )
        self.module, self.backward, self.record = module, backward, record
        self._seen: Any = None  # the kind that is captured
        self._step: _Step | None = None

    def __call__(self, *inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, detached; gradients are added to those that the parameters have."""
        kind = self._kind(inputs, targets)
        if self._seen is None:
            with _beside(targets.device):
                loss = self._plainly(inputs, targets)
            self._seen = self._kind(inputs, targets)  # a loss scale is there from the first step on
            return loss
        if kind != self._seen:
            return self._plainly(inputs, targets)
        if self._step is None or self._step.addresses != self._addresses():
            self.release()
            self._step = self._captured(inputs, targets)
        return self._replayed(self._step, inputs, targets)

    def release(self) -> None:
        """Let go of the graph and its memory; the next call of its kind captures again."""
        if self._step is not None:
            own = {storage_of(g) for g in self._step.gradients if g is not None}
            for p in self.module.parameters():
                if p.grad is not None and storage_of(p.grad) in own:
                    p.grad = p.grad.clone()
        self._step = None

    def _plainly(self, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        self.module.lists.after = 0  # lists are written now: to write them is no work of a device
        return self.backward(inputs, targets)

    def _captured(self, inputs: tuple[Tensor, ...], targets: Tensor) -> _Step:
        self._check_random(inputs)
        parameters = tuple(self.module.parameters())
        before = [p.grad for p in parameters]
        own = tuple(t.clone() for t in inputs), targets.clone()
        seed = torch.zeros((), dtype=torch.int64, device=targets.device)
        for p in parameters:
            p.grad = None  # backward makes gradients in the graph's memory, and adds to none
        self.module.seed = seed
        try:
            loss, replay = self.record(lambda: self.backward(*own))
            made = tuple(p.grad for p in parameters)
        finally:
            self.module.seed = None
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        return _Step(self._addresses(), *own, seed, loss, made, replay)

    def _replayed(self, step: _Step, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        parameters = tuple(self.module.parameters())
        for p, made in zip(parameters, step.gradients, strict=True):
            if p.grad is not None and p.grad is made:
                p.grad = made.clone()  # of the step before: it is added to
        with torch.no_grad():
            for own, given in zip((*step.inputs, step.targets), (*inputs, targets), strict=True):
                own.copy_(given, non_blocking=True)
            step.seed.fill_(self.module.drawn_seed(step.inputs))
            step.replay()
            for p, made in zip(parameters, step.gradients, strict=True):
                if p.grad is None:
                    p.grad = made
                elif made is not None:
                    p.grad.add_(made)
            return step.loss.clone()

    def _check_random(self, inputs: tuple[Tensor, ...]) -> None:
        graph = self.module.program(inputs, with_targets=True).graph
        if drawn := [n for n in graph.nodes if n.random and n.op != "dropout"]:
            raise UsageError(
                f"steps of this model cannot be captured in a CUDA graph: {drawn[0].op} draws from a "
                "generator that the host seeds at each step; train without capture"
            )

    def _kind(self, inputs: tuple[Tensor, ...], targets: Tensor) -> Any:
        """What the launches of a step depend on."""
        layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (*inputs, targets))
        wanted = tuple(p.requires_grad for p in self.module.parameters())
        scale = self.module.loss_scale
        fixed = None if isinstance(scale, Tensor) else scale
        return layouts, wanted, self.module.training, self.module.flags(), fixed, autocast_key()

    def _addresses(self) -> tuple[int, ...]:
        """Where the captured step finds parameters and buffers: weights may be replaced by others."""
        return tuple(t.data_ptr() for t in (*self.module.parameters(), *self.module.buffers()))


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On a stream of its own, as a step is to run before it is captured."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
