"""Training with rounded stores beside plain PyTorch: losses and accuracy, and COMET's rule put to the test.

    pip install scikit-learn
    python benchmarks/convergence.py                     three seeds, some minutes
    python benchmarks/convergence.py --seeds 1 --steps 50 --save

A residual network of twenty layers learns scikit-learn's digits. Contenders start from the same weights and
see the same batches. Then, for every convolution of the trained plain network, the deviation that rounding
its input brings to its weights' gradient, measured and by COMET's rule (arXiv 2111.09562): a L sqrt(N R) e,
with a = 0.32, the mean size L of the gradient that arrives, the N elements that a weight's gradient sums up,
the share R of them that are not zero, and e the largest error of an element.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowtune
from rowtune.graph.graph import Graph
from rowtune.plan.plan import Plan
from rowtune.runtime.stores.int4 import Int4
from rowtune.runtime.stores.int8 import Int8

STEPS, BATCH, RATE = 300, 64, 0.05
HELD_OUT = 297


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
        )  # fmt: skip
        self.one, self.two = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.short = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(self.first(x)))
        return F.relu(self.two(self.second(y)) + self.short(x))


def resnet20() -> nn.Module:
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head
    )


def plans(graph: Graph) -> dict[str, Plan | None]:
    keep = rowtune.uniform_plan(graph, "keep")

    def kept(store: Any, cheap: Any) -> Plan:
        segments = tuple(replace(s, store=store, cheap=cheap) for s in keep.segments)
        return replace(keep, segments=segments, max_grad_error=0.0 if store == "device" else 100.0)

    return {
        "plain": None,
        "exact (cheap recomputed)": kept("device", "recompute"),
        "bf16": kept("bf16", "recompute"),
        "int8": kept("int8", "recompute"),
        "int4": kept("int4", "recompute"),
    }


def train(
    net: nn.Module, plan: Plan | None, graph: Graph, data: Tensor, labels: Tensor, steps: int, seed: int
) -> list[float]:
    module = net if plan is None else rowtune.apply(net, plan, graph=graph)
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        at = torch.randint(len(data), (BATCH,), generator=order)
        optimizer.zero_grad()
        loss = F.cross_entropy(module(data[at]), labels[at])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def accuracy(net: nn.Module, data: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net.eval()(data).argmax(1) == labels).double().mean())


def rule(net: nn.Module, data: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Measured and predicted deviations of weights' gradients, by convolution and store."""
    rows: list[dict[str, Any]] = []

    def look(name: str, conv: nn.Conv2d) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda g: rows.extend(_deviations(name, conv, x, g)))

        return conv.register_forward_hook(hook)

    hooks = [look(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    F.cross_entropy(net.train()(data[:BATCH]), labels[:BATCH]).backward()
    for hook in hooks:
        hook.remove()
    return rows


def _deviations(name: str, conv: nn.Conv2d, x: Tensor, g: Tensor) -> list[dict[str, Any]]:
    found = []
    for store, most in ((Int8(), 127), (Int4(), 7)):
        error = store.get(store.put(x)) - x
        made = torch.nn.grad.conv2d_weight(error, list(conv.weight.shape), g, conv.stride, conv.padding)
        largest = (x.abs().amax((2, 3)) / most).mean()
        size, share = g.numel() / g.shape[1], (g != 0).double().mean()
        predicted = 0.32 * g.abs().mean() * (size * share) ** 0.5 * largest
        found.append({
            "layer": name, "store": type(store).__name__.lower(), "measured": float(made.std()),
            "predicted": float(predicted), "largest_error": float(error.abs().max()),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    learn, check = slice(0, len(data) - HELD_OUT), slice(len(data) - HELD_OUT, len(data))
    results: dict[str, list[tuple[float, float]]] = {}
    table: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        start = resnet20()
        graph = rowtune.trace(start, (data[:BATCH],))
        for name, plan in plans(graph).items():
            net = copy.deepcopy(start)
            losses = train(net, plan, graph, data[learn], labels[learn], given.steps, seed)
            last = statistics.fmean(losses[-20:])
            results.setdefault(name, []).append((last, accuracy(net, data[check], labels[check])))
            print(f"seed {seed}  {name:26} loss {last:.5f}  accuracy {results[name][-1][1]:.4f}", flush=True)
            if plan is None and not seed:
                table = rule(net, data[learn], labels[learn])
    for name, found in results.items():
        losses, right = zip(*found, strict=True)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(
            f"{name:26} loss {statistics.fmean(losses):.5f} +- {spread:.5f}  "
            f"accuracy {statistics.fmean(right):.4f}"
        )
    ratios = {
        s: [r["measured"] / r["predicted"] for r in table if r["store"] == s and r["predicted"]]
        for s in ("int8", "int4")
    }
    for store, by in ratios.items():
        middle, least, most = statistics.median(by), min(by), max(by)
        print(f"{store}, {len(by)} layers: measured / rule {middle:.2f} ({least:.2f} to {most:.2f})")
    if given.save:
        out = Path(__file__).parent / "results" / f"{datetime.date.today()}-convergence.json"
        out.write_text(
            json.dumps({"torch": torch.__version__, "results": results, "rule": table}, indent=1) + "\n"
        )
        print(f"written to benchmarks/results/{out.name}")


if __name__ == "__main__":
    main()
