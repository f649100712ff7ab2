"""Predicted step times against measured ones, over random plans.

    python benchmarks/times.py                       ten networks, 20 plans each
    python benchmarks/times.py unet resnet50 --plans 10
    python benchmarks/times.py unet --profile NAME   with a profile that was measured before, of any network

Each network's plans are random paths through the programme's table and the programme's own; the calls of all
of them are timed first, as a search does. A plan's step is the median of a few, without the optimizer's
(which no plan changes), on warm lists. Per network: median relative error, the same after one common factor
(what a search corrects by its first measurements), and the rank correlation. On a machine that does other
work as well run it with OMP_NUM_THREADS=1: of one thread the processor's own time is taken. Results go to
benchmarks/results/.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import datetime
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import rowtune
from rowtune.cost.candidates import first
from rowtune.cost.predict import predict
from rowtune.cost.profile import Profile
from rowtune.cost.programme import Path as Way
from rowtune.cost.programme import fastest, plan_of, smallest
from rowtune.cost.table import Option, Table, within
from rowtune.graph.graph import Graph
from rowtune.graph.losses import Loss, default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan
from rowtune.tune.calibrate import calibrated
from rowtune.tune.device import device_name, keep_freed_memory
from rowtune.tune.profiles import chosen
from rowtune.zoo import build

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "per_pixel": ({}, (1, 3, 384, 384)),
    "edsr": ({"blocks": 4}, (1, 3, 128, 128)),
    "vgg16": ({"width": 32, "dropout": 0.0}, (1, 3, 256, 256)),
    "unet": ({"base": 16, "depth": 3}, (1, 3, 256, 256)),
    "unet_bn": ({"base": 16, "depth": 3}, (1, 3, 256, 256)),
    "unet3d": ({"base": 8, "depth": 2}, (1, 1, 96, 48, 48)),
    "resnet50": ({}, (2, 3, 224, 224)),
    "mobilenet_v3_large": ({"dropout": 0.0}, (4, 3, 224, 224)),
    "densenet121": ({}, (2, 3, 160, 160)),
    "convnext_tiny": ({}, (1, 3, 224, 224)),
}


def random_way(table: Table, rng: random.Random) -> Way:
    """Any options after another."""
    by_start: dict[int, list[Option]] = {}
    for option in table.options:
        by_start.setdefault(option.start, []).append(option)
    at, found = 0, []
    while at < len(table.cuts) - 1:
        found.append(rng.choice(by_start[at]))
        at = found[-1].stop
    return Way(0.0, 0, tuple(found))


def plans(table: Table, count: int) -> list[Plan]:
    rng = random.Random(0)
    low, most = smallest(table), fastest(table, 1 << 60)
    assert low is not None and most is not None
    limits = [low + (most.peak - low) * i // 5 for i in range(6)]
    ways = [w for limit in limits if (w := fastest(table, limit)) is not None]
    ways += [random_way(table, rng) for _ in range(count)]
    return list(dict.fromkeys(plan_of(table, way) for way in ways))[:count]


class Prepared(NamedTuple):
    """A network with a batch, and its graphs: as it is, and with its loss."""

    model: nn.Module
    x: Tensor
    target: Tensor
    loss: Loss
    traced: Graph
    graph: Graph


def prepared(name: str) -> Prepared:
    options, shape = CASES[name]
    model, x = build(name, **options), torch.randn(shape)
    traced = rowtune.trace(model, (x,))
    output = traced.values[traced.outputs[0]]
    loss = parse(default_name(output.shape, shape))
    target = synthetic_target(loss, output.shape, torch.float32, 1)
    return Prepared(model, x, target, loss, traced, with_loss(traced, loss))


def measure(name: str, count: int, seconds: float, given: Profile | None = None) -> dict[str, Any]:
    model, x, target, loss, traced, graph = prepared(name)
    table = Table(graph)
    start = time.perf_counter()
    table.add(first(table), within(30.0))
    recorded = time.perf_counter() - start
    profile = given or calibrated(None, table.work(), "cpu", seconds)
    timed = time.perf_counter() - start - recorded
    table.price(profile)
    rows = []
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for plan in plans(table, count):
        cost = predict(graph, plan, 0, profile)
        module = rowtune.apply(model, plan, loss, graph=traced)
        module.lists.after = 0
        taken = []
        for turn in range(5):
            model.zero_grad(set_to_none=True)
            begun = clock()
            module(x, targets=target).backward()
            if turn > 1:
                taken.append(clock() - begun)
        rows.append((statistics.median(taken), cost.seconds))
    real, ours = (np.array(column) for column in zip(*rows, strict=True))
    ratio = ours / real
    common = float(np.median(ratio))
    ranks = [np.argsort(np.argsort(column)) for column in (real, ours)]
    return {
        "network": name,
        "shape": list(x.shape),
        "plans": len(rows),
        "recording_seconds": recorded,
        "calibration_seconds": timed,
        "median_error": float(np.median(abs(ratio - 1))),
        "corrected_median_error": float(np.median(abs(ratio / common - 1))),
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "spread": float(real.max() / real.min()),
        "rows": [[float(a), float(b)] for a, b in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=[*CASES])
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing calls, for each network")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--profile", default="", help="predict with it, time no calls (see profiles/)")
    given = parser.parse_args()
    keep_freed_memory()
    profile = chosen(given.profile) if given.profile else None
    print(f"{'network':20}{'plans':>6}{'timing':>9}{'error':>8}{'corrected':>11}{'rank':>7}{'spread':>9}")
    found = []
    for name in given.networks:
        found.append(made := measure(name, given.plans, given.seconds, profile))
        print(
            f"{name:20}{made['plans']:6}{made['calibration_seconds']:7.1f} s{made['median_error']:8.1%}"
            f"{made['corrected_median_error']:11.1%}{made['rank_correlation']:7.2f}{made['spread']:9.1f}",
            flush=True,
        )
    for key in ("median_error", "corrected_median_error", "rank_correlation"):
        print(f"median {key.replace('_', ' ')}: {statistics.median(m[key] for m in found):.3f}")
    if given.save:
        out = Path(__file__).parent / "results" / f"{datetime.date.today()}-times.json"
        machine = {
            "device": device_name("cpu"),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        out.write_text(json.dumps({**machine, "networks": found}, indent=1) + "\n")
        print(f"written to benchmarks/results/{out.name}")


if __name__ == "__main__":
    main()
