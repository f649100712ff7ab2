"""What `rowtune search` finds, against plans that were written by hand, at the same memory.

    python benchmarks/searched.py                    all cases at small sizes: an hour
    python benchmarks/searched.py unet resnet50 --trials 12 --rounds 5

For each plan of benchmarks/frontier.py's table: its measured peak, and a thousandth for what predictions
leave out (a few bytes), becomes the budget of a search of so many trials; then plain PyTorch, the plan by
hand and the plan found take turns. Below 1 the search won.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import frontier
import torch

from rowtune.errors import InfeasibleError
from rowtune.importers.source import parse_source
from rowtune.plan.plan import Plan
from rowtune.tune.device import keep_freed_memory
from rowtune.tune.find import Request, find
from rowtune.tune.measure import Bench
from rowtune.tune.measurement import Contender
from rowtune.tune.step import define

SHAPES = {
    "per_pixel": ("1x3x512x512", []),
    "edsr": ("1x3x160x160", ["blocks=8"]),
    "vgg16": ("1x3x640x640", ["dropout=0.0"]),
    "unet": ("1x3x384x384", ["base=32"]),
    "unet_bn": ("1x3x384x384", ["base=32"]),
    "unet3d": ("1x1x128x48x48", ["depth=3"]),
    "resnet50": ("1x3x448x448", []),
    "resnet50 batch": ("8x3x224x224", []),
}
"""Smaller than in frontier.py, so that all of it takes an hour."""
SPARE = 1.001
"""The budget over the peak of the plan by hand."""


def cases(wanted: list[str]) -> list[tuple[str, frontier.Case]]:
    found = []
    for case in frontier.CASES:
        key = "resnet50 batch" if case.network == "resnet50" and case.shape[0] > 1 else case.network
        if not case.file and (not wanted or case.network in wanted):
            found.append((key, case))
    return found


def measure(key: str, case: frontier.Case, trials: int, rounds: int) -> Iterator[dict[str, Any]]:
    shape, args = SHAPES[key]
    work = define(parse_source(f"zoo:{case.network}", args), [shape], loss=case.loss)
    bench = Bench(work.problem, work=work)
    for name, build in case.plans.items():
        hand = build(work.graph)
        peak = bench.measure(hand)
        if peak.status != "ok":
            print(f"  {name}: {peak.status} {peak.reason}")
            continue
        begun, budget = time.perf_counter(), int(SPARE * (peak.peak_bytes or 0))
        with tempfile.TemporaryDirectory() as folder:
            request = Request(work, budget, Path(folder) / "plan.json", trials)
            try:
                made = find(request)
            except InfeasibleError as error:
                print(f"  {name}: {error}")
                continue
        seconds = time.perf_counter() - begun
        best = made.result.best
        ours = Plan.from_dict(dict(best.decisions or {}))
        timings = bench.race([Contender(None), Contender(hand), Contender(ours)], rounds)
        plain, by_hand, searched = (t.seconds if t else float("nan") for t in timings)
        yield {
            "case": key, "shape": shape, "hand": name, "budget": budget,
            "found_peak": best.peak_bytes, "trials": made.result.measured, "search_seconds": seconds,
            "plain_seconds": plain, "hand_seconds": by_hand, "found_seconds": searched,
            "found_over_hand": searched / by_hand, "decisions": best.decisions,
        }  # fmt: skip
        print(
            f"{key:16}{name:44}{(peak.peak_bytes or 0) / 1e6:8.1f} MB {made.result.measured:3} trials "
            f"{seconds:5.0f} s   hand {by_hand / plain:5.2f}x  found {searched / plain:5.2f}x  "
            f"found/hand {searched / by_hand:5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    out = Path(__file__).parent / "results" / f"{datetime.date.today()}-searched.json"
    for key, case in cases(given.networks):
        for row in measure(key, case, given.trials, given.rounds):
            rows.append(row)
            if given.save:  # an hour's work is kept as it comes
                out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    ratios = [row["found_over_hand"] for row in rows]
    if ratios:
        print(f"median found/hand {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")
    if given.save:
        print(f"written to benchmarks/results/{out.name}")


if __name__ == "__main__":
    main()
