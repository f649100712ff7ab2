"""Memory savers alone, in pairs and mixed, at parts of what plain PyTorch's activations take.

    python benchmarks/savers.py                          five networks at small sizes
    python benchmarks/savers.py unet_bn resnet50 --at 50 25 --rounds 5 --save

For each limit the programme plans with one saver, with two, and with all; what it finds takes turns with
plain PyTorch. The mixture is what a search with all of them would measure and choose: the fastest, in steps
of their own, of what the programme finds with all savers, with all but one, and by keeping alone. A dash:
with those savers nothing is small enough. Limits are of activations as predicted, at the moment when there
is most of everything and all gradients of parameters are there.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import datetime
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rowtune.cost.predict import fixed_bytes
from rowtune.cost.programme import fastest, plan_of
from rowtune.importers.source import parse_source
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.tune.calibrate import calibrated
from rowtune.tune.device import keep_freed_memory
from rowtune.tune.measure import Bench
from rowtune.tune.measurement import Contender
from rowtune.tune.savers import DEFAULT
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.step import Workload, define
from rowtune.tune.task import Situation

NETWORKS = {
    "vgg16": ("1x3x320x320", ["dropout=0.0"]),
    "resnet50": ("4x3x224x224", []),
    "unet_bn": ("1x3x256x256", ["base=16"]),
    "edsr": ("1x3x96x96", ["blocks=8"]),
    "unet3d": ("1x1x64x48x48", ["depth=3"]),
}
SINGLE = ("rows", "checkpoint", "recompute", "offload", "images")
KEEPING = frozenset({"offload", "recompute"})
EVERY = (DEFAULT | {"offload"}) - {"channels_last"}
"""Exact ones that do not hang on how one trains; another layout is another plain to compare with."""


class Plans:
    """The programme's plans for a network with some savers, of one table."""

    def __init__(self, work: Workload, seconds: float) -> None:
        self.space = ProgrammeSpace(
            work.graph,
            work.optimizer.slots,
            lambda calls, box: calibrated(None, calls, "cpu", 3 * box),
            EVERY,
        )
        self.fixed = fixed_bytes(work.graph, work.optimizer.slots)
        self.gradients = sum(v.bytes for v in work.graph.parameters())
        self.seconds = seconds

    def look(self, limit: int) -> None:
        """Record what may be fast within the limit."""
        for _ in range(3):
            self.space.tell(Situation(limit + self.fixed, None, (), self.seconds))

    def best(self, savers: frozenset[str], limit: int) -> tuple[float, Plan] | None:
        """Predicted seconds and the plan, of activations of at most `limit` bytes."""
        self.space.savers = savers | ({"turns"} if "checkpoint" in savers else set())
        found = fastest(self.space.table, limit, self.space._may)
        self.space.savers = EVERY
        return None if found is None else (found.seconds, plan_of(self.space.table, found))


def contenders(plans: Plans, limit: int) -> dict[str, Plan]:
    """Every saver alone, the pair that is predicted to be fastest, and all together."""
    found: dict[str, Plan] = {}
    for name in SINGLE:
        if (made := plans.best(frozenset({name}), limit)) is not None:
            found[name] = made[1]
    pairs = []
    for pair in itertools.combinations(SINGLE, 2):
        if (made := plans.best(frozenset(pair), limit)) is not None:
            pairs.append((made[0], " + ".join(pair), made[1]))
    if pairs:
        _, name, plan = min(pairs, key=lambda p: p[0])
        found[f"pair: {name}"] = plan
    return found


def mixtures(plans: Plans, limit: int) -> list[Plan]:
    """With all savers, with all but one, and by keeping alone, on the host or as it was."""
    allowed = [EVERY, *(EVERY - {name} for name in SINGLE), frozenset({"offload"}), KEEPING]
    made = [plans.best(savers, limit) for savers in allowed]
    return list(dict.fromkeys(found[1] for found in made if found is not None))


def measure(network: str, at: list[int], rounds: int) -> Iterator[list[dict[str, Any]]]:
    """What is found at each limit, one after another."""
    shape, args = NETWORKS[network]
    work = define(parse_source(f"zoo:{network}", args), [shape])
    bench = Bench(work.problem, work=work)
    plans = Plans(work, 600.0)
    print(f"{network} {shape}", flush=True)
    keep = plans.space.predict(uniform_plan(work.graph, "keep")).activation_bytes
    for percent in sorted(at):
        rows = []
        limit = keep * percent // 100 + plans.gradients
        plans.look(limit)
        found = contenders(plans, limit)
        mixed = mixtures(plans, limit)
        tried = bench.race([Contender(p) for p in mixed], 2) if len(mixed) > 1 else []
        best = min(((t.seconds, i) for i, t in enumerate(tried) if t), default=(0.0, 0))[1]
        found |= {"mixture": mixed[best]} if mixed else {}
        timed = bench.race([Contender(None), *(Contender(p) for p in found.values())], rounds)
        plain = timed[0].seconds if timed[0] else math.nan
        for (name, plan), timing in zip(found.items(), timed[1:], strict=True):
            ratio = timing.seconds / plain if timing else math.nan
            cost = plans.space.predict(plan)
            rows.append(
                {
                    "network": network, "shape": shape, "percent": percent, "savers": name,
                    "predicted_percent": 100 * cost.activation_bytes / keep, "over_plain": ratio,
                    "predicted_seconds": cost.seconds,
                    "plain_seconds": plain, "decisions": plan.to_dict(),
                }
            )  # fmt: skip
        told = "  ".join(f"{r['savers']} {r['over_plain']:.2f}" for r in rows)
        missing = [name for name in SINGLE if name not in found]
        gone = " ".join(f"{name} -" for name in missing)
        print(f"  {percent:3}% of {len(plans.space.table.options)} options: {told}  {gone}", flush=True)
        yield rows


def save(rows: list[dict[str, Any]]) -> None:
    """In place of what was measured today at the same limits."""
    out = Path(__file__).parent / "results" / f"{datetime.date.today()}-savers.json"
    here = {(r["network"], r["percent"]) for r in rows}
    before = json.loads(out.read_text())["rows"] if out.exists() else []
    kept = [r for r in before if (r["network"], r["percent"]) not in here]
    out.write_text(json.dumps({"torch": torch.__version__, "rows": [*kept, *rows]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--at", nargs="+", type=int, default=[50, 25, 10, 5])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    keep_freed_memory()
    for network in given.networks or NETWORKS:
        for rows in measure(network, given.at, given.rounds):
            if given.save:
                save(rows)


if __name__ == "__main__":
    main()
