"""What a step on a CPU spends on pages that the C library gave back: plain PyTorch, and bands.

    python benchmarks/page_faults.py                      a minute
    python benchmarks/page_faults.py per_pixel --rounds 9

Each network trains plainly and in bands of rows, in turns, in a process where glibc is left as it is and in
one that keeps what it let go of (rowtune.tune.device.keep_freed_memory, which rowtune's own processes do).
Processor time of one thread; faults are of the last step. Without the second kind of process a comparison of
plain PyTorch with bands on a CPU is one of page faults: whole feature maps are handed back and faulted in
again, bands are not.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

import rowtune
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import synthetic_target
from rowtune.tune.device import keep_freed_memory
from rowtune.zoo import build

SHAPES = {
    "per_pixel": (1, 3, 1024, 1024),
    "mobilenet_v3_large": (4, 3, 224, 224),
    "resnet50": (2, 3, 224, 224),
}
BAND = 32
HEADS = ("glibc", "plain s", "faults", "bands s", "faults", "bands/plain")
WIDTHS = (7, 9, 10, 9, 10, 13)


def measure(name: str, rounds: int, kept: bool) -> dict[str, tuple[float, int]]:
    """By contender: the median step in seconds, and the page faults of one."""
    if kept:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SHAPES[name]
    model, x = build(name), torch.randn(shape)
    graph = rowtune.trace(model, (x,))
    output = graph.values[graph.outputs[0]].shape
    loss = parse(default_name(output, shape))
    target = synthetic_target(loss, output, torch.float32)
    banded = rowtune.apply(model, rowtune.uniform_plan(graph, "rows", BAND), loss, graph=graph)
    steps = {"plain": lambda: loss(model(x), target), "bands": lambda: banded(x, targets=target)}
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    faults = {}
    for turn in range(rounds + 2):
        for who, step in steps.items():
            model.zero_grad(set_to_none=True)
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
            step().backward()
            if turn > 1:  # lists are written down in the second
                seconds[who].append(time.process_time() - start)
            faults[who] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {who: (statistics.median(taken), faults[who]) for who, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=[*SHAPES], metavar="NETWORK", help=", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inside", choices=["left", "kept"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(measure(given.networks[0], given.rounds, given.inside == "kept")))
        return
    heads = "".join(f"{head:>{width}}" for head, width in zip(HEADS, WIDTHS, strict=True))
    print(f"{'network':20}{heads}")
    for name in given.networks:
        for inside in ("left", "kept"):
            command = [sys.executable, __file__, name, "--rounds", str(given.rounds), "--inside", inside]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            (plain, plain_faults), (bands, band_faults) = found["plain"], found["bands"]
            print(
                f"{name:20}{inside:>7}{plain:9.2f}{plain_faults:10}{bands:9.2f}{band_faults:10}"
                f"{bands / plain:13.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
