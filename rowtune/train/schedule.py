"""The learning rate as a function of the step: torch's LambdaLR around a closed form, so that a run that is
resumed takes the very rates that it would have taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from rowtune.errors import UsageError

Factor = Callable[[int], float]

_OPTIONS: dict[str, dict[str, float]] = {
    "constant": {},
    "cosine": {"floor": 0.0},
    "step": {"every": 0.0, "gamma": 0.1},
}


@dataclass(frozen=True)
class Schedule:
    """A schedule by name and options, as `step:every=1000,gamma=0.5`, behind `warmup` steps."""

    name: str
    options: tuple[tuple[str, float], ...]
    warmup: int = 0

    def factor(self, steps: int | None) -> Factor:
        """What the optimizer's rate is multiplied by at a step (0 is the first) of a run of `steps`.

        Warm-up rises in a line and reaches 1 at the step after it; what follows begins there.

        Raises:
            UsageError: the schedule's length follows from the run's, and that is not known.
        """
        options = dict(self.options)
        after = None if steps is None else max(1, steps - self.warmup)
        if after is None and (self.name == "cosine" or (self.name == "step" and not options["every"])):
            raise UsageError(
                f"--schedule {self.name}: the data do not say how many batches they have; give --steps"
            )
        follow = _FACTORS[self.name](options, after or 1)

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / (self.warmup + 1)
            return follow(step - self.warmup)

        return factor

    def make(self, optimizer: torch.optim.Optimizer, steps: int | None) -> LambdaLR:
        """The scheduler, to be stepped after every optimizer step."""
        return LambdaLR(optimizer, self.factor(steps))


def _constant(options: dict[str, float], steps: int) -> Factor:
    return lambda step: 1.0


def _cosine(options: dict[str, float], steps: int) -> Factor:
    """Half a cosine from 1 to `floor`, which it would reach at the step after the last."""
    low = options["floor"]
    return lambda step: low + (1 - low) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def _step(options: dict[str, float], steps: int) -> Factor:
    every = int(options["every"]) or max(1, math.ceil(steps / 3))
    return lambda step: float(options["gamma"] ** (step // every))


_FACTORS: dict[str, Callable[[dict[str, float], int], Factor]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step": _step,
}


def parse_schedule(text: str, warmup: int = 0) -> Schedule:
    """`constant`, `cosine:floor=0.01`, `step:every=1000,gamma=0.1`; UsageError for anything else."""
    name, _, rest = text.partition(":")
    if name not in _OPTIONS:
        raise UsageError(f"--schedule is one of {', '.join(_OPTIONS)}, not {text!r}")
    if warmup < 0:
        raise UsageError(f"--warmup is a number of steps, 0 or more, not {warmup}")
    options = dict(_OPTIONS[name])
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in options:
            known = ", ".join(options) or "no options"
            raise UsageError(f"--schedule {text}: {name} takes {known}, not {item!r}")
        options[key] = _number(value, text)
    if options.get("every", 0) % 1 or not all(0 <= v < math.inf for v in options.values()):
        raise UsageError(f"--schedule {text}: every is a whole number, floor and gamma are 0 or more")
    return Schedule(name, tuple(options.items()), warmup)


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"--schedule {text}: {value!r} is not a number") from None
