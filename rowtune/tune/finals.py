"""The end of a search: the fastest plans and plain PyTorch take turns, and the winner is measured with care.

Times of different minutes of a busy machine cannot be compared; steps that alternate can.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rowtune.plan.plan import Plan
from rowtune.tune.measurement import Contender, Timing
from rowtune.tune.records import Record

if TYPE_CHECKING:
    from rowtune.tune.study import Search

# The winner is verified and metered again; if that changes who it is, so is the next one, so many times.
FINALS = 3
# Plans this much slower than the fastest are no rivals, and so many of them race.
RIVAL, RIVALS = 1.25, 3
# Rounds of a race: what this many seconds hold.
RACE_SECONDS, MOST_ROUNDS = 20.0, 7


def finals(search: Search) -> None:
    """Race, then verify and meter the winner, and whoever is fastest after that."""
    best = search.best()
    if best is None or best.effort == "full":
        return
    _race(search)
    for _ in range(FINALS):
        best = search.best()
        if best is None or best.effort == "full":
            return
        search.say(None, "the winner once more")
        # Past the timeout the winner still gets its check: an unverified plan is worth nothing.
        result = search.task.measure(_plan(best), "full", search.trial_timeout(), float("inf"))
        record = replace(best, **result.to_dict(), effort="full")
        if best.effort == "raced" and record.ok:
            record = replace(record, step_seconds=best.step_seconds, cpu_seconds=best.cpu_seconds)
        search.remember(record)
        search.say(record)


def _race(search: Search) -> None:
    """New step times for the fastest plans and plain, from the same minute; the best number of threads."""
    task, plain = search.task, search.task.records.plain()
    ranked = sorted(search.feasible(), key=lambda r: r.step_seconds or 0.0)
    fastest = ranked[0].step_seconds or 0.0
    racing = [r for r in ranked[:RIVALS] if (r.step_seconds or 0.0) <= RIVAL * fastest]
    racing += [plain] if plain is not None and plain.ok else []
    entries = [(record, 0) for record in racing] + [(ranked[0], threads) for threads in task.threads]
    if task.race is None or len(entries) < 2:
        return
    a_round = sum(record.step_seconds or 0.0 for record, _ in entries)
    rounds = max(1, min(MOST_ROUNDS, int(RACE_SECONDS / max(a_round, 1e-3))))
    search.say(None, f"{len(racing)} finalists in turns")
    contenders = [Contender(_plan(record), threads) for record, threads in entries]
    timings = task.race(contenders, rounds, search.trial_timeout())
    for record in racing:
        found = [(t, n) for (r, n), t in zip(entries, timings, strict=True) if r is record and t is not None]
        if found:
            timing, threads = _with_threads(found)
            search.remember(
                replace(
                    record, step_seconds=timing.seconds, cpu_seconds=timing.cpu_seconds, threads=threads,
                    effort="raced",
                )
            )  # fmt: skip


def _with_threads(found: list[tuple[Timing, int]]) -> tuple[Timing, int]:
    """The fastest; another number of threads than torch's own has to win by more than noise."""
    return min(found, key=lambda item: item[0].seconds * (1.03 if item[1] else 1.0))


def _plan(record: Record) -> Plan | None:
    return None if record.decisions is None else Plan.from_dict(dict(record.decisions))
