"""How near to the best plan a search comes in 20 measured trials, replayed from recorded grids.

    python benchmarks/search_quality.py               five networks, three budgets, ten seeds: a minute

A grid (benchmarks/grids/, recorded by record_grid.py) is every plan of a small space with its peak, predicted
seconds and real seconds. Nothing is run: a trial's time is the grid's with 2% of noise, a finalist's with
0.7%. Contenders see predicted peaks, and never run a plan that is predicted over the budget:

    rowtune      rowtune's own search (tune/study.py): knobs take ways away, the best plan of the rest by
                 prediction is tried, measured steps correct predicted times as in tune/space.py
    predicted    the plan with the best prediction, unmeasured
    tpe          Optuna's TPE on the ways of the zones
    random       plans at random

A figure is a chosen plan's real seconds over those of the grid's best plan within the budget.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from rowtune.plan.plan import Plan
from rowtune.tune.knobs import BANDS, MARGINS, POLICIES, ZONES, Knob
from rowtune.tune.measurement import Contender, Measurement, Timing
from rowtune.tune.records import RecordFile
from rowtune.tune.space import PULL
from rowtune.tune.study import search
from rowtune.tune.task import Situation, Task

GRIDS = Path(__file__).parent / "grids"
SHARES = (0.25, 0.5, 0.75)
"""Budgets, between the smallest plan's peak and that of keeping everything, on a log scale."""
TRIALS, SEEDS, WITHIN = 20, 10, 1.03
NOISE, CARE = 0.02, 0.007
ASKS = 600
"""Proposals of TPE, those that are not run included."""


class Grid:
    """A recorded space: arrays over all plans."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.name = data["network"]
        self.ways = data["zones"]
        self.sizes = [len(w) for w in self.ways]
        self.peak = np.array(data["peak_bytes"])
        self.predicted = np.array(data["predicted_seconds"])
        self.at = np.array(np.unravel_index(range(len(self.peak)), self.sizes)).T
        more = [np.array(row) for row in data["more_seconds"]]
        self.real = data["base_seconds"] + sum(m[self.at[:, z]] for z, m in enumerate(more))
        self.plans = [self._plan(at) for at in self.at]
        self.index = {str(plan.to_dict()): i for i, plan in enumerate(self.plans)}

    def _plan(self, at: Sequence[int]) -> Plan:
        segments = [s for way, i in zip(self.ways, at, strict=True) for s in way[i]]
        return Plan.from_dict({"axis": 2, "segments": segments})

    def main(self, zone: int, way: int) -> dict[str, Any]:
        """The segment that says how most of a zone is computed."""
        segments = self.ways[zone][way]
        order = {"rows": 0, "checkpoint": 1, "keep": 2}
        return min(segments, key=lambda s: order[s["policy"]])

    def limit(self, share: float) -> int:
        low, high = float(self.peak.min()), float(self.peak[0])
        return int(low * (high / low) ** share)

    def best(self, limit: int) -> float:
        return float(self.real[self.peak <= limit].min())


@dataclass(frozen=True)
class Cost:
    peak_bytes: int
    seconds: float
    program: str
    peak_at: str = ""


class GridSpace:
    """As ProgrammeSpace, on a grid: the best plan by corrected prediction under what the knobs allow."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.most = grid, math.inf
        names = ("keep", "checkpoint", "rows")
        n = len(grid.peak)
        shares = np.zeros((n, len(names)))
        alone = grid.predicted.reshape(grid.sizes)
        for zone in range(len(grid.sizes)):  # zones take about as long when everything is kept
            others = tuple(slice(None) if z == zone else 0 for z in range(len(grid.sizes)))
            taken = alone[others] - alone.flat[0] + alone.flat[0] / len(grid.sizes)
            kind = [names.index(grid.main(zone, w)["policy"]) for w in range(grid.sizes[zone])]
            for column in range(len(names)):
                mask = np.array([k == column for k in kind])[grid.at[:, zone]]
                shares[:, column] += np.where(mask, np.maximum(taken, 0.0)[grid.at[:, zone]], 0.0)
        self.parts = shares / shares.sum(1, keepdims=True) * grid.predicted[:, None]
        self.factors = np.ones(len(names))
        zones = ZONES[: len(grid.sizes)]
        self.knobs = [Knob("margin", MARGINS), *(Knob(zone, POLICIES) for zone in zones)]
        self.knobs += [Knob("band", tuple(BANDS)), Knob("halo", ("any", "sweep", "recompute"))]
        self.knobs += [Knob("tapes", ("any", "split", "late", "replay"))]
        self.zones = zones

    def guesses(self) -> list[dict[str, str]]:
        """Those of ProgrammeSpace that a grid has."""
        all_of = {knob.name: knob.choices[0] for knob in self.knobs}
        found = [all_of | {"margin": margin} for margin in MARGINS[:3]]
        found += [all_of | {"tapes": tapes} for tapes in ("replay", "late", "split")]
        found += [all_of | {"halo": halo} for halo in ("sweep", "recompute")]
        found += [all_of | dict.fromkeys(self.zones, policy) for policy in ("rows", "checkpoint")]
        found += [all_of | {"band": band} for band in ("high", "low")]
        return found

    def plan(self, values: dict[str, Any]) -> Plan:
        may = self.grid.peak <= min(float(values["margin"]) * self.most, 1 << 60)
        for zone, name in enumerate(self.zones):
            ways = [self._may(self.grid.main(zone, w), name, values) for w in range(self.grid.sizes[zone])]
            may &= np.array(ways)[self.grid.at[:, zone]]
        if not may.any():
            return self.grid.plans[int(self.grid.peak.argmin())]
        return self.grid.plans[int(np.where(may, self.parts @ self.factors, np.inf).argmin())]

    def _may(self, main: dict[str, Any], zone: str, values: dict[str, Any]) -> bool:
        if main["policy"] != "keep" and values[zone] not in ("any", main["policy"]):
            return False
        if main["policy"] != "rows":
            return True
        halo, tapes = main.get("halo", "sweep"), main.get("tapes", "split")
        low, high = BANDS[values["band"]]
        fits = low <= main.get("band_rows", 0) < high and values["halo"] in ("any", halo)
        return fits and (halo != "sweep" or values["tapes"] in ("any", tapes))

    def predict(self, plan: Plan) -> Cost:
        i = self.grid.index[str(plan.to_dict())]
        return Cost(int(self.grid.peak[i]), float(self.parts[i] @ self.factors), str(i))

    def tell(self, now: Situation) -> None:
        """Factors by policy, as ProgrammeSpace finds them."""
        self.most = now.most
        seen = [(self.grid.index[str(r.decisions)], r.step_seconds) for r in now.records if r.ok]
        if now.plain is not None and now.plain.ok:
            seen.append((0, now.plain.step_seconds))
        shares = np.array([self.parts[i] / seconds for i, seconds in seen])
        if len(shares):
            left = shares.T @ shares + PULL * np.eye(shares.shape[1])
            right = shares.T @ np.ones(len(shares)) + PULL
            self.factors = np.clip(np.linalg.solve(left, right), 0.3, 3.0)


def searched(grid: Grid, limit: int, seed: int) -> tuple[int, int]:
    """The plan that rowtune's search chooses, and how many it measured."""
    rng, space = random.Random(seed), GridSpace(grid)

    def measure(plan: Plan | None, effort: str, timeout: float, worth: float) -> Measurement:
        i = 0 if plan is None else grid.index[str(plan.to_dict())]
        seconds = _noisy(grid, i, rng, CARE if effort == "full" else NOISE)
        if seconds > worth:
            return Measurement("slow", "cannot win", step_seconds=seconds)
        return Measurement("ok", "", int(grid.peak[i]), 0, None, seconds, 0.0)

    def race(contenders: Sequence[Contender], rounds: int, timeout: float) -> list[Timing | None]:
        at = [0 if c.plan is None else grid.index[str(c.plan.to_dict())] for c in contenders]
        return [Timing(seconds, seconds) for i in at for seconds in [_noisy(grid, i, rng, CARE)]]

    records = RecordFile(None, {})
    task = Task(
        space, space.predict, measure, records, limit, trials=TRIALS, seed=seed, tell=space.tell, race=race
    )
    result = search(task)
    return grid.index[str(result.best.decisions)], result.measured


def at_random(grid: Grid, limit: int, seed: int) -> int:
    rng = random.Random(seed)
    fitting = np.flatnonzero(grid.peak <= limit).tolist()
    tried = rng.sample(fitting, min(TRIALS, len(fitting)))
    return min(tried, key=lambda i: _noisy(grid, i, rng, NOISE))


def by_tpe(grid: Grid, limit: int, seed: int) -> int:
    rng, measured = random.Random(seed), dict[int, float]()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    ways = {
        f"zone {z}": optuna.distributions.CategoricalDistribution(range(n)) for z, n in enumerate(grid.sizes)
    }
    for _ in range(ASKS):
        trial = study.ask(ways)
        i = int(np.ravel_multi_index([trial.params[name] for name in ways], grid.sizes))
        over = float(grid.peak[i]) / limit - 1
        if over <= 0 and i not in measured:
            measured[i] = _noisy(grid, i, rng, NOISE)
        trial.set_constraint("budget", over)
        study.tell(trial, measured.get(i, 2 * max(measured.values(), default=1.0)))
        if len(measured) == TRIALS:
            break
    return min(measured, key=lambda i: measured[i]) if measured else int(grid.peak.argmin())


def by_prediction(grid: Grid, limit: int, seed: int) -> int:
    return int(np.where(grid.peak <= limit, grid.predicted, np.inf).argmin())


def _noisy(grid: Grid, i: int, rng: random.Random, noise: float) -> float:
    return float(grid.real[i]) * math.exp(rng.gauss(0.0, noise))


CONTENDERS: dict[str, Callable[[Grid, int, int], int]] = {
    "rowtune": lambda grid, limit, seed: searched(grid, limit, seed)[0],
    "predicted": by_prediction,
    "tpe": by_tpe,
    "random": at_random,
}


def load(name: str) -> Grid:
    return Grid(json.loads((GRIDS / f"{name}.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=sorted(p.stem for p in GRIDS.glob("*.json")))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    print(f"{'network':12}{'budget':>8}{'plans that fit':>16}" + "".join(f"{c:>18}" for c in CONTENDERS))
    good = dict.fromkeys(CONTENDERS, 0)
    cases = 0
    for name in given.networks:
        grid = load(name)
        for share in SHARES:
            limit, cases = grid.limit(share), cases + 1
            line = f"{name:12}{limit / grid.peak[0]:8.0%}{int((grid.peak <= limit).sum()):16}"
            for contender, choose in CONTENDERS.items():
                found = [
                    float(grid.real[choose(grid, limit, s)]) / grid.best(limit) for s in range(given.seeds)
                ]
                near = sum(ratio <= WITHIN for ratio in found)
                good[contender] += near >= 0.9 * given.seeds
                line += f"{statistics.median(found):10.3f}{near:4}/{given.seeds:<3}"
            print(line, flush=True)
    print(f"\nmedian over seeds, and seeds within {WITHIN - 1:.0%} of the best; cases with nine of ten such:")
    print("   ".join(f"{contender} {count}/{cases}" for contender, count in good.items()))


if __name__ == "__main__":
    main()
