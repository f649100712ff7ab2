"""One optimizer step of a planned module: gradients of one or more batches, clipped, applied, averaged.

The second step is metered, since from it on the optimizer's state exists; what the average and accumulated
gradients take is in that peak.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rowtune.errors import DivergedError, EnginesDifferError, ModelError, RowtuneError
from rowtune.plan.file import PlanFile
from rowtune.runtime.in_backward import check_training
from rowtune.runtime.module import Engine, RowtuneModule, apply
from rowtune.train.options import Options, StepReport
from rowtune.train.schedule import parse_schedule
from rowtune.tune.device import synchronize
from rowtune.tune.meter import measure_memory
from rowtune.tune.step import Batch, OptimizerSpec, Workload, run_backward, scaler_for, use_gradients
from rowtune.tune.verify import compare, outcome


class Learner:
    """Module, optimizer, schedule and average, and what was seen so far.

    `total` is how many steps the run has, None where nobody knows; `here` counts those of this process,
    `done` those before a resumption as well.
    """

    def __init__(
        self, file: PlanFile, work: Workload, options: Options, spec: OptimizerSpec, total: int | None
    ) -> None:
        self.work, self.options, self.total = work, options, total
        self.device = work.problem.device
        self.model = work.module.to(self.device)
        graph = work.traced if self.device == "cpu" else None  # a graph holds its device
        self.runner = apply(self.model, file.plan, work.loss, graph=graph, engine=options.engine)
        self.runner.lists.after = 0 if options.verify_every else 1  # what is compared is what trains
        other: Engine = "traced" if options.engine == "listed" else "listed"
        self.second = apply(self.model, file.plan, work.loss, graph=graph, engine=other)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        check_training(file.plan, clipped=options.clip > 0, accumulated=options.accumulate > 1)
        self.optimizer = spec.make(self.trained)
        self.scaler = scaler_for(file.plan, self.device)
        self.schedule = parse_schedule(options.schedule, options.warmup).make(self.optimizer, total)
        self.average: AveragedModel | None = None
        self.averaged = self.runner  # what is validated
        if options.ema:
            update = get_ema_multi_avg_fn(options.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=update)
            self.averaged = apply(self.average.module, file.plan, work.loss, engine=options.engine)
        self.done = self.here = 0
        self.peak: int | None = None
        self.loss: float | None = None
        self.times: list[float] = []

    @property
    def saved(self) -> nn.Module:
        """What goes home."""
        return self.model if self.average is None else self.average.module

    def kept(self) -> list[Tensor]:
        """Tensors that stay in memory beside the model and its optimizer's."""
        return [] if self.average is None else [*self.average.parameters(), *self.average.buffers()]

    def step(self, batches: Iterator[Batch], epoch: int) -> tuple[StepReport, int] | None:
        """One optimizer step on the next batches, and how many it took; None where there are none left.

        Raises:
            DivergedError: the loss is not finite any more.
            EnginesDifferError: `verify_every` found the two engines to differ.
        """
        began = time.perf_counter()
        first = next(batches, None)
        if first is None:
            return None
        if self.total is not None and self.total - self.done == 1 and not self.here:
            outcome(self.model, self.runner, *first)  # lowers the plan, which is not the step's memory
        if self.options.verify_every and self.done % self.options.verify_every == 0:
            self._verify(first)
        step = _Step(self, first, batches)
        last = self.total is not None and self.done + 1 == self.total
        start = time.perf_counter()
        if self.here == 1 or (last and not self.here):
            inputs, target = first
            live = [*inputs, target, *self.kept()]
            self.peak = measure_memory(step.run, self.model, self.optimizer, live, self.device).peak_bytes
        else:
            step.run()
        synchronize(self.device)
        now = time.perf_counter()
        self.times.append(now - start)
        self.done, self.here = self.done + 1, self.here + 1
        self.loss = float(step.total) / step.count
        report = StepReport(
            self.done, self.total, self.loss, now - start, self.peak, step.lr, epoch, self.options.epochs,
            step.images / (now - began), step.norm,
        )  # fmt: skip
        return report, step.count

    def check_loss(self, kept: str) -> None:
        """DivergedError where the loss is not a number any more, unless that is wanted."""
        if self.loss is None or math.isfinite(self.loss) or self.options.keep_going:
            return
        raise DivergedError(
            f"the loss is {self.loss} at step {self.done}: stopped, and nothing saved{kept}; try a smaller "
            "--lr or --clip 1, look at the data, or give --keep-going"
        )

    def _verify(self, batch: Batch) -> None:
        """Raises EnginesDifferError where the two ways to run a plan do not agree on this batch."""
        other, own = (outcome(self.model, runner, *batch) for runner in (self.second, self.runner))
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
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


class _Step:
    """One optimizer step, to be run once. Batches after the first are read when it comes to them, so that
    only one is in memory at a time."""

    def __init__(self, learner: Learner, first: Batch, batches: Iterator[Batch]) -> None:
        self.learner, self.first, self.batches = learner, first, batches
        self.total = torch.zeros(())
        self.count = self.images = 0
        self.norm: float | None = None
        self.lr = float(learner.optimizer.param_groups[0]["lr"])

    def run(self) -> None:
        learner, options = self.learner, self.learner.options
        learner.optimizer.zero_grad(set_to_none=True)
        batch: Batch | None = self.first
        while batch is not None:
            self._backward(learner.runner, batch)
            del batch
            batch = next(self.batches, None) if self.count < options.accumulate else None
        if learner.scaler is not None:
            learner.scaler.unscale_(learner.optimizer)
        if self.count > 1:
            for weight in learner.trained:
                if weight.grad is not None:
                    weight.grad.div_(self.count)
        if options.clip:
            self.norm = float(nn.utils.clip_grad_norm_(learner.trained, options.clip))
        use_gradients(learner.optimizer, learner.scaler)
        learner.schedule.step()
        if learner.average is not None:
            learner.average.update_parameters(learner.model)

    def _backward(self, runner: RowtuneModule, batch: Batch) -> None:
        inputs, target = batch
        try:
            learner = self.learner
            loss = run_backward(runner, learner.optimizer, inputs, target, learner.scaler)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, RowtuneError):
                raise
            shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"step {self.learner.done + 1} on inputs {shapes} failed: {reason}") from error
        self.total = self.total.to(loss.device) + loss
        self.count += 1
        self.images += inputs[0].shape[0]
