"""Predicted peaks of memory against measured ones, over random plans.

    python benchmarks/memory.py                      ten networks, 20 plans each: half an hour
    python benchmarks/memory.py unet resnet50 --plans 50 --engine traced

The networks and the plans are those of benchmarks/times.py: the programme's own for six limits, then random
paths through its table; none is left out. A plan's step is taken twice, the second time under the meter that
sees every tensor (rowtune/tune/meter.py). Per network: median and largest relative error of the peak of
activations and of the whole peak, and how far plans are apart. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from times import CASES, plans, prepared

import rowtune
from rowtune.cost.candidates import first
from rowtune.cost.table import Table
from rowtune.tune.meter import measure_memory

OPTIONS = 200


def measure(name: str, count: int, engine: Any) -> dict[str, Any]:
    model, x, target, loss, traced, graph = prepared(name)
    table = Table(graph)
    table.add(islice(first(table), OPTIONS), math.inf)
    rows = []
    for plan in plans(table, count):
        module = rowtune.apply(model, plan, loss, graph=traced, engine=engine)
        module.lists.after = 0
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(module: Any = module, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            module(x, targets=target).backward()
            optimizer.step()

        step()
        real = measure_memory(step, module, optimizer, [x, target], "cpu")
        ours = rowtune.predict(graph, plan, 1, engine=engine)
        rows.append(
            {
                "plan": plan.to_dict(),
                "predicted": [ours.peak_bytes, ours.activation_bytes],
                "measured": [real.peak_bytes, real.activation_bytes],
            }
        )
    return {"network": name, "shape": list(x.shape), "rows": rows}


def save(out: Path, made: dict[str, Any]) -> None:
    """One more network in the day's file."""
    before = json.loads(out.read_text())["networks"] if out.exists() else []
    networks = [one for one in before if one["network"] != made["network"]] + [made]
    out.write_text(json.dumps({"torch": torch.__version__, "networks": networks}, indent=1) + "\n")


def errors(found: dict[str, Any], which: int) -> list[float]:
    return [abs(row["predicted"][which] / row["measured"][which] - 1) for row in found["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=[*CASES])
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--engine", default="listed", choices=("listed", "traced"))
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    print(f"{'network':20}{'plans':>6}  {'activations':>11}{'worst':>9}{'peak':>10}{'worst':>9}{'spread':>9}")
    found = []
    out = Path(__file__).parent / "results" / f"{datetime.date.today()}-memory-{given.engine}.json"
    for name in given.networks:
        found.append(made := measure(name, given.plans, given.engine))
        peak, inner = errors(made, 0), errors(made, 1)
        taken = [row["measured"][1] for row in made["rows"]]
        print(
            f"{name:20}{len(taken):6}  {statistics.median(inner):11.3%}{max(inner):9.3%}"
            f"{statistics.median(peak):10.3%}{max(peak):9.3%}{max(taken) / min(taken):8.1f}x",
            flush=True,
        )
        if given.save:
            save(out, made)
    every = [e for made in found for e in errors(made, 1)]
    print(f"{len(every)} plans: activations {statistics.median(every):.3%} off, {max(every):.3%} at worst")


if __name__ == "__main__":
    main()
