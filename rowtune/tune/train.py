"""Training under a plan: what `rowtune run` does, step by step, watched against the budget."""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowtune.cost.predict import predict
from rowtune.errors import DivergedError, EnginesDifferError, ModelError, PlanError, RowtuneError, UsageError
from rowtune.importers.source import parse_shape
from rowtune.plan.file import PlanFile
from rowtune.runtime.module import Engine, apply
from rowtune.tune.device import cap_memory, resolve_device, synchronize, warm_up
from rowtune.tune.meter import measure_memory
from rowtune.tune.output import ROOM, check_writable, keep
from rowtune.tune.step import Batch, OptimizerSpec, Workload, parse_optimizer, prepare, run_step
from rowtune.tune.verify import compare, outcome


@dataclass(frozen=True)
class Options:
    """How long, on what, with which optimizer, and where the weights go; whether to train on when the loss is
    not a number any more; what runs rows segments (see `apply`), and how often both ways are compared."""

    steps: int | None = None
    epochs: int | None = None
    data: str = ""
    optimizer: str = ""
    lr: float | None = None
    save: Path | None = None
    keep_going: bool = False
    engine: Engine = "listed"
    verify_every: int = 0


@dataclass(frozen=True)
class StepReport:
    """After each step. `peak_bytes` is known from the metered step on."""

    step: int
    steps: int | None
    loss: float
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Trained:
    """status: ok, over_budget or interrupted. `weights` is where they are, if they were to be saved."""

    status: str
    steps: int
    loss: float | None
    peak_bytes: int | None
    budget_bytes: int
    step_seconds: float | None
    weights: Path | None = None


def open_plan(file: PlanFile, device: str = "auto", shapes: Sequence[str] = ()) -> tuple[Workload, int]:
    """The workload a plan was made for, checked against it, and the predicted peak of a step.

    Raises:
        PlanError: the model's structure changed, the device is not here, or the decisions do not fit it.
    """
    try:
        here = resolve_device(file.problem.device if device == "auto" else device)
    except UsageError as error:
        if device != "auto":
            raise
        raise PlanError(
            f"the plan was made for {file.problem.device}, which is not here; search again"
        ) from error
    if here.partition(":")[0] != file.problem.device.partition(":")[0]:
        raise PlanError(
            f"the plan was made for {file.problem.device}, not {here}; search again on this device"
        )
    problem = replace(file.problem, device=here)
    if shapes:
        problem = replace(problem, inputs=_reshaped(file, shapes))
    work = prepare(problem)
    if work.graph.fingerprint != file.fingerprint:
        raise PlanError(
            f"the plan was made for a model with fingerprint {file.fingerprint}, but {problem.model} "
            f"now has {work.graph.fingerprint}; search again"
        )
    return work, int(predict(work.graph, file.plan, work.optimizer.slots).peak_bytes)


def _reshaped(file: PlanFile, shapes: Sequence[str]) -> Any:
    wanted = [parse_shape(text) for text in shapes]
    specs = list(file.problem.inputs)
    names = [spec.name for spec in specs]
    for i, (name, shape) in enumerate(wanted):
        at = names.index(name) if name in names else i
        if (name and name not in names) or at >= len(specs) or len(shape) != len(specs[at].shape):
            raise UsageError(f"--shape: the plan's inputs are {', '.join(map(str, specs))}")
        specs[at] = replace(specs[at], shape=shape)
    return tuple(specs)


def train(
    file: PlanFile, work: Workload, options: Options, watch: Callable[[StepReport], None] = lambda _: None
) -> Trained:
    """Train and save; Ctrl-C ends the training early and still saves.

    Raises:
        DivergedError: the loss is not finite any more; nothing is saved.
        EnginesDifferError: `verify_every` found the two engines to differ; nothing is saved.
    """
    device = work.problem.device
    spec = parse_optimizer(options.optimizer) if options.optimizer else work.optimizer
    if options.lr is not None:
        spec = spec.with_lr(options.lr)
    limit = file.budget_bytes - file.reserve_bytes
    if file.threads and device == "cpu":
        torch.set_num_threads(file.threads)
    if options.save is not None:
        state = work.module.state_dict().values()
        check_writable(options.save, "--save", sum(t.numel() * t.itemsize for t in state) + ROOM)
    warm_up(device)
    cap_memory(device, limit)
    batches, total = _batches(work, options)
    loop = _Loop(file, work, spec, total, watch, limit, options)
    status = "ok"
    try:
        for batch in batches:
            loop.step(batch)
    except KeyboardInterrupt:
        status = "interrupted"
    if loop.done == 0 and status == "ok":
        raise UsageError(f"--data {options.data} gave no batch")
    weights = None
    if options.save is not None and loop.done:
        weights = keep(options.save, lambda path: save_weights(work.module, path), "the weights")
    if status == "ok" and loop.peak is not None and loop.peak > limit:
        status = "over_budget"
    return Trained(status, loop.done, loop.loss, loop.peak, file.budget_bytes, loop.seconds(), weights)


class _Loop:
    """Module, optimizer and what was seen so far."""

    def __init__(
        self,
        file: PlanFile,
        work: Workload,
        spec: OptimizerSpec,
        total: int | None,
        watch: Callable[[StepReport], None],
        limit: int,
        options: Options,
    ) -> None:
        self.work, self.total, self.watch = work, total, watch
        self.limit, self.options = limit, options
        self.device = work.problem.device
        module = work.module.to(self.device)
        graph = work.traced if self.device == "cpu" else None  # a graph holds its device
        self.runner = apply(module, file.plan, work.loss, graph=graph, engine=options.engine)
        self.runner.lists.after = 0 if options.verify_every else 1  # what is compared is what trains
        other: Engine = "traced" if options.engine == "listed" else "listed"
        self.second = apply(module, file.plan, work.loss, graph=graph, engine=other)
        self.optimizer = spec.make(module.parameters())
        self.done, self.peak, self.loss = 0, None, None  # type: tuple[int, int | None, float | None]
        self.times: list[float] = []

    def step(self, batch: Batch) -> None:
        """One step. The second is metered, since from it on optimizer state exists (or the only one)."""
        inputs, target = batch
        loss = torch.zeros(())

        def run() -> None:
            nonlocal loss
            loss = run_step(self.runner, self.optimizer, inputs, target)

        if self.total == 1:  # the first call also lowers the plan, which is not the step's memory
            outcome(self.work.module, self.runner, inputs, target)
        if self.options.verify_every and self.done % self.options.verify_every == 0:
            self._verify(batch)
        metered = self.done == min(1, (self.total or 2) - 1)
        start = time.perf_counter()
        try:
            if metered:
                memory = measure_memory(run, self.work.module, self.optimizer, (*inputs, target), self.device)
                self.peak = memory.peak_bytes
            else:
                run()
            synchronize(self.device)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, RowtuneError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"step {self.done + 1} on inputs {_shapes(inputs)} failed: {reason}") from error
        self.times.append(time.perf_counter() - start)
        self.done += 1
        self.loss = float(loss)
        self.watch(StepReport(self.done, self.total, self.loss, self.times[-1], self.peak))
        if not (math.isfinite(self.loss) or self.options.keep_going):
            raise DivergedError(
                f"the loss is {self.loss} at step {self.done}: stopped, and nothing saved; try a smaller "
                "--lr, look at the data, or give --keep-going"
            )
        if self.done == 1:  # the plan's own kernels are loaded now, and part of the context
            cap_memory(self.device, self.limit)

    def _verify(self, batch: Batch) -> None:
        """Raises EnginesDifferError where the two ways to run a plan do not agree on this batch."""
        other, own = (outcome(self.work.module, runner, *batch) for runner in (self.second, self.runner))
        dtype = next(p.dtype for p in self.work.module.parameters() if p.is_floating_point())
        check = compare(other, own, dtype)
        if not check.ok:
            raise EnginesDifferError(
                f"at step {self.done + 1} the engines listed and traced differ by "
                f"{check.max_relative_error:.1e} in {check.worst}: this is a fault of rowtune's. Please "
                "report it (rowtune report --bundle FILE packs what is needed, no weights); --engine traced "
                "trains without lists meanwhile"
            )

    def seconds(self) -> float | None:
        """Median of the steps after warm-up and metering, or of what there is."""
        times = self.times[2:] or self.times
        return statistics.median(times) if times else None


def _batches(work: Workload, options: Options) -> tuple[Iterator[Batch], int | None]:
    for flag, value in (("--steps", options.steps), ("--epochs", options.epochs)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is at least 1, not {value}")
    if not options.data:
        if options.epochs is not None:
            raise UsageError("--epochs needs --data; synthetic data has no end: give --steps")
        steps = options.steps or 10
        batch = work.batch(device=work.problem.device)
        return iter([batch] * steps), steps
    loader = _loader(options.data, work)
    return _epochs(loader, work, options), options.steps


def _epochs(loader: Iterable[Any], work: Workload, options: Options) -> Iterator[Batch]:
    steps, done = options.steps, 0
    epochs = options.epochs or (1 if steps is None else 1 << 60)
    for _ in range(epochs):
        before = done
        for item in loader:
            if steps is not None and done >= steps:
                return
            done += 1
            yield _batch(item, work, options.data)
        if done == before:
            return


def _loader(text: str, work: Workload) -> Iterable[Any]:
    """What `module:factory` returns: a DataLoader or any iterable of batches, or a Dataset to be batched."""
    name, _, attribute = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(name), attribute)()
    except Exception as error:
        raise UsageError(f"--data {text} (module:factory) failed: {type(error).__name__}: {error}") from error
    if isinstance(made, torch.utils.data.Dataset):
        size = work.problem.inputs[0].shape[0]
        return torch.utils.data.DataLoader(made, batch_size=size, drop_last=True)
    if not isinstance(made, Iterable):
        raise UsageError(f"--data {text} returned {type(made).__name__}, neither a DataLoader nor a Dataset")
    return made


def _batch(item: Any, work: Workload, text: str) -> Batch:
    """(input or inputs, target) on the device, floating inputs in the model's type."""
    if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Tensor)):
        raise UsageError(f"--data {text}: a batch is (inputs, target), not {type(item).__name__}")
    device = work.problem.device
    given = item[0] if isinstance(item[0], (tuple, list)) else [item[0]]
    specs = work.problem.inputs
    if len(given) != len(specs) or not all(isinstance(t, Tensor) for t in given):
        raise UsageError(
            f"--data {text}: the model takes {len(specs)} input tensor(s), a batch has {len(given)}"
        )
    inputs = []
    for tensor, spec in zip(given, specs, strict=True):
        floating = tensor.is_floating_point() and spec.torch_dtype.is_floating_point
        inputs.append(tensor.to(device, spec.torch_dtype if floating else tensor.dtype))
    return tuple(inputs), item[1].to(device)


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join("x".join(map(str, t.shape)) for t in tensors)


def save_weights(module: nn.Module, path: Path) -> None:
    """The state dict as safetensors, whole or not at all. OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {k: v.detach().to("cpu", copy=True).contiguous() for k, v in module.state_dict().items()},
            temporary,
        )
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
