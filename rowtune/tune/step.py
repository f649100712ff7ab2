"""A training step as users run it: problem -> workload (module, graph, loss, batch), and one step of it.

A step is: forgotten gradients (zero_grad at its start), forward, loss, backward, optimizer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rowtune.errors import ModelError, UsageError, meant
from rowtune.graph.graph import Graph
from rowtune.graph.losses import Loss, default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.importers import source
from rowtune.importers.source import Loaded
from rowtune.importers.trace import trace
from rowtune.plan.plan import Home, Plan
from rowtune.problem import Problem, Source, TensorSpec
from rowtune.runtime.in_backward import step_in_backward
from rowtune.runtime.module import RowtuneModule
from rowtune.runtime.optimizer_state import settle, step_from_host
from rowtune.torch_private import pytree

DEFAULT_OPTIMIZER = "sgd:lr=0.01,momentum=0.9"

Batch = tuple[tuple[Tensor, ...], Tensor]

_OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.001}),
    "adamw": (torch.optim.AdamW, {"lr": 0.001}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.001}),
}
# Left to itself PyTorch updates all parameters of a card at once, with a temporary as large as all of them.
_FUSED = frozenset({"sgd", "adam", "adamw"})
_WAYS = frozenset({"fused", "foreach", "capturable", "differentiable"})


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer by name and options, as `sgd:lr=0.01,momentum=0.9`."""

    name: str
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return self.name + ":" + ",".join(f"{k}={v}" for k, v in self.options)

    @property
    def slots(self) -> int:
        """Parameter-sized tensors that it keeps from step to step."""
        options = dict(self.options)
        if self.name == "sgd":
            return int(options.get("momentum", 0) != 0)
        if self.name == "rmsprop":
            return 1 + int(options.get("momentum", 0) != 0) + int(bool(options.get("centered", False)))
        return 2 + int(bool(options.get("amsgrad", False)))

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            raise ModelError("the model has no parameter that requires a gradient: there is nothing to train")
        return _OPTIMIZERS[self.name][0](trained, **{**self._lean(trained), **dict(self.options)})

    def _lean(self, trained: Sequence[nn.Parameter]) -> dict[str, bool]:
        """The way of stepping that takes no memory to speak of, unless the user names one."""
        if _WAYS & dict(self.options).keys():
            return {}
        usual = all(p.is_floating_point() and not hasattr(p, "full_tensor") for p in trained)
        fused = self.name in _FUSED and usual  # sharded weights have no fused kernels for all of them
        return {"fused": True} if fused else {"foreach": False}

    def with_lr(self, lr: float) -> OptimizerSpec:
        return replace(self, options=tuple({**dict(self.options), "lr": lr}.items()))


def parse_optimizer(text: str) -> OptimizerSpec:
    """`adam`, `sgd:lr=0.1,momentum=0.9`, ...; UsageError for an unknown name or option."""
    name, _, rest = text.partition(":")
    if name not in _OPTIMIZERS:
        raise UsageError(
            f"--optimizer is one of {', '.join(_OPTIMIZERS)} with options as in sgd:lr=0.1, not {text!r}"
            f"{meant(name, _OPTIMIZERS)}"
        )
    make, options = _OPTIMIZERS[name][0], dict(_OPTIMIZERS[name][1])
    known = set(inspect.signature(make).parameters) - {"params"}
    for item in filter(None, rest.split(",")):
        key, eq, value = item.partition("=")
        if not eq or key not in known:
            raise UsageError(
                f"--optimizer {text}: {name} has no option {item!r}; it takes {', '.join(sorted(known))}"
                f"{meant(key, known)}"
            )
        options[key] = _number(value, text)
    try:
        make([nn.Parameter(torch.zeros(1))], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--optimizer {text}: {error}") from error
    return OptimizerSpec(name, tuple(options.items()))


def _number(value: str, text: str) -> float | bool:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--optimizer {text}: {value!r} is neither a number nor true or false")
    return number


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


def run_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """One training step; the loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    loss = run_backward(module, optimizer, inputs, target, scaler)
    use_gradients(module, optimizer, scaler)
    return loss


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
