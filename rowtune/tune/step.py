"""A training step as users run it: problem -> workload (module, graph, loss, batch), and one step of it.

A step is: forgotten gradients (zero_grad at its start), forward, loss, backward, optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rowtune.errors import ModelError, UsageError
from rowtune.graph.graph import Graph
from rowtune.graph.losses import Loss, default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.importers import source
from rowtune.importers.source import Loaded
from rowtune.importers.trace import trace
from rowtune.plan.choices import Home
from rowtune.plan.plan import Plan
from rowtune.problem import Problem, Source, TensorSpec
from rowtune.runtime.captured import Backward, Captured, recorder_for
from rowtune.runtime.in_backward import step_in_backward
from rowtune.runtime.module import RowtuneModule
from rowtune.runtime.optimizer_state import settle, step_from_host
from rowtune.torch_private import pytree
from rowtune.tune.optimizers import DEFAULT_OPTIMIZER, OptimizerSpec, parse_optimizer

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True)
class Workload:
    """A problem made real on the CPU: the module, its graph as traced and as trained, with the loss."""

    problem: Problem
    loaded: Loaded
    traced: Graph
    graph: Graph
    loss: Loss
    optimizer: OptimizerSpec

    @property
    def module(self) -> nn.Module:
        return self.loaded.module

    def batch(self, specs: Sequence[TensorSpec] = (), device: str = "cpu") -> Batch:
        """Synthetic inputs and target, the same for the same seed; `specs` where other sizes are wanted.

        Raises:
            ModelError: the model does not take these sizes.
        """
        specs = tuple(specs) or self.problem.inputs
        graph = self.graph if specs == self.problem.inputs else plain_graph(self.module, specs)
        output = graph.values[graph.loss_output or graph.outputs[0]]
        seed = self.problem.seed
        inputs = source.inputs(specs, device, seed)
        try:
            target = synthetic_target(self.loss, output.shape, output.dtype, seed + 1).to(device)
        except (RuntimeError, MemoryError) as error:
            sizes = "x".join(map(str, output.shape))
            raise UsageError(
                f"a target for {sizes} outputs does not fit into the memory of {device}"
            ) from error
        return inputs, target


def plain_graph(module: nn.Module, specs: Sequence[TensorSpec]) -> Graph:
    """The training graph for these shapes, without a loss."""
    return trace(module, source.blank(specs), training=True)


def define(
    model: Source,
    shapes: Sequence[str] = (),
    *,
    dtype: str = "",
    device: str = "cpu",
    loss: str = "",
    optimizer: str = "",
    seed: int = 0,
) -> Workload:
    """What a command line describes, with every default filled in and the model traced."""
    spec = parse_optimizer(optimizer or DEFAULT_OPTIMIZER)
    chosen = parse(loss) if loss else None
    loaded = source.load(model, shapes, dtype, seed)
    graph = plain_graph(loaded.module, loaded.inputs)
    name = loss or default_loss(graph)
    problem = Problem(model, loaded.inputs, device, name, str(spec), seed, dtype)
    return _workload(problem, loaded, graph, chosen or parse(name), spec)


def prepare(problem: Problem) -> Workload:
    """The workload of a problem read from a plan or received by a worker."""
    shapes = [f"{s.name}:{'x'.join(map(str, s.shape))}" for s in problem.inputs]
    loaded = source.load(problem.model, shapes, problem.dtype, problem.seed)
    loaded = replace(loaded, inputs=problem.inputs)
    graph = plain_graph(loaded.module, problem.inputs)
    return _workload(problem, loaded, graph, parse(problem.loss), parse_optimizer(problem.optimizer))


def _workload(problem: Problem, loaded: Loaded, graph: Graph, loss: Loss, spec: OptimizerSpec) -> Workload:
    if not any(p.requires_grad for p in loaded.module.parameters()):
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to train")
    notes = [*loaded.notes, *graph.notes]
    if more := len(graph.outputs) - 1:
        sizes = "x".join(map(str, graph.values[graph.outputs[0]].shape))
        notes.append(
            f"the model has {more + 1} outputs; the loss is on the first ({sizes}) and leaves out the others"
        )
    loaded = replace(loaded, notes=tuple(notes))
    graph = replace(graph, device=problem.device.partition(":")[0])
    return Workload(problem, loaded, graph, with_loss(graph, loss), loss, spec)


def default_loss(graph: Graph) -> str:
    """By the shapes of the first output and the first input."""
    return default_name(graph.values[graph.outputs[0]].shape, graph.values[graph.inputs[0]].shape)


class Plain(nn.Module):
    """The network as PyTorch runs it, with the call convention of a planned module."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, *inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(pytree.tree_leaves(self.module(*inputs))[0], targets)


def scaler_for(plan: Plan | None, device: str) -> torch.amp.GradScaler | None:
    """What scales the loss of a plan in fp16, whose small gradients would be zeros."""
    fp16 = plan is not None and plan.dtype == "fp16"
    return torch.amp.GradScaler(torch.device(device).type) if fp16 else None


def steps_of(
    module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
    """Training steps, one after another: of inputs and a target; each returns its loss, detached."""
    gradients = gradients_of(module, optimizer, scaler)

    def step(inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = gradients(*inputs, targets=target)
        use_gradients(module, optimizer, scaler)
        return loss

    return step


def state_home(module: nn.Module) -> Home:
    """Where the module's plan has the optimizer's state."""
    return module.plan.optimizer_state if isinstance(module, RowtuneModule) else "device"


def run_backward(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Forward and backward, as a plan has them if `module` has one; the loss, detached. With a `scaler` it
    has: a single sweep makes gradients before there is a loss to be scaled."""
    settle(optimizer, state_home(module))
    if scaler is not None:
        module.loss_scale = scaler.scale(torch.ones((), device=target.device))
    loss: Tensor = module(*inputs, targets=target)
    if scaler is not None:
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    elif isinstance(module, RowtuneModule) and module.plan.step_in_backward:
        with step_in_backward(optimizer, module.plan.optimizer_state):
            loss.backward()  # type: ignore[no-untyped-call]
    else:
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


class Plainly(NamedTuple):
    """Steps that run as they come; called like `Captured`."""

    backward: Backward

    def __call__(self, *inputs: Tensor, targets: Tensor) -> Tensor:
        return self.backward(inputs, targets)

    def release(self) -> None:
        """Nothing is held."""


def gradients_of(
    module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> Captured | Plainly:
    """Forward and backward of one batch after another: `run_backward`, or its replay as a CUDA graph where
    the module's plan has it so and the device can."""

    def backward(inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return run_backward(module, optimizer, inputs, target, scaler)

    if isinstance(module, RowtuneModule) and module.plan.capture == "on":
        if (record := recorder_for(next(module.parameters()).device)) is not None:
            return Captured(module, backward, record)
    return Plainly(backward)


def use_gradients(
    module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> None:
    """The optimizer's step: on no gradients at all where backward used them."""
    if state_home(module) == "host":
        step_from_host(optimizer)
    elif scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
