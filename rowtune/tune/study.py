"""The search: Optuna proposes knob values, prediction rejects, the worker measures, the records remember.

A plan's cost does not depend on the budget, only whether it fits does. So records hold costs, and a study
is built anew from them at every start: another budget or a resumed search needs no trial twice.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import optuna

from rowtune.errors import RowtuneError
from rowtune.plan.plan import Plan
from rowtune.tune.finals import finals
from rowtune.tune.infeasible import infeasible
from rowtune.tune.measurement import Effort
from rowtune.tune.records import PLAIN, Record, correction, digest, front
from rowtune.tune.sizes import format_bytes, format_seconds
from rowtune.tune.task import Progress, SearchResult, Situation, Task
from rowtune.tune.telling import Pace, expected, why
from rowtune.tune.trials import Trials, objective, violation

# A plan whose first warm step takes this much longer than the best one's cannot win.
HOPELESS = 1.5
# A plan is not run if, were it as much faster than predicted as any plan so far, it would still take this
# much longer than the best one; believed once so many plans were measured.
BEHIND, BELIEVED = 1.15, 3
# Proposals per measured trial after which the space counts as exhausted.
PATIENCE = 40
# Of the plans predicted before the first trial so many are tried first, the fastest ahead.
WARM_TRIALS = 6


class Interrupted(Exception):
    """Ctrl-C before anything fitted."""


def search(task: Task) -> SearchResult:
    """Find the fastest plan within the limit.

    Raises:
        InfeasibleError: no plan fits; the message says which budget would do.
        Interrupted: Ctrl-C, with nothing to show yet (otherwise the result says `interrupted`).
        UsageError: the timeout left no time for a single plan.
    """
    run = Search(task)
    interrupted = False
    try:
        run.plain()
        task.started()
        run.explore()
        run.last_chance()
        task.ended()
        finals(run)
    except KeyboardInterrupt:
        interrupted = True
    best = run.best()
    if best is None and interrupted:
        raise Interrupted
    if best is None:
        raise infeasible(run)
    seen = list(task.records.latest().values())
    plain = task.records.plain()
    return SearchResult(
        best,
        tuple(front(run.allowed())),
        plain if plain is not None and plain.ok else None,
        tuple(seen),
        run.measured(),
        interrupted,
    )


class _Candidate(NamedTuple):
    """A setting that is predicted to fit."""

    seconds: float
    peak_bytes: int
    values: dict[str, Any]


class Search:
    """One search in progress."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.began = time.monotonic()
        self.fitting: dict[str, _Candidate] = {}
        self.inherited, self.heard = set(task.inherited), set[str]()
        self._may: dict[str, bool] = {}
        self._pace = Pace()
        self.trials = Trials(task.space.knobs, task.seed, task.shared)

    def _warm_up(self) -> None:
        """Tell the space what there is; then the study: earlier trials as they would have ended under this
        budget, and the guesses not yet tried."""
        own = list(self.task.records.latest().values())
        self._hear()
        self.say(None, "planning")
        self._report()
        for record in own:
            new = self._current(record) and record.digest not in self.heard
            if new and self.trials.usable(record.values):
                inherited = record.digest in self.inherited
                self.trials.add(record, *self._ending(record), inherited)
        for guess in self._warm_start():
            self.trials.enqueue(guess)

    def _hear(self) -> None:
        """Take in what other processes measured."""
        for record, inherited in () if self.task.shared is None else self.task.shared.news():
            self.heard.add(record.digest)
            known = self.task.records.latest().get(record.digest)
            if record.digest == PLAIN:
                known = self.task.records.plain()
            if known is None or (known.effort == "quick" and known != record):
                self.task.records.append(record)
                if inherited:
                    self.inherited.add(record.digest)

    def remember(self, record: Record, trial: optuna.Trial | None = None) -> None:
        """Keep a record, for other processes, too."""
        self.task.records.append(record)
        if self.task.shared is not None and trial is not None:
            self.task.shared.publish(trial, record)
        elif self.task.shared is not None:
            self.task.shared.announce(record)

    def _warm_start(self) -> list[dict[str, Any]]:
        """Settings that earlier runs left unmeasured and the space's guesses: those predicted to fit first,
        the fastest of them ahead. Prediction costs a thousandth of a trial."""
        earlier = [r.values for r in self.task.records.latest().values() if not self._current(r)]
        guesses = [dict(g) for g in (*earlier, *self.task.space.guesses()) if self.trials.usable(g)]
        for values in guesses:
            with contextlib.suppress(Exception):  # such a plan fails again, and is recorded, when it is tried
                plan = self.task.space.plan(values)
                cost = self.task.predict(plan)
                if cost.peak_bytes <= self._most():
                    candidate = _Candidate(cost.seconds, cost.peak_bytes, values)
                    self.fitting.setdefault(digest(plan), candidate)
        ranked = sorted(self.fitting.values(), key=lambda c: c.seconds)
        best = [c.values for c in ranked[:WARM_TRIALS]]
        return best + [g for g in guesses if g not in best]

    def _current(self, record: Record) -> bool:
        """A plan rejected under a smaller budget may be worth running under this one, and one that could not
        win against a plan that fitted a larger one."""
        if record.status == "slow":
            best = self.best()
            return best is not None and (best.step_seconds or 0.0) < (record.step_seconds or 0.0)
        if record.status == "oom":
            return record.limit >= self.task.limit
        if record.ok and record.alloc_retries is not None and (record.peak_bytes or 0) > self.task.limit:
            # What CUDA's allocator reserves depends on what it may; what it gave out does not.
            return (record.allocator_peak_bytes or 0) + self.overhead > self.task.limit
        return record.status != "rejected" or record.predicted_bytes is None or bool(self._why_not(record))

    def _why_not(self, record: Record) -> str:
        """Why a plan is not worth running, by its prediction; empty if it is."""
        if (record.predicted_bytes or 0) > self._most():
            return f"predicted {format_bytes(record.predicted_bytes)}, over the budget"
        measured = [r for r in self.task.records.latest().values() if r.ok and r.predicted_seconds]
        best = self.best()
        if best is None or len(measured) < BELIEVED:
            return ""
        ratio = min((r.step_seconds or 0.0) / (r.predicted_seconds or 1.0) for r in measured)
        expected = ratio * (record.predicted_seconds or 0.0)
        behind = expected > BEHIND * (best.step_seconds or math.inf)
        return f"predicted {format_seconds(expected)} a step, which cannot win" if behind else ""

    def left(self) -> float:
        return self.task.timeout - (time.monotonic() - self.began)

    def measured(self) -> int:
        """Plans measured in this study; what it took over from another one is not counted."""
        seen = self.task.records.latest().values()
        return sum(r.status != "rejected" and r.digest not in self.inherited for r in seen)

    def best(self) -> Record | None:
        return min(self.feasible(), key=lambda r: r.step_seconds or math.inf, default=None)

    def feasible(self) -> list[Record]:
        return [r for r in self.allowed() if r.ok and (r.peak_bytes or 0) <= self.task.limit]

    def allowed(self) -> list[Record]:
        """Earlier searches of the study may have used what this one may not."""
        seen = [r for r in self.task.records.latest().values() if r.decisions]
        for r in seen:
            if r.digest not in self._may:
                self._may[r.digest] = self.task.may(Plan.from_dict(dict(r.decisions or {})))
        return [r for r in seen if self._may[r.digest]]

    def plain(self) -> None:
        """Measure plain PyTorch once a study: the yardstick, where the machine can hold it."""
        self._hear()
        if self.task.records.plain() is not None or self.left() <= 0:
            return
        self.say(None, "plain PyTorch")
        record = self._measure(None, Record(PLAIN, "ok"), "quick")
        if record is not None:
            self.remember(record)
            self.say(record)

    def explore(self) -> None:
        """Ask, reject or measure, tell, until trials, time or the space run out."""
        if self.measured() < self.task.trials and self.left() > 0:
            self._warm_up()
        idle = 0
        while self.measured() < self.task.trials and self.left() > 0 and idle < PATIENCE:
            if self.measured() > 1 and self.best() is None:
                self._try_smallest()
            trial = self.trials.ask()
            record, new = self._end_of(trial)
            if record is None:
                self.trials.drop(trial)
            elif new:
                self.remember(record, trial)
            if record is not None:
                self.trials.tell(trial, *self._ending(record))
            if record is None or not new:
                idle += 1
                if idle % 3 == 0:  # TPE repeats itself; after a few repeats a random plan is tried instead
                    self.trials.shake()
            else:
                idle = idle + 1 if record.status == "rejected" else 0
                self.say(record)
            self._hear()
            if new and record is not None and record.status != "rejected" and self._report():
                self._reconsider()

    def _end_of(self, trial: optuna.Trial) -> tuple[Record | None, bool]:
        """How a proposal ends, and whether that is news; None where it was not run: another process does, or
        time ran out in the middle of it."""
        values = dict(trial.params)
        plan = self.task.space.plan(values)
        seen = self.task.records.latest().get(digest(plan))
        if seen is not None and self._current(seen):
            return seen, False
        if self.task.shared is not None and not self.task.shared.claim(trial, digest(plan)):
            return None, False
        record = self._try(plan, values)
        return record, record is not None and record.digest == digest(plan)  # or one that runs alike

    def _report(self) -> bool:
        """Tell the space how far the search is; whether settings may stand for other plans now."""
        seen = list(self.task.records.latest().values())
        plain = self.task.records.plain()
        plain = plain if plain is not None and plain.ok else None
        return self.task.tell(Situation(self._most(), plain, seen, self.left()))

    def _reconsider(self) -> None:
        """Settings that were measured may stand for other plans by now: the one that is predicted to be the
        fastest is asked for again."""
        seen = self.task.records.latest()
        found: list[_Candidate] = []
        for record in list(seen.values()):
            if record.ok and self.trials.usable(record.values):
                plan = self.task.space.plan(dict(record.values))
                if digest(plan) not in seen:
                    with contextlib.suppress(RowtuneError):
                        cost = self.task.predict(plan)
                        found.append(_Candidate(cost.seconds, cost.peak_bytes, dict(record.values)))
        fitting = [one for one in found if one.peak_bytes <= self._most()]
        if fitting:
            self.trials.again(min(fitting, key=lambda one: one.seconds).values)

    def _try_smallest(self) -> None:
        """Nothing has fitted yet: what is predicted to be smallest."""
        candidate = min(self.fitting.values(), key=lambda c: c.peak_bytes, default=None)
        if candidate is None:
            return
        plan = self.task.space.plan(candidate.values)
        seen = self.task.records.latest().get(digest(plan))
        if seen is None or not self._current(seen):
            record = self._try(plan, candidate.values)
            if record is not None and record.digest == digest(plan):
                self.remember(record)
                self.say(record)

    def last_chance(self) -> None:
        """Before it is said that nothing fits, the plan that is predicted to take least is tried, though time
        may be up: it says most about what does."""
        if self.task.least is None or self.best() is not None:
            return
        plan = self.task.least()
        seen = self.task.records.latest().get(digest(plan))
        if seen is not None and self._current(seen):
            return
        record = self._try(plan, {}, self.trial_timeout())
        if record is not None and record.digest == digest(plan):
            self.remember(record)
            self.say(record)

    def _try(self, plan: Plan, values: dict[str, Any], box: float = 0.0) -> Record | None:
        """The record of a plan not seen before, or of one whose program runs alike; None where time ran out
        in the middle of it, that of the search, or `box` where that is more."""
        record = Record(
            digest(plan), "rejected", values=values, decisions=plan.to_dict(), limit=self.task.limit
        )
        try:
            cost = self.task.predict(plan)
        except RowtuneError as error:
            return replace(record, reason=str(error))
        except Exception as error:  # one plan that cannot be predicted must not cost the search
            return replace(record, status="crash", reason=f"prediction: {type(error).__name__}: {error}")
        record = replace(
            record,
            predicted_bytes=cost.peak_bytes,
            predicted_seconds=cost.seconds,
            peak_at=cost.peak_at,
            program=cost.program,
        )
        twin = self._twin(cost.program)
        if twin is not None:
            return twin
        if why_not := self._why_not(record):
            return replace(record, reason=why_not)
        self._pace.begin(self.measured())
        self.say(None, expected(cost.peak_bytes, cost.seconds), plan, why(values, self.task.space.knobs))
        return self._measure(plan, record, "quick", box)

    def _twin(self, program: str) -> Record | None:
        """What was measured of the same program under another plan."""
        seen = self.task.records.latest().values()
        return next((r for r in seen if r.program == program != "" and self._current(r)), None)

    def _measure(self, plan: Plan | None, record: Record, effort: Effort, box: float = 0.0) -> Record | None:
        start = time.monotonic()
        allowed = min(self.trial_timeout(), max(self.left(), box))
        if allowed <= 0:  # predicting took the rest of the time
            return None
        best = self.best()
        worth = HOPELESS * (best.step_seconds or math.inf) if best and plan else math.inf
        result = self.task.measure(plan, effort, allowed, worth)
        if result.status == "timeout" and self.left() <= 0 and not box:
            return None  # the search's own end is no verdict on the plan
        return replace(record, **result.to_dict(), effort=effort, seconds=round(time.monotonic() - start, 3))

    def trial_timeout(self) -> float:
        """Where plain's time is known, a plan forty times slower is no answer."""
        plain = self.task.records.plain()
        if plain is None or plain.step_seconds is None:
            return self.task.trial_timeout
        return min(self.task.trial_timeout, max(60.0, 400 * plain.step_seconds))

    def correction(self) -> float:
        """Measured over predicted peak, as seen so far."""
        return correction([*self.task.records.latest().values()], self.overhead)

    @cached_property
    def overhead(self) -> int:
        return self.task.overhead()

    def _most(self) -> float:
        """The largest predicted peak that is expected to fit."""
        return (self.task.limit - self.overhead) / self.correction()

    def _ending(self, record: Record) -> tuple[float, float]:
        """What Optuna is told of it."""
        seen = self.task.records.records
        return objective(record, seen), violation(record, self.task.limit, self.overhead)

    def say(self, record: Record | None, running: str = "", plan: Plan | None = None, why: str = "") -> None:
        """A trial ended, or something begins to run: a plan, and why it."""
        seconds, measured, trials = time.monotonic() - self.began, self.measured(), self.task.trials
        plain, points = self.task.records.plain(), tuple(front(self.allowed()))
        left = self._pace.left(measured, trials, self.left())
        decisions = None if plan is None else plan.to_dict()
        self.task.progress(
            Progress(
                measured, trials, seconds, record, self.best(), running, points, plain, decisions, why, left
            )
        )
