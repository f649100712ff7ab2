"""Record a finite space of plans of a network, for benchmarks/search_quality.py to replay.

    OMP_NUM_THREADS=1 python benchmarks/record_grid.py               half an hour for five networks

A network is cut in three zones. Each zone is computed in each of some ten ways; every combination is a plan.
Peaks and predicted seconds are those of rowtune.predict for each whole plan. Real seconds: each zone's way is
timed with the other zones kept, in processor time (a median of warm steps, so that a busy machine matters
little), and a plan's time is the sum of what its ways take more or less than keeping. How far that sum is
from plans timed as a whole is measured on some random ones, and written into the file. Grids go to
benchmarks/grids/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rowtune
from rowtune.cost.candidates import AGAIN, LATE, NARROW, ROWS, SPLIT, heights
from rowtune.cost.predict import composed, predict
from rowtune.cost.table import Key, Table
from rowtune.graph.graph import Graph
from rowtune.graph.losses import Loss, default_name, parse
from rowtune.graph.places import has_barriers
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.tune.calibrate import calibrated
from rowtune.tune.device import device_name, keep_freed_memory
from rowtune.zoo import build

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "per_pixel": ({}, (1, 3, 192, 192)),
    "edsr": ({"blocks": 2, "channels": 32}, (1, 3, 96, 96)),
    "unet": ({"base": 8, "depth": 3}, (1, 3, 192, 192)),
    "unet_bn": ({"base": 8, "depth": 3}, (1, 3, 192, 192)),
    "vgg16_features": ({"width": 16}, (1, 3, 192, 192)),
}
GRIDS = Path(__file__).parent / "grids"
BANDS = (8, 32)
WARM, TIMED, WHOLE = 1, 3, 12
"""Steps that are not timed, and timed, of a plan; plans timed as a whole to check the sum."""


def zones(table: Table) -> list[tuple[int, int]]:
    """Three stretches between cuts that take about as long."""
    last = len(table.cuts) - 1
    seconds = [table.seconds(table.known[table.keep(k, k + 1)]) for k in range(last)]  # type: ignore[arg-type]
    sums = list(itertools.accumulate(seconds))
    ends = [min(range(last), key=lambda k: abs(sums[k] - share * sums[-1])) + 1 for share in (1 / 3, 2 / 3)]
    ends = sorted({max(1, min(end, last - 1)) for end in ends})
    return list(itertools.pairwise([0, *ends, last]))


def ways(table: Table, start: int, stop: int) -> list[Key]:
    """Keep first, then checkpoint, then bands."""
    kinds = (
        (SPLIT, ROWS, AGAIN, NARROW) if has_barriers(table.graph, table.axis) else (SPLIT, ROWS, LATE, AGAIN)
    )
    found = [table.keep(start, stop), table.checkpoint(start, stop)]
    for height, kind in itertools.product([h for h in BANDS if h in heights(table)], kinds):
        if (key := table.rows(start, stop, replace(kind, band_rows=height))) is not None:
            found.append(key)
    table.add(found, math.inf)
    return [key for key in dict.fromkeys(found) if table.known.get(key) is not None]


class Timed:
    """Processor seconds of a step of a plan."""

    def __init__(self, model: torch.nn.Module, x: torch.Tensor, graph: Graph, loss: Loss) -> None:
        self.model, self.x, self.graph, self.loss = model, x, graph, loss
        output = graph.values[graph.outputs[0]]
        self.target = synthetic_target(loss, output.shape, torch.float32, 1)

    def __call__(self, plan: Plan) -> float:
        module = rowtune.apply(self.model, plan, self.loss, graph=self.graph)
        module.lists.after = 0
        taken = []
        for turn in range(WARM + TIMED):
            self.model.zero_grad(set_to_none=True)
            start = time.process_time()
            module(self.x, targets=self.target).backward()
            if turn >= WARM:
                taken.append(time.process_time() - start)
        return statistics.median(taken)


def record(name: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The grid of a network; with real times that were `known`, predicted anew."""
    options, shape = CASES[name]
    model, x = build(name, **options), torch.randn(shape)
    traced = rowtune.trace(model, (x,))
    loss = parse(default_name(traced.values[traced.outputs[0]].shape, shape))
    graph = with_loss(traced, loss)
    table = Table(graph)
    table.add([table.keep(k, k + 1) for k in range(len(table.cuts) - 1)], math.inf)
    places = zones(table)
    choices = [ways(table, start, stop) for start, stop in places]
    profile = calibrated(None, table.work(), "cpu", 30.0)
    step = Timed(model, x, traced, loss)

    def plan(at: Sequence[int]) -> Plan:
        return table.plan([s for keys, i in zip(choices, at, strict=True) for s in keys[i][2]])

    all_of = list(itertools.product(*(range(len(keys)) for keys in choices)))
    costs = [
        (composed(graph, plan(at), 1)[1].total, predict(graph, plan(at), 1, profile).seconds) for at in all_of
    ]
    real = timed(name, [len(keys) for keys in choices], lambda at: step(plan(at))) if known is None else known
    return {
        "network": name, "shape": list(shape), "device": device_name("cpu"), "torch": torch.__version__,
        "zones": [[_segment(key[2]) for key in keys] for keys in choices],
        **{key: real[key] for key in ("base_seconds", "more_seconds", "whole_over_sum")},
        "peak_bytes": [peak for peak, _ in costs],
        "predicted_seconds": [float(f"{seconds:.4g}") for _, seconds in costs],
    }  # fmt: skip


def timed(name: str, sizes: Sequence[int], step: Callable[[Sequence[int]], float]) -> dict[str, Any]:
    """Each way with the others kept, and some random plans as a whole."""
    base = step([0] * len(sizes))
    more = []
    for zone, count in enumerate(sizes):
        alone = [[0] * zone + [i] + [0] * (len(sizes) - zone - 1) for i in range(count)]
        more.append([step(at) - base if any(at) else 0.0 for at in alone])
        print(f"{name}: zone {zone}, {count} ways timed", flush=True)
    rng = random.Random(0)
    checked = []
    for at in [[rng.randrange(count) for count in sizes] for _ in range(WHOLE)]:
        checked.append(step(at) / (base + sum(more[zone][i] for zone, i in enumerate(at))))
    return {
        "base_seconds": round(base, 5),
        "more_seconds": [[round(t, 5) for t in row] for row in more],
        "whole_over_sum": [round(r, 3) for r in sorted(checked)],
    }


def _segment(segments: tuple[Segment, ...]) -> list[dict[str, Any]]:
    return [s.to_dict() for s in segments]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=[*CASES])
    parser.add_argument("--predict", action="store_true", help="keep real times, predict anew")
    given = parser.parse_args()
    keep_freed_memory()
    for name in given.networks:
        known = json.loads((GRIDS / f"{name}.json").read_text()) if given.predict else None
        grid = record(name, known)
        GRIDS.mkdir(exist_ok=True)
        (GRIDS / f"{name}.json").write_text(json.dumps(grid) + "\n")
        off = statistics.median(abs(r - 1) for r in grid["whole_over_sum"])
        print(f"{name}: {len(grid['peak_bytes'])} plans; sums are off by {off:.1%} in the median", flush=True)


if __name__ == "__main__":
    main()
