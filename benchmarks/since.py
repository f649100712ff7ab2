"""The plans by hand of frontier.py, run by an earlier commit of this program and by this one, in turns.

    python benchmarks/since.py 6639a1e                         all networks at small sizes
    python benchmarks/since.py 6639a1e per_pixel --rounds 9 --save

Each commit has a process of its own, in a checkout of its own; both build the same plans (those that the
earlier commit knows) of the same network and train on the same batch. A step is forward and backward; its
time is the processor's, of one thread, so that what else the machine does counts less. Activations are live
tensors less parameters and gradients; calls are those that are not views. Ratios are this commit's over the
earlier one's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "per_pixel": ({}, (1, 3, 512, 512)),
    "edsr": ({"blocks": 8}, (1, 3, 160, 160)),
    "vgg16": ({"dropout": 0.0}, (1, 3, 512, 512)),
    "unet": ({"base": 32}, (1, 3, 256, 256)),
    "unet_bn": ({"base": 32}, (1, 3, 256, 256)),
    "unet3d": ({"depth": 3}, (1, 1, 96, 48, 48)),
    "resnet50": ({}, (1, 3, 448, 448)),
}

WORKER = """
import ctypes, json, sys, time
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import frontier, rowtune
from rowtune.graph.losses import parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.tune.meter import LiveMeter

torch.set_num_threads(1)
for parameter, value in ((-1, -1), (-4, 0)):  # keep_freed_memory, which not every commit has
    ctypes.CDLL(None).mallopt(parameter, value)

class Count(TorchDispatchMode):
    calls = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = [r.alias_info for r in func._schema.returns]
        self.calls += not any(alias is not None and not alias.is_write for alias in returned)
        return func(*args, **(kwargs or {}))

def case(network, rank):
    return next(c for c in frontier.CASES if c.network == network and not c.file)

def prepare(network, options, shape):
    global model, x, target, loss, graph, plans
    known = case(network, len(shape))
    torch.manual_seed(0)
    model = rowtune.zoo.build(network, **options)
    x = torch.randn(shape)
    loss = parse(known.loss)
    traced = rowtune.trace(model, (x,))
    target = synthetic_target(loss, traced.values[traced.outputs[0]].shape, torch.float32, 0)
    graph, plans = with_loss(traced, loss), known.plans
    return [*plans]

def take(name):
    global module
    module = rowtune.apply(model, plans[name](graph), loss)
    for _ in range(3):
        step()

def step():
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    module(x, targets=target).backward()
    return time.process_time() - start

def measure():
    with Count() as count:
        step()
    model.zero_grad(set_to_none=True)
    with LiveMeter() as meter:
        meter.start([*model.parameters(), *model.buffers(), x, target], model.parameters())
        step()
    meter.tag(p.grad for p in model.parameters() if p.grad is not None)
    return meter.peaks().activation_bytes, count.calls

out = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    name, args = json.loads(line)
    print(json.dumps(globals()[name](*args)), file=out, flush=True)
"""


class Worker:
    """One commit's process: `call` runs a function of the text above there."""

    def __init__(self, tree: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER],  # not from the folder it is called in
            env={**os.environ, "PYTHONPATH": f"{tree}:{tree / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, name: str, *args: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, args]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{name}{args} failed: see above")
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=HERE.parent, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def compare(network: str, earlier: Path, rounds: int) -> Iterator[dict[str, Any]]:
    options, shape = CASES[network]
    workers = []
    try:
        workers += [Worker(earlier), Worker(HERE.parent)]
        old, new = workers
        theirs, ours = (w.call("prepare", network, options, shape) for w in workers)
        for plan in [name for name in ours if name in theirs]:
            for worker in workers:
                worker.call("take", plan)
            times = [[w.call("step") for w in workers] for _ in range(rounds)]
            before, now = old.call("measure"), new.call("measure")
            seconds = [statistics.median(t[i] for t in times) for i in range(2)]
            yield {
                "network": network, "shape": shape, "plan": plan, "seconds": seconds,
                "activation_bytes": [before[0], now[0]], "calls": [before[1], now[1]],
                "time_ratio": statistics.median(t[1] / t[0] for t in times),
            }  # fmt: skip
    finally:
        for worker in workers:
            worker.end()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("networks", nargs="*", default=[*CASES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    out = HERE / "results" / f"{datetime.date.today()}-since-{given.commit}.json"
    print(
        f"{'network':12}{'plan':42}{'seconds':>16}{'ratio':>7}{'MB':>18}{'ratio':>7}{'calls':>15}{'ratio':>7}"
    )
    with checkout(given.commit) as earlier:
        for network in given.networks:
            for row in compare(network, earlier, given.rounds):
                rows.append(row)
                (s, t), (a, b), (c, d) = row["seconds"], row["activation_bytes"], row["calls"]
                print(
                    f"{network:12}{row['plan']:42}{s:8.3f}{t:8.3f}{row['time_ratio']:7.2f}"
                    f"{a / 1e6:9.1f}{b / 1e6:9.1f}{b / a:7.2f}{c:8}{d:7}{d / c:7.2f}",
                    flush=True,
                )
                if given.save:
                    out.write_text(json.dumps({"commit": given.commit, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
