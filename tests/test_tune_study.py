"""The search, on a space whose costs are arithmetic: no model, no worker, no clock."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rowtune.errors import InfeasibleError, ModelError, UsageError
from rowtune.plan.plan import Plan, Segment
from rowtune.tune.infeasible import round_up
from rowtune.tune.measurement import Contender, Measurement, Timing
from rowtune.tune.records import RecordFile, digest
from rowtune.tune.sizes import parse_size
from rowtune.tune.study import Interrupted, search
from rowtune.tune.task import Progress, SearchResult, Situation, Task

BANDS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Knob:
    name: str
    choices: tuple[Any, ...]


class Space:
    """Two rows segments: their bands decide memory (grows) and time (falls)."""

    knobs = (Knob("a", BANDS), Knob("b", BANDS), Knob("halo", ("sweep", "cache")))

    def plan(self, values: dict[str, Any]) -> Plan:
        return Plan(
            (
                Segment("x", "y", "rows", values["a"], values["halo"]),
                Segment("z", "w", "rows", values["b"], values["halo"]),
            )
        )

    def guesses(self) -> list[dict[str, Any]]:
        return [{"a": 128, "b": 128, "halo": "sweep"}, {"a": 1, "b": 1, "halo": "sweep"}]


def true_peak(plan: Plan) -> int:
    a, b = (s.band_rows for s in plan.segments)
    return 1000 * (10 + max(a, 2 * b)) + (500 if plan.segments[0].halo == "cache" else 0)


def true_seconds(plan: Plan) -> float:
    a, b = (s.band_rows for s in plan.segments)
    return 1.0 + 2.0 / a + 4.0 / b


@dataclass(frozen=True)
class Cost:
    peak_bytes: int
    seconds: float
    peak_at: str = "conv7"
    program: str = ""


class Bench:
    """Counts what it is asked; `fail` turns some plans into failures."""

    def __init__(self, fail: Callable[[Plan, int], Measurement | None] = lambda plan, n: None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.fail = fail

    def __call__(
        self, plan: Plan | None, effort: str, timeout: float, worth: float = math.inf
    ) -> Measurement:
        if plan is None:
            self.asked.append(("plain", effort))
            return Measurement("ok", "", 500_000, 400_000, None, 0.9)
        self.asked.append((digest(plan), effort))
        failed = self.fail(plan, len(self.asked))
        return failed or Measurement("ok", "", true_peak(plan), 10, None, true_seconds(plan), 1e-6)

    def runs(self, effort: str) -> list[str]:
        return [name for name, how in self.asked if how == effort and name != "plain"]


def task(bench: Bench, limit: int = 50_000, path: Path | None = None, **changes: Any) -> Task:
    made = Task(
        space=Space(),
        predict=lambda plan: Cost(true_peak(plan), 1.0),
        measure=bench,
        records=RecordFile(path, {"study": 1}),
        limit=limit,
        trials=25,
    )
    return replace(made, **changes)


def optimum(limit: int) -> float:
    plans = [
        Space().plan({"a": a, "b": b, "halo": halo})
        for a in BANDS
        for b in BANDS
        for halo in ("sweep", "cache")
    ]
    return min(true_seconds(p) for p in plans if true_peak(p) <= limit)


def test_it_finds_a_plan_close_to_the_best_that_fits() -> None:
    bench = Bench()
    result = search(task(bench))
    assert result.best.peak_bytes is not None and result.best.peak_bytes <= 50_000
    assert (result.best.step_seconds or math.inf) <= 1.1 * optimum(50_000)
    assert result.plain is not None and result.plain.step_seconds == 0.9


def test_no_plan_is_measured_twice_and_the_winner_once_more() -> None:
    bench = Bench()
    result = search(task(bench))
    quick = bench.runs("quick")
    assert len(quick) == len(set(quick)) == result.measured == 25
    assert bench.runs("full") == [result.best.digest] and result.best.effort == "full"
    assert bench.asked[0] == ("plain", "quick") and bench.asked.count(("plain", "quick")) == 1


def test_plans_that_run_alike_are_measured_once() -> None:
    """Nothing but the larger band decides what runs."""

    def predict(plan: Plan) -> Cost:
        bands = sorted(s.band_rows for s in plan.segments)
        return Cost(true_peak(plan), true_seconds(plan), program=str(bands))

    bench = Bench()
    result = search(task(bench, predict=predict, trials=60, limit=500_000))
    measured = [Plan.from_dict(dict(r.decisions or {})) for r in result.records if r.ok]
    programs = [tuple(sorted(s.band_rows for s in plan.segments)) for plan in measured]
    assert len(programs) == len(set(programs)) > 8


def test_what_is_predicted_far_over_the_budget_is_recorded_and_not_run() -> None:
    bench = Bench()
    result = search(task(bench))
    rejected = [r for r in result.records if r.status == "rejected"]
    assert rejected and all(r.peak_bytes is None and r.reason for r in rejected)
    assert not {r.digest for r in rejected} & set(bench.runs("quick"))
    assert all((r.predicted_bytes or 0) > 50_000 for r in rejected)


def test_what_is_predicted_to_be_far_behind_is_not_run(tmp_path: Path) -> None:
    """Times are predicted half as long as they are: what counts is how they compare."""
    half = lambda plan: Cost(true_peak(plan), true_seconds(plan) / 2)  # noqa: E731
    path, bench = tmp_path / "r.jsonl", Bench()
    result = search(task(bench, predict=half, path=path, limit=150_000))
    behind = [r for r in result.records if "cannot win" in r.reason]
    assert behind and not {r.digest for r in behind} & set(bench.runs("quick"))
    best = result.best.step_seconds or 0.0
    assert all(2 * (r.predicted_seconds or 0.0) > 1.15 * best for r in behind)
    assert best <= 1.02 * optimum(150_000)
    # Under a smaller budget, where nothing is faster, they are worth running.
    again = Bench()
    tight = search(task(again, predict=half, path=path, limit=13_000, trials=60))
    assert tight.best.ok and {r.digest for r in behind} & set(again.runs("quick"))


def test_the_space_is_told_how_far_the_search_is() -> None:
    told: list[Situation] = []
    search(task(Bench(), tell=told.append, trials=5, overhead=lambda: 10_000))
    assert told[0].most == 40_000 and not told[0].records
    assert told[0].plain is not None and told[0].plain.step_seconds == 0.9
    measured = [len([r for r in now.records if r.status == "ok"]) for now in told]
    assert measured == sorted(measured) and measured[-1] == 5


class Growing(Space):
    """Bands are 16 rows at most, until a measurement was heard of."""

    knobs = (Knob("halo", ("sweep", "cache")),)

    def __init__(self) -> None:
        self.most = 16

    def plan(self, values: dict[str, Any]) -> Plan:
        return Space.plan(self, {"a": self.most, "b": self.most, "halo": values["halo"]})

    def guesses(self) -> list[dict[str, Any]]:
        return [{"halo": "sweep"}]

    def tell(self, now: Situation) -> bool:
        self.most = 16 << min(len([r for r in now.records if r.ok]), 2)
        return True


def test_settings_are_asked_for_again_once_they_stand_for_other_plans() -> None:
    space, bench = Growing(), Bench()
    result = search(task(bench, space=space, tell=space.tell, limit=500_000, trials=3))
    bands = [Plan.from_dict(dict(r.decisions or {})).segments[0].band_rows for r in result.records if r.ok]
    assert bands == [16, 32, 64]


def test_the_same_seed_tries_the_same_plans() -> None:
    first, again = Bench(), Bench()
    search(task(first, seed=5))
    search(task(again, seed=5))
    assert first.asked == again.asked


def test_a_finished_study_is_replayed_without_running_anything(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    before = search(task(Bench(), path=path))
    bench = Bench()
    after = search(task(bench, path=path))
    assert bench.asked == [] and after.best == before.best and after.front == before.front


def test_a_resumed_study_measures_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    search(task(Bench(), path=path, trials=10))
    bench = Bench()
    result = search(task(bench, path=path, trials=16))
    assert len(bench.runs("quick")) == 6 and result.measured == 16
    assert ("plain", "quick") not in bench.asked


def test_another_budget_reuses_measurements_and_never_returns_one_over_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    wide = search(task(Bench(), limit=150_000, path=path))
    bench = Bench()
    tight = search(task(bench, limit=20_000, path=path, trials=40))
    assert (tight.best.peak_bytes or 0) <= 20_000 < (wide.best.peak_bytes or 0)
    assert not set(bench.runs("quick")) & {r.digest for r in wide.records if r.ok}
    # ... and what the tight budget rejected is open again under a wide one.
    wider = Bench()
    result = search(task(wider, limit=150_000, path=path, trials=60))
    rejected = {r.digest for r in tight.records if r.status == "rejected"}
    assert rejected & set(wider.runs("quick")) and (result.best.step_seconds or 9) <= (
        wide.best.step_seconds or 0
    )


def test_failures_are_recorded_and_never_win() -> None:
    def fail(plan: Plan, n: int) -> Measurement | None:
        kinds = {0: "oom", 1: "crash", 2: "timeout", 3: "wrong"}
        return Measurement(kinds[n % 6], "because") if n % 6 in kinds else None  # type: ignore[arg-type]

    result = search(task(Bench(fail)))
    assert {"oom", "crash", "timeout", "wrong", "ok"} <= {r.status for r in result.records}
    assert result.best.ok and all(
        r.reason == "because" for r in result.records if r.status in ("oom", "wrong")
    )


def test_a_winner_that_fails_its_second_measurement_is_not_the_answer() -> None:
    fastest: list[str] = []

    class Fickle(Bench):
        def __call__(
            self, plan: Plan | None, effort: str, timeout: float, worth: float = math.inf
        ) -> Measurement:
            made = super().__call__(plan, effort, timeout, worth)
            if effort == "full" and not fastest:
                fastest.append(self.asked[-1][0])
                return replace(made, peak_bytes=60_000)
            return made

    result = search(task(Fickle()))
    assert fastest and result.best.digest != fastest[0] and (result.best.peak_bytes or 0) <= 50_000


def test_a_plan_that_cannot_be_predicted_costs_only_itself() -> None:
    def predict(plan: Plan) -> Cost:
        if plan.segments[0].band_rows == 4:
            raise KeyError("relu_12")
        return Cost(true_peak(plan), true_seconds(plan))

    result = search(task(Bench(), predict=predict, trials=40))
    crashed = [r for r in result.records if r.status == "crash"]
    assert crashed and all("relu_12" in r.reason for r in crashed) and result.best.ok


def test_nothing_fits_names_the_least_budget_and_the_tensor() -> None:
    with pytest.raises(InfeasibleError, match=r"conv7.*--budget 12\.2kB"):
        search(task(Bench(), limit=5_000))


def test_the_budget_advised_works_with_the_same_records(tmp_path: Path) -> None:
    """The plan that the advice is about was rejected, and no guess finds it again."""

    class Blind(Space):
        def guesses(self) -> list[dict[str, Any]]:
            return []

    path = tmp_path / "r.jsonl"
    with pytest.raises(InfeasibleError) as refused:
        search(task(Bench(), limit=5_000, path=path, trials=2, space=Blind(), seed=3))
    advised = parse_size(str(refused.value).partition("--budget ")[2].partition(" ")[0])
    result = search(task(Bench(), limit=advised, path=path, trials=2, space=Blind(), seed=4))
    assert (result.best.peak_bytes or 0) <= advised


def test_the_advice_is_corrected_and_keeps_the_reserve() -> None:
    """Measured is a fifth more than predicted: a budget by the bare prediction would fail again."""
    low = lambda plan: Cost(int(true_peak(plan) / 1.2), true_seconds(plan))  # noqa: E731
    with pytest.raises(InfeasibleError) as refused:
        search(task(Bench(), limit=11_000, reserve=5_000, predict=low, trials=3))
    advised = parse_size(str(refused.value).partition("--budget ")[2].partition(" ")[0])
    assert 12_000 + 5_000 <= advised < 12_500 + 5_000


def test_out_of_memory_under_one_budget_is_open_under_a_larger(tmp_path: Path) -> None:
    def cramped(plan: Plan, n: int) -> Measurement | None:
        return Measurement("oom", "CUDA out of memory")

    path = tmp_path / "r.jsonl"
    with pytest.raises(InfeasibleError):
        search(task(Bench(cramped), limit=20_000, path=path, trials=3))
    again = Bench()
    result = search(task(again, limit=40_000, path=path, trials=8))
    before = [json.loads(line)["digest"] for line in path.read_text().splitlines()[1:] if '"oom"' in line]
    assert result.best.ok and set(before) & set(again.runs("quick"))


def test_what_the_allocator_reserved_under_a_wide_cap_is_no_verdict_under_a_tight_one(tmp_path: Path) -> None:
    class Greedy(Bench):
        reserve = 100_000

        def __call__(self, plan: Plan | None, effort: str, timeout: float, worth: float) -> Measurement:
            made = super().__call__(plan, effort, timeout, worth)
            peak = made.peak_bytes or 0
            return replace(made, peak_bytes=peak + self.reserve, allocator_peak_bytes=peak, alloc_retries=0)

    path = tmp_path / "r.jsonl"
    wide = search(task(Greedy(), limit=500_000, path=path, trials=10))
    assert (wide.best.peak_bytes or 0) > 50_000
    tight = Greedy()
    tight.reserve = 0
    result = search(task(tight, limit=50_000, path=path, trials=20))
    known = {r.digest for r in wide.records if r.ok and (r.allocator_peak_bytes or 0) <= 50_000}
    assert (result.best.peak_bytes or 0) <= 50_000 and known & set(tight.runs("quick"))


def test_no_trial_goes_to_a_plan_predicted_over_the_budget() -> None:
    result = search(task(Bench(), limit=20_000))
    assert all(true_peak(Plan.from_dict(dict(r.decisions or {}))) <= 20_000 for r in result.records if r.ok)


def test_where_nothing_fitted_yet_the_smallest_is_tried() -> None:
    """Predictions are a fifth too low: what they call the fastest that fit do not."""
    low = lambda plan: Cost(int(true_peak(plan) / 1.2), true_seconds(plan))  # noqa: E731
    result = search(task(Bench(), limit=14_000, predict=low, trials=3))
    assert (result.best.peak_bytes or 0) <= 14_000


def test_what_a_device_takes_beside_tensors_is_added_to_predictions() -> None:
    """A context of 30 kB: measured is predicted and that."""

    class Card(Bench):
        def __call__(self, plan: Plan | None, effort: str, timeout: float, worth: float) -> Measurement:
            made = super().__call__(plan, effort, timeout, worth)
            return replace(made, peak_bytes=(made.peak_bytes or 0) + 30_000)

    result = search(task(Card(), limit=50_000, overhead=lambda: 30_000))
    assert (result.best.peak_bytes or 0) <= 50_000
    assert (result.best.step_seconds or math.inf) <= 1.1 * optimum(20_000)
    with pytest.raises(InfeasibleError, match=r"--budget 42\.5kB"):
        search(task(Card(), limit=31_000, overhead=lambda: 30_000))


def test_a_trial_is_told_what_it_has_to_beat_and_a_hopeless_one_is_kept_for_smaller_budgets(
    tmp_path: Path,
) -> None:
    worths: list[float] = []

    class Strict(Bench):
        def __call__(self, plan: Plan | None, effort: str, timeout: float, worth: float) -> Measurement:
            worths.append(worth)
            made = super().__call__(plan, effort, timeout, worth)
            if (made.step_seconds or 0) > worth:
                return Measurement("slow", "cannot win", step_seconds=made.step_seconds)
            return made

    path = tmp_path / "r.jsonl"
    result = search(task(Strict(), limit=500_000, path=path, trials=12))
    slow = {r.digest for r in result.records if r.status == "slow"}
    assert worths[0] == math.inf and min(worths) < math.inf and slow
    assert all(r.peak_bytes is None for r in result.records if r.status == "slow")
    again = Strict()
    tight = search(task(again, limit=12_100, path=path, trials=60))
    assert tight.best.ok and slow & set(again.runs("quick"))


def test_finalists_and_plain_take_turns_and_the_race_decides() -> None:
    """Busy for a while, the machine made the best plan look slow; in turns it is fast again."""
    asked: list[list[Contender]] = []

    def race(contenders: Sequence[Contender], rounds: int, timeout: float) -> list[Timing | None]:
        asked.append(list(contenders))
        assert 1 <= rounds <= 7
        times = [
            0.4 if c.plan is None else true_seconds(c.plan) / (2 if c.threads else 1) for c in contenders
        ]
        return [Timing(t, t) for t in times]

    def busy(plan: Plan, n: int) -> Measurement | None:
        slow = 1.2 if plan.segments[0].band_rows == 32 else 1.0
        return Measurement("ok", "", true_peak(plan), 10, None, slow * true_seconds(plan), 1e-6)

    result = search(task(Bench(busy), race=race, threads=(1,)))
    (contenders,) = asked
    assert contenders[-2].plan is None and contenders[-1].threads == 1 and len(contenders) <= 5
    assert result.plain is not None and result.plain.step_seconds == 0.4
    best = Plan.from_dict(dict(result.best.decisions or {}))
    assert result.best.effort == "full" and result.best.threads == 1
    assert result.best.step_seconds == true_seconds(best) / 2


def test_nothing_runs_says_why() -> None:
    broken = Bench(lambda plan, n: Measurement("crash", "SIGSEGV in conv7"))
    with pytest.raises(InfeasibleError, match="SIGSEGV in conv7"):
        search(task(broken, trials=5))

    class Hopeless(Bench):
        def __call__(
            self, plan: Plan | None, effort: str, timeout: float, worth: float = math.inf
        ) -> Measurement:
            return Measurement("crash", "ValueError in forward")

    with pytest.raises(ModelError, match="ValueError in forward"):
        search(task(Hopeless(), trials=5))


def test_a_space_smaller_than_the_trials_ends() -> None:
    class Tiny(Space):
        knobs = (Knob("a", (4, 8)), Knob("b", (4,)), Knob("halo", ("sweep",)))

        def guesses(self) -> list[dict[str, Any]]:
            return [{"a": 128, "b": 1, "halo": "sweep"}]  # not a choice: ignored

    assert search(task(Bench(), space=Tiny())).measured == 2


def interrupt_at(count: int) -> Callable[[Plan, int], Measurement | None]:
    def fail(plan: Plan, n: int) -> Measurement | None:
        if n == count:
            raise KeyboardInterrupt
        return None

    return fail


def test_an_interrupt_keeps_the_best_so_far(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    result = search(task(Bench(interrupt_at(8)), path=path))
    assert result.interrupted and result.measured == 6 and result.best.ok
    resumed = search(task(Bench(), path=path))
    assert not resumed.interrupted and resumed.measured == 25


def test_an_interrupt_before_anything_fits() -> None:
    with pytest.raises(Interrupted):
        search(task(Bench(interrupt_at(2))))


def test_no_time_at_all_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--timeout"):
        search(task(Bench(), timeout=0.0))


def test_a_trial_cut_off_by_the_end_of_the_search_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("rowtune.tune.study.time.monotonic", lambda: clock[0])

    class Slow(Bench):
        def __call__(
            self, plan: Plan | None, effort: str, timeout: float, worth: float = math.inf
        ) -> Measurement:
            made = super().__call__(plan, effort, timeout, worth)
            if effort == "quick" and timeout < 10:
                clock[0] += timeout
                return Measurement("timeout", "stopped")
            clock[0] += 10
            return made

    result: SearchResult = search(task(Slow(), timeout=45))
    assert result.measured == 3 and {r.status for r in result.records} <= {"ok", "rejected"}


def test_progress_counts_and_shows_the_best() -> None:
    seen: list[Progress] = []
    search(task(Bench(), progress=seen.append))
    done = [p for p in seen if p.record is not None]
    assert [p.measured for p in done] == sorted(p.measured for p in done) and done[-1].best is not None
    times = [p.best.step_seconds or 0 for p in done if p.best]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    ("size", "text"), [(12_000, "12.2kB"), (5, "6B"), (999, "1.01kB"), (8_000_000_000, "8.08GB")]
)
def test_the_budget_advised_is_enough(size: int, text: str) -> None:
    assert round_up(size) == text and parse_size(text) >= size
