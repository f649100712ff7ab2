"""The Optuna study behind a search: what it proposes, and how proposals ended. In memory, or shared."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from rowtune.tune.knobs import usable
from rowtune.tune.records import Record
from rowtune.tune.shared import Shared, as_attribute


class Trials:
    """One study over a space's knobs.

    Args:
        knobs: each with a name and choices.
        seed: of what is proposed; in a study that several processes share, of their own random settings only.
        shared: where they share it.
    """

    def __init__(self, knobs: Sequence[Any], seed: int, shared: Shared | None = None) -> None:
        self.knobs = knobs
        self.choices: dict[str, Any] = {
            knob.name: optuna.distributions.CategoricalDistribution(tuple(knob.choices)) for knob in knobs
        }
        self.random = random.Random(seed)
        self.shared = shared
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if shared is None:
            sampler = optuna.samplers.TPESampler(seed=seed)
            self.study = optuna.create_study(direction="minimize", sampler=sampler)
        else:
            self.study = shared.study  # whose sampler draws anew in each process

    def usable(self, values: Mapping[str, Any]) -> bool:
        """Whether these are a setting of this space, not of an older one."""
        return usable(self.knobs, values)

    def ask(self) -> optuna.Trial:
        return self.study.ask(self.choices)

    def enqueue(self, values: Mapping[str, Any]) -> None:
        """To be asked for next, unless it was."""
        self.study.enqueue_trial(dict(values), skip_if_exists=True)

    def again(self, values: Mapping[str, Any]) -> None:
        """To be asked for next, though it was before."""
        self.study.enqueue_trial(dict(values))

    def shake(self) -> None:
        """Ask for a random setting next."""
        values = {name: self.random.choice(d.choices) for name, d in self.choices.items()}
        self.study.enqueue_trial(values)

    def add(self, record: Record, value: float, violation: float, inherited: bool) -> None:
        """A plan that was measured before there was a study; `inherited`: in another one."""
        known: dict[str, Any] = {} if self.shared is None else dict(as_attribute(record))
        if known and inherited:
            known["inherited"] = True
        self.study.add_trial(
            optuna.trial.create_trial(
                params=dict(record.values),
                distributions=dict(self.choices),
                value=value,
                constraints={"budget": violation},
                user_attrs=known,
            )
        )

    def tell(self, trial: optuna.Trial, value: float, violation: float) -> None:
        trial.set_constraint("budget", violation)
        self.study.tell(trial, value)

    def drop(self, trial: optuna.Trial) -> None:
        """It was not run: another process runs it, or this one's time is up."""
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)


def objective(record: Record, seen: Sequence[Record]) -> float:
    """Seconds a step; a plan without a time counts as twice the slowest seen."""
    if record.step_seconds is not None:
        return record.step_seconds
    return 2 * max((r.step_seconds or 0 for r in seen if r.ok), default=1.0)


def violation(record: Record, limit: int, overhead: int) -> float:
    """Above zero where the plan does not fit, as a share of the budget; failures count as far over."""
    size = record.peak_bytes if record.ok else record.predicted_bytes
    size = size if record.ok else (size or 0) + overhead
    over = (size or 0) / limit - 1
    if record.status == "slow":
        return over
    return over if record.ok else max(over, 0.5 if record.status in ("oom", "rejected") else 1.0)
