"""One plan measured by real training steps: verified first, then timed, then metered.

`Bench` holds the model between measurements and puts its parameters and buffers back after each, so that
every plan trains from the same state. A measurement that fails is a value with a reason, not an exception.

On a card everything that is the bench's and not the step's (saved state, references, batches that are not at
work) lies on the host, and the cap holds while a plan is timed and metered, not while it is compared with a
plain network that is larger than the budget.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rowtune.plan.choices import Home
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.problem import Problem
from rowtune.runtime.module import RowtuneModule, apply
from rowtune.tune.device import cap_memory, context_bytes, release, step_clock, synchronize, warm_up
from rowtune.tune.measurement import Contender, Effort, Measurement, Timing, failure
from rowtune.tune.meter import measure_memory
from rowtune.tune.reference import places
from rowtune.tune.step import Batch, Plain, Workload, plain_graph, prepare, scaler_for, steps_of
from rowtune.tune.verify import Check, Verifier

Clock = Callable[[], float]

# Steps that a card is metered over; seconds of timed steps, and the most of them.
METERED = 3
TIME_BOX: dict[str, tuple[float, int]] = {"quick": (3.0, 5), "full": (10.0, 15)}


class Bench:
    """A model on its device, ready to be trained under one plan after another."""

    def __init__(self, problem: Problem, budget: int | None = None, work: Workload | None = None) -> None:
        self.work = work or prepare(problem)
        self.device = problem.device
        self._budget = budget
        self.module = self.work.module.to(self.device)
        self._state = {name: t.detach().to("cpu", copy=True) for name, t in _tensors(self.module)}
        # Traced once; a graph holds its device.
        self._graph = self.work.traced if self.device == "cpu" else plain_graph(self.module, problem.inputs)
        self._verifier: Verifier | None = None
        self._last: tuple[Plan, nn.Module] | None = None
        warm_up(self.device)

    @property
    def overhead_bytes(self) -> int:
        """What the device takes beside tensors."""
        return context_bytes(self.device)

    def measure(
        self, plan: Plan | None, effort: Effort = "quick", worth_seconds: float = math.inf
    ) -> Measurement:
        """Verify, time and meter a plan; None is the network as PyTorch runs it, which needs no check.

        A plan whose first warm step takes longer than `worth_seconds` is left at that: its status is slow.
        """
        try:
            return self._measure(plan, effort, worth_seconds)
        except Exception as error:
            return failure(error)
        finally:
            cap_memory(self.device, None)
            self._restore()

    def check(self, plan: Plan, dtype: torch.dtype | None = None) -> Check:
        """Gradients of a plan against the plain network's."""
        self._restore()
        return self._verify().check(self._planned(plan), dtype, plan.dtype, plan.allowed_error)

    def _planned(self, plan: Plan) -> Callable[[nn.Module], nn.Module]:
        """Applies the plan; what was verified is what is timed, and is made once."""

        def planned(model: nn.Module) -> nn.Module:
            if model is self.module and self._last is not None and self._last[0] == plan:
                return self._last[1]
            made = apply(model, plan, self.work.loss, graph=self._graph)
            if model is self.module:
                self._last = plan, made
            return made

        return planned

    def race(self, contenders: Sequence[Contender], rounds: int) -> list[Timing | None]:
        """Steps of all contenders in turns, so that a machine that is busy for a while is so for all. None
        where a contender fails."""
        default = torch.get_num_threads()
        steps: list[Callable[[], None] | None] = []
        times: list[list[Timing]] = [[] for _ in contenders]
        clock = step_clock(self.device, max(c.threads or default for c in contenders))
        homes = {_home(c.plan) for c in contenders}  # what moved between turns would be in the times
        optimizers = {home: self.work.optimizer.make(self.module.parameters()) for home in homes}
        try:
            batch = self.work.batch(device=self.device)
            steps += [self._step(c.plan, optimizers[_home(c.plan)], batch) for c in contenders]
            for turn in range(-1, rounds):  # the first turn is not counted
                for i, contender in enumerate(contenders):
                    torch.set_num_threads(contender.threads or default)
                    taken = self._timed(steps[i], clock)
                    if taken is None:
                        steps[i] = None
                    elif turn >= 0:
                        times[i].append(taken)
        finally:
            torch.set_num_threads(default)
            self._restore()
        return [_median(t) if step is not None else None for t, step in zip(times, steps, strict=True)]

    def _timed(self, step: Callable[[], None] | None, clock: Clock) -> Timing | None:
        if step is None:
            return None
        try:
            return time_step(step, self.device, clock)
        except Exception:  # it ran before; now another process has the memory
            return None

    def _step(self, plan: Plan | None, optimizer: torch.optim.Optimizer, batch: Batch) -> Callable[[], None]:
        runner = Plain(self.module, self.work.loss) if plan is None else self._planned(plan)(self.module)
        if isinstance(runner, RowtuneModule):
            # Lists are written down by the first step, which is not timed, and not by the second.
            runner.lists.after = 0
        made = steps_of(runner, optimizer, scaler_for(plan, self.device))

        def step() -> None:
            made(*batch)

        return step

    def _measure(self, plan: Plan | None, effort: Effort, worth_seconds: float) -> Measurement:
        error: float | None = None
        if plan is not None:
            check = self.check(plan)
            error = check.max_relative_error
            if not check.ok:
                return Measurement("wrong", f"{check.worst} is off by {error:.1e} in {check.dtype}", None)
            cap_memory(self.device, self._budget)
        inputs, target = self.work.batch(device=self.device)
        optimizer = self.work.optimizer.make(self.module.parameters())
        step = self._step(plan, optimizer, (inputs, target))
        retries = _retries(self.device)
        step()  # traces, lowers, chooses kernels, makes the optimizer's state
        clock = step_clock(self.device, torch.get_num_threads())
        first = time_step(step, self.device, clock)
        if first.seconds > worth_seconds:
            reason = f"a step of {first.seconds:.3g} s cannot win"
            return Measurement("slow", reason, step_seconds=first.seconds, max_relative_error=error)
        timing = _median([first, *time_steps(step, self.device, clock, *TIME_BOX[effort], first.seconds)])
        full = effort == "full"
        batch = (*inputs, target)
        memory = measure_memory(
            step, self.module, optimizer, batch, self.device, allocator=full, steps=METERED
        )
        found = None if retries is None else (_retries(self.device) or 0) - retries
        return Measurement("ok", "", *memory, timing.seconds, error, timing.cpu_seconds, found)

    def _restore(self) -> None:
        self.module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in _tensors(self.module):
                tensor.copy_(self._state[name])
        release(self.device)

    def _verify(self) -> Verifier:
        if self._verifier is None:
            plain: Callable[[nn.Module], nn.Module] | None = None
            if any(node.random for node in self.work.graph.nodes):
                keep = uniform_plan(self.work.graph, "keep")
                plain = self._planned(keep)
            self._verifier = Verifier(self.module, self.work.loss, places(self.work), plain, self.device)
        return self._verifier


def _home(plan: Plan | None) -> Home:
    return plan.optimizer_state if plan is not None else "device"


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _retries(device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def time_step(step: Callable[[], None], device: str, clock: Clock) -> Timing:
    """One synchronised step."""
    synchronize(device)
    start, used = clock(), time.process_time()
    step()
    synchronize(device)
    return Timing(clock() - start, time.process_time() - used)


def time_steps(
    step: Callable[[], None], device: str, clock: Clock, box: float, most: int, spent: float = 0.0
) -> list[Timing]:
    """As many steps as `box` seconds hold, `spent` of which are gone, `most` at most."""
    found: list[Timing] = []
    while len(found) < most - 1:
        shortest = min((t.seconds for t in found), default=spent)
        if spent + sum(t.seconds for t in found) + shortest > box:
            break
        found.append(time_step(step, device, clock))
    return found


def _median(times: Sequence[Timing]) -> Timing:
    walls, used = zip(*times, strict=True)
    return Timing(statistics.median(walls), statistics.median(used))
