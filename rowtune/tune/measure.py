"""One plan measured by real training steps: verified first, then timed, then metered.

`Bench` holds the model between measurements and puts its parameters and buffers back after each, so that
every plan trains from the same state. A measurement that fails is a value with a reason, not an exception.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from rowtune.cost.estimate import estimate
from rowtune.errors import ModelError
from rowtune.importers.source import TensorSpec
from rowtune.plan.file import Problem
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.runtime.module import apply
from rowtune.tune.device import cap_memory, free_bytes, synchronize
from rowtune.tune.measurement import Effort, Measurement, failure
from rowtune.tune.meter import measure_memory
from rowtune.tune.step import Batch, Plain, Workload, prepare, run_step
from rowtune.tune.verify import Check, Verifier

# Seconds of timed steps, and the most of them.
TIME_BOX: dict[str, tuple[float, int]] = {"quick": (3.0, 5), "full": (10.0, 15)}
# Verification keeps a second set of gradients and what the plain network saves.
REFERENCE_HEADROOM = 1.4


class Bench:
    """A model on its device, ready to be trained under one plan after another."""

    def __init__(self, problem: Problem, budget: int | None = None) -> None:
        self.work = prepare(problem)
        self.device = problem.device
        self._budget = budget
        self.module = self.work.module.to(self.device)
        self._state = {name: t.detach().clone() for name, t in _tensors(self.module)}
        self._verifier: Verifier | None = None
        self._batch: Batch | None = None

    def measure(self, plan: Plan | None, effort: Effort = "quick") -> Measurement:
        """Verify, time and meter a plan; None is the network as PyTorch runs it, which needs no check."""
        if self.device != "cpu":
            cap_memory(self.device, self._budget if plan else None)
        try:
            return self._measure(plan, effort)
        except Exception as error:
            return failure(error)
        finally:
            self._restore()

    def check(self, plan: Plan, dtype: torch.dtype | None = None) -> Check:
        """Gradients of a plan against the plain network's."""
        self._restore()
        return self._verify().check(lambda model: apply(model, plan, self.work.loss), dtype)

    def _measure(self, plan: Plan | None, effort: Effort) -> Measurement:
        error: float | None = None
        if plan is not None:
            check = self.check(plan)
            error = check.max_relative_error
            if not check.ok:
                return Measurement("wrong", f"{check.worst} is off by {error:.1e} in {check.dtype}", None)
        if self._batch is None:
            self._batch = self.work.batch(device=self.device)
        runner: nn.Module = Plain(self.module, self.work.loss)
        if plan is not None:
            runner = apply(self.module, plan, self.work.loss)
        optimizer = self.work.optimizer.make(self.module.parameters())
        inputs, target = self._batch

        def step() -> None:
            run_step(runner, optimizer, inputs, target)

        box, most = TIME_BOX[effort]
        # The first step makes the optimizer's state and warms up; a slow one is time enough for a trial.
        seconds = median_seconds(step, self.device, 0.0, 1)
        if seconds < box:
            seconds = median_seconds(step, self.device, box, most)
        full = effort == "full"
        memory = measure_memory(step, self.module, optimizer, (*inputs, target), self.device, allocator=full)
        return Measurement("ok", "", *memory, seconds, error)

    def _restore(self) -> None:
        self.module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in _tensors(self.module):
                tensor.copy_(self._state[name])
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _verify(self) -> Verifier:
        if self._verifier is None:
            batch = reference_batch(self.work, self.device)
            plain: Callable[[nn.Module], nn.Module] | None = None
            if any(node.random for node in self.work.graph.nodes):
                keep = uniform_plan(self.work.graph, "keep")
                plain = lambda model: apply(model, keep, self.work.loss)  # noqa: E731
            self._verifier = Verifier(self.module, self.work.loss, batch, plain)
        return self._verifier


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def median_seconds(step: Callable[[], None], device: str, box: float, most: int) -> float:
    """Median of a few synchronised steps: at least one, as many as `box` seconds hold, `most` at most."""
    times: list[float] = []
    while not times or (len(times) < most and sum(times) + min(times) <= box):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain_peak(work: Workload) -> int:
    """Predicted peak of the network as PyTorch runs it."""
    keep = uniform_plan(work.graph, "keep")
    return int(estimate(work.graph, keep, work.optimizer.slots).peak_bytes)


def reference_batch(work: Workload, device: str) -> Batch:
    """The batch that plans are verified on: the real one where plain training of it fits into the memory,
    else narrower images of the same height, which run the same bands."""
    room, need = free_bytes(device), REFERENCE_HEADROOM * plain_peak(work)
    specs = work.problem.inputs
    while need > room and (smaller := _narrower(specs)) is not None:
        specs, need = smaller, need / 2
    if specs == work.problem.inputs:
        return work.batch(device=device)
    try:
        return work.batch(specs, device)
    except ModelError:  # the model is tied to its width
        return work.batch(device=device)


def _narrower(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...] | None:
    """Half the width, in multiples of 32 where it was one; None where there is no width to halve."""
    if any(len(s.shape) < 4 or s.shape[-1] < 64 for s in specs):
        return None
    made = []
    for spec in specs:
        half = spec.shape[-1] // 2
        made.append(replace(spec, shape=(*spec.shape[:-1], half - half % 32 if half >= 32 else half)))
    return tuple(made)
