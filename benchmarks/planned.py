"""What the programme plans, by prediction alone: against plans by hand, and how long planning takes.

    python benchmarks/planned.py                     all cases: ten minutes
    python benchmarks/planned.py resnet50 unet

Times are those of a shipped profile, so nothing here depends on how busy the machine is but the seconds of
planning. First, for each network: the seconds until the options are recorded, those of a second search that
finds them in the cache, and those of a front of fifty budgets. Then, for each plan by hand of
benchmarks/frontier.py: its predicted memory becomes the budget; below 1 the programme's plan is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import searched

import rowtune
from rowtune.cost.predict import predict
from rowtune.cost.programme import fastest, smallest
from rowtune.importers.source import parse_source
from rowtune.tune.profiles import chosen
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.step import Workload, define
from rowtune.tune.tables import CachedTables
from rowtune.tune.task import Situation

PROFILE = chosen("epyc-1-thread")
FRONTS = {"resnet50": "8x3x224x224", "unet": "1x3x512x512", "hrnet_w18": "1x3x512x512"}
POINTS = 50


def space(work: Workload, most: float) -> ProgrammeSpace:
    made = ProgrammeSpace(
        work.graph, work.optimizer.slots, lambda calls, seconds: PROFILE, tables=CachedTables("cpu")
    )
    made.tell(Situation(most, None, (), 1e9))
    return made


def front(name: str) -> None:
    work = define(parse_source(f"zoo:{name}"), [FRONTS[name]])
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        table = space(work, float("inf")).table
        taken.append(time.perf_counter() - begun)
    low, most = smallest(table), fastest(table, 1 << 60)
    assert low is not None and most is not None
    begun = time.perf_counter()
    found = [fastest(table, int(low + (most.peak - low) * i / POINTS) + 1) for i in range(POINTS)]
    solving = time.perf_counter() - begun
    plans = len({path.options for path in found if path is not None})
    print(
        f"{name:20}{len(table.options):6} options, planned in {taken[0]:5.1f} s, again in {taken[1]:5.1f} s, "
        f"{POINTS} budgets in {solving:4.2f} s: {plans} plans",
        flush=True,
    )


def against_hand(name: str) -> list[float]:
    ratios = []
    for key, case in searched.cases([name]):
        shape, args = searched.SHAPES[key]
        work = define(parse_source(f"zoo:{case.network}", args), [shape], loss=case.loss)
        slots = work.optimizer.slots
        plain = predict(work.graph, rowtune.uniform_plan(work.graph, "keep"), slots, PROFILE)
        for title, build in case.plans.items():
            hand = predict(work.graph, build(work.graph), slots, PROFILE)
            made = space(work, hand.peak_bytes)
            ours = made.predict(made.plan(made.guesses()[0]))
            ratios.append(ours.seconds / hand.seconds)
            print(
                f"{key:16}{title:44}{hand.peak_bytes / plain.peak_bytes:6.0%} of plain's memory: "
                f"hand {hand.seconds / plain.seconds:5.2f}x, planned {ours.seconds / plain.seconds:5.2f}x, "
                f"planned/hand {ratios[-1]:5.2f}",
                flush=True,
            )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ROWTUNE_CACHE"] = cache
        for name in FRONTS:
            if not given.networks or name in given.networks:
                front(name)
        every = dict.fromkeys(case.network for _, case in searched.cases(given.networks))
        ratios = [ratio for name in every for ratio in against_hand(name)]
    if ratios:
        print(
            f"{len(ratios)} plans by hand: planned/hand {statistics.median(ratios):.2f} in the median, "
            f"{max(ratios):.2f} at worst"
        )


if __name__ == "__main__":
    main()
