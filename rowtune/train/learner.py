"""One optimizer step of a planned module: gradients of one or more batches, clipped, applied, averaged.

The second step is metered, since from it on the optimizer's state exists; what the average and accumulated
gradients take is in that peak.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rowtune.errors import (
    DivergedError,
    EnginesDifferError,
    GradientError,
    InfeasibleError,
    ModelError,
    RowtuneError,
    UsageError,
)
from rowtune.importers.synced import shares
from rowtune.plan.file import PlanFile, exact_one, figures, smaller
from rowtune.plan.plan import Plan
from rowtune.runtime.in_backward import check_training
from rowtune.runtime.module import Engine, apply
from rowtune.train import ranks, sharded
from rowtune.train.gradient_error import Watch, refusal
from rowtune.train.group import Group, OutOfMemory
from rowtune.train.options import Changed, MadeExact, Options, SteppedDown, StepReport
from rowtune.train.schedule import parse_schedule
from rowtune.train.undo import Before, is_atomic
from rowtune.tune.device import release, synchronize
from rowtune.tune.measurement import out_of_memory
from rowtune.tune.meter import measure_memory
from rowtune.tune.optimizers import OptimizerSpec
from rowtune.tune.step import Batch, Workload, gradients_of, scaler_for, use_gradients
from rowtune.tune.verify import compare, outcome


class Learner:
    """Module, optimizer, schedule and average, and what was seen so far.

    `total` is how many steps the run has, None where nobody knows; `here` counts those of this process,
    `since` those under this plan, `done` those before a resumption as well.
    """

    def __init__(
        self, file: PlanFile, work: Workload, options: Options, spec: OptimizerSpec, total: int | None
    ) -> None:
        self.work, self.options, self.total = work, options, total
        self.device = work.problem.device
        self.model = work.module.to(self.device)
        ranks.begin_alike(self.model)
        self.group = Group(self.device, lasting=options.fsdp)
        self.average: AveragedModel | None = None
        self.take(file)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = spec.make(self.trained)
        self.scaler = scaler_for(file.plan, self.device)
        self.schedule = parse_schedule(options.schedule, options.warmup).make(self.optimizer, total)
        if options.ema:
            update = get_ema_multi_avg_fn(options.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=update)
            self.averaged = apply(self.average.module, file.plan, work.loss, engine=options.engine)
        self.gradients = gradients_of(self.runner, self.optimizer, self.scaler)
        self.done = self.here = 0
        self.loss: float | None = None
        self.times: list[float] = []
        self.error: float | None = None

    def take(self, file: PlanFile) -> None:
        """Train by this file's plan from now on."""
        options, loss = self.options, self.work.loss
        check_training(file.plan, clipped=options.clip > 0, accumulated=options.accumulate > 1)
        if file.plan.step_in_backward and ranks.several():
            raise UsageError(
                "the plan has step_in_backward, which uses each gradient before its mean over processes is "
                "known: take another plan of the file by --budget, or search with --savers -step_in_backward"
            )
        if options.fsdp:
            sharded.check(options, file.plan)
        self.file = file
        graph = self.work.traced if self.device == "cpu" else None  # a graph holds its device
        self.runner = apply(self.model, file.plan, loss, graph=graph, engine=options.engine)
        if options.fsdp:  # once: a sharded run cannot step down
            sharded.shard(self.runner, self.device)
        self.runner.lists.after = 0  # what was measured: a step of the schedule itself may take more
        other: Engine = "traced" if options.engine == "listed" else "listed"
        self.second = apply(self.model, file.plan, loss, graph=graph, engine=other)
        watched = file.plan.allowed_error > 0 < options.check_error_every
        self.watch = Watch(self.runner, file.plan, loss, graph) if watched else None
        self.averaged = self.runner  # what is validated
        if self.average is not None:
            self.averaged = apply(self.average.module, file.plan, loss, engine=options.engine)
        self.peak: int | None = None
        self.since = 0

    @property
    def whole(self) -> bool:
        """Whether a step that fails may have changed a part of the parameters."""
        plan = self.file.plan
        one_by_one = plan.step_in_backward or plan.optimizer_state == "host"
        return one_by_one or not is_atomic(self.optimizer) or ranks.several()

    @property
    def waits(self) -> bool:
        """Whether ranks wait for each other in the middle of a forward."""
        return self.options.fsdp or shares(self.model)

    @property
    def saved(self) -> nn.Module:
        """What goes home."""
        return self.model if self.average is None else self.average.module

    def kept(self) -> list[Tensor]:
        """Tensors that stay in memory beside the model and its optimizer's."""
        return [] if self.average is None else [*self.average.parameters(), *self.average.buffers()]

    def step(
        self, batches: Iterator[Batch], epoch: int, tell: Callable[[Changed], None] = lambda _: None
    ) -> tuple[StepReport, int] | None:
        """One optimizer step on the next batches, and how many it took; None where there are none left. Where
        memory runs out, it is made with the next smaller plan of the front; where gradients are off by more
        than the plan allows, with an exact one. `tell` is told.

        Raises:
            InfeasibleError: memory ran out, and the front has no smaller plan.
            DivergedError: the loss is not finite any more.
            EnginesDifferError: `verify_every` found the two engines to differ.
            GradientError: gradients are off by more than the plan allows, and the front has no exact plan.
        """
        began = time.perf_counter()
        first = next(batches, None)
        if first is None:
            return None
        step = _Step(self, first, batches)
        seconds = self._try(step, tell)
        self.times.append(seconds)
        self.done, self.here, self.since = self.done + 1, self.here + 1, self.since + 1
        self.loss = float(ranks.total(step.total)) / step.count
        report = StepReport(
            self.done, self.total, self.loss, seconds, self.peak, step.lr, epoch, self.options.epochs,
            step.images * ranks.count() / (time.perf_counter() - began), step.norm, self.error,
        )  # fmt: skip
        return report, step.count

    def _try(self, step: _Step, tell: Callable[[Changed], None]) -> float:
        """Make a step, with other plans where it has to be; how long the one that did it took."""
        self.error = None
        while True:
            try:
                if (now := self._checked(step)) is not None:
                    tell(now)
                return self._made(step)
            except OutOfMemory as error:
                reason = str(error)
            step.undo()
            tell(self.step_down(reason, self.done + 1))

    def _made(self, step: _Step) -> float:
        last = self.total is not None and self.done + 1 == self.total
        fresh = step.fresh
        with self.group.guarded(self.waits):
            if fresh and last and not self.here:
                outcome(self.model, self.runner, *step.first)  # lowers the plan: not the step's memory
            if fresh and self.options.verify_every and self.done % self.options.verify_every == 0:
                self._verify(step.first)
        start = time.perf_counter()
        if fresh and (self.since == 1 or (last and not self.here)):
            inputs, target = step.first
            live = [*inputs, target, *self.kept()]
            self.peak = measure_memory(step.run, self.model, self.optimizer, live, self.device).peak_bytes
        else:
            step.run()
        synchronize(self.device)
        return time.perf_counter() - start

    def _checked(self, step: _Step) -> MadeExact | None:
        """Measure the error of gradients, if it is time to; take an exact plan where it is too large."""
        if self.watch is None or not step.fresh or self.done % self.options.check_error_every:
            return None
        with self.group.guarded(self.waits):
            check = self.watch.check(self.model, step.first)
        at, allowed, self.error = self.done + 1, self.file.plan.allowed_error, check.max_relative_error
        if not ranks.any_of(not check.ok, self.device):
            return None
        if (file := exact_one(self.file, self._may)) is None:
            raise GradientError(refusal(at, check, self.file))
        self._change(file)
        return MadeExact(at, check.max_relative_error, check.worst, allowed, *figures(file))

    def step_down(self, reason: str, step: int) -> SteppedDown:
        """Take the next smaller plan of the front.

        Raises:
            InfeasibleError: there is none.
        """
        if (file := smaller(self.file, self._may)) is None:
            raise InfeasibleError(
                f"step {step} ran out of memory ({reason}), and the plan's file has no plan that takes less: "
                "search again with a smaller --budget (rowtune search --from the file keeps what was "
                "measured), or free memory that others hold; the last --checkpoint can be gone on from"
            )
        self._change(file)
        return SteppedDown(step, reason, *figures(file))

    def _change(self, file: PlanFile) -> None:
        self.gradients.release()
        self.take(file)
        self.gradients = gradients_of(self.runner, self.optimizer, self.scaler)
        release(self.device)

    def _may(self, plan: Plan) -> bool:
        """Whether the run's options go with a plan."""
        whole = self.options.clip > 0 or self.options.accumulate > 1 or ranks.several()
        return not (plan.step_in_backward and whole)

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
    """One optimizer step. Batches after the first are read when it comes to them, so that only one is in
    memory at a time. A `run` that ran out of memory can be undone and called again: it goes on with the batch
    at hand, after those whose gradients are there."""

    def __init__(self, learner: Learner, first: Batch, batches: Iterator[Batch]) -> None:
        self.learner, self.batch, self.batches = learner, first, batches
        self.total = torch.zeros(())
        self.count = self.images = 0
        self.norm: float | None = None
        self.lr = float(learner.optimizer.param_groups[0]["lr"])
        self.before: Before | None = None

    @property
    def first(self) -> Batch:
        """The batch at hand."""
        return self.batch

    @property
    def fresh(self) -> bool:
        """Whether nothing of it was tried yet."""
        return self.count == 0 and self.before is None

    def run(self) -> None:
        learner = self.learner
        if not self.count:
            learner.optimizer.zero_grad(set_to_none=True)
        while True:
            if not learner.options.fsdp:  # which gives up where it would have to be undone
                self.before = Before(
                    learner.model, learner.optimizer, learner.device,
                    gradients=self.count > 0, whole=learner.whole,
                )  # fmt: skip
            with learner.group.guarded(learner.waits):
                loss = self._backward(self.batch)
            more = self._next()
            if more is None:
                break
            self._count(loss)
            self.batch = more
        if ranks.several():
            with learner.group.guarded(waits=True):
                ranks.average(learner.trained)  # scaled: what is infinite on one rank is so on all
        with learner.group.guarded(waits=learner.options.fsdp):  # clipping adds up the parts
            if learner.scaler is not None:
                learner.scaler.unscale_(learner.optimizer)
            self._use(self.count + 1)
        self._count(loss)
        learner.schedule.step()
        if learner.average is not None:
            learner.average.update_parameters(learner.model)

    def undo(self) -> None:
        """Forget what the batch at hand did."""
        if self.before is not None:
            self.before.restore()
        if self.learner.scaler is not None:
            self.learner.scaler._per_optimizer_states.clear()  # whose gradients were unscaled

    def _next(self) -> Batch | None:
        """The next batch of this step; None where it has them all."""
        more = self.count + 1 < self.learner.options.accumulate
        return next(self.batches, None) if more else None

    def _count(self, loss: Tensor) -> None:
        self.total = self.total.to(loss.device) + loss
        self.count += 1
        self.images += self.batch[0][0].shape[0]

    def _use(self, count: int) -> None:
        """The optimizer's part, with the sum of `count` gradients."""
        learner, options = self.learner, self.learner.options
        if count > 1:
            for weight in learner.trained:
                if weight.grad is not None:
                    weight.grad.div_(count)
        if options.clip:
            self.norm = float(sharded.whole(nn.utils.clip_grad_norm_(learner.trained, options.clip)))
        use_gradients(learner.runner, learner.optimizer, learner.scaler)

    def _backward(self, batch: Batch) -> Tensor:
        inputs, target = batch
        learner = self.learner
        try:
            return learner.gradients(*inputs, targets=target)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, RowtuneError) or out_of_memory(error) or ranks.lost(error):
                raise
            if learner.group.given_up():
                raise
            shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"step {learner.done + 1} on inputs {shapes} failed: {reason}") from error
