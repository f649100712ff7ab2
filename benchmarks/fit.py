"""How large an image trains within 8 GB: plain PyTorch, what people use instead, and rowtune.

    python benchmarks/fit.py                          all networks: about an hour
    python benchmarks/fit.py unet edsr --budget 8GB --save

Plain, the best checkpointing (every combination of keep and checkpoint segments, recursive ones included:
more than anybody writes by hand), save_on_cpu, rowtune on the device alone and rowtune with the host's memory
are predicted, from recordings on tensors without data; save_on_cpu and the last have as much of the host's
memory as they want. torch.compile, whose buffers are not tensors, is measured at two small sizes, by the
allocator's peak, for several activation_memory_budgets, and goes on in proportion to the pixels; the best
one counts. What is predicted is then confirmed: with a budget that leaves room for a hundredth of the
activations, the largest
sizes of plain, checkpointing and rowtune run a real step each.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rowtune.cost.predict import fixed_bytes, predict
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.importers.source import parse_source
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.tune.fit import LOOK, WAYS, WITH_HOST, Fit, fit, fit_way, resized
from rowtune.tune.measure import Bench
from rowtune.tune.meter import allocator_peak
from rowtune.tune.sizes import parse_size
from rowtune.tune.step import Workload, define, plain_graph

NETWORKS: dict[str, tuple[str, str, list[str]]] = {
    "vgg16": ("1x3x224x224", "H,W", ["dropout=0.0"]),
    "resnet50": ("1x3x224x224", "H,W", []),
    "unet": ("1x3x256x256", "H,W", []),
    "edsr": ("1x3x128x128", "H,W", []),
    "unet3d": ("1x1x64x64x64", "D,H,W", []),
}
"""Inputs to begin with, what of them grows, and arguments of the factory."""
COMPILED = (1.0, 0.5, 0.0)
"""torch.compile's activation_memory_budget."""
HOST = 1 << 50
"""Bytes of the host's memory: there is no end of it."""
SHARE = 100
"""Of the activations' part of the budget, what the confirming steps have."""


def volume(lengths: tuple[int, ...] | None) -> int:
    total = 1
    for n in lengths or (0,):
        total *= n
    return total


def root(size: float, axes: int) -> tuple[int, ...]:
    """Equal lengths along the axes."""
    return (int(max(size, 0.0) ** (1 / axes)),) * axes


def saved_on_cpu(work: Workload, limit: int, over: str) -> tuple[int, ...]:
    """The largest size if all that autograd saves waits in the host's memory, of which there is no end."""
    axes = len(over.split(","))
    sizes, peaks = [], []
    for scale in (1, 2):
        specs = resized(work, over, tuple(scale * n for n in lengths_of(work, over)))
        graph = work.graph if scale == 1 else with_loss(plain_graph(work.module, specs), work.loss)
        (keep,) = uniform_plan(graph, "keep").segments
        plan = Plan((replace(keep, store="host"),), 2)
        sizes.append(volume(tuple(scale * n for n in lengths_of(work, over))))
        peaks.append(predict(graph, plan, work.optimizer).peak_bytes)
    return root(on_line(sizes, peaks, limit), axes)


def on_line(sizes: list[int], peaks: list[int], limit: int) -> float:
    rise = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    return sizes[0] + (limit - peaks[0]) / rise


def lengths_of(work: Workload, over: str) -> tuple[int, ...]:
    shape = work.problem.inputs[0].shape
    return shape[-len(over.split(",")) :]


def compiled(work: Workload, limit: int, over: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The largest size under the best of torch.compile's budgets, and what was measured."""
    axes, found = len(over.split(",")), {}
    best = 0.0
    state = fixed_bytes(work.graph, work.optimizer)  # the batch is little beside it
    for budget in COMPILED:
        sizes, peaks = [], []
        for quarter in (2, 3):
            lengths = tuple(quarter * n // 4 // 32 * 32 or 32 for n in lengths_of(work, over))
            sizes.append(volume(lengths))
            peaks.append(state + _compiled_peak(work, over, lengths, budget))
        size = on_line(sizes, peaks, limit)
        found[str(budget)] = {"sizes": sizes, "peaks": peaks, "largest": root(size, axes)}
        print(f"    torch.compile, budget {budget}: {peaks} bytes at {sizes}: {root(size, axes)}", flush=True)
        best = max(best, size)
    return root(best, axes), found


def _compiled_peak(work: Workload, over: str, lengths: tuple[int, ...], budget: float) -> int:
    import torch._functorch.config as config

    model = work.module
    x = torch.rand(resized(work, over, lengths)[0].shape)
    with torch.no_grad():
        target = synthetic_target(work.loss, tuple(model(x).shape), torch.float32)
    torch._dynamo.reset()
    old, config.activation_memory_budget = config.activation_memory_budget, budget
    try:
        net = torch.compile(model, dynamic=False)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            work.loss(net(x), target).backward()

        step()
        gc.collect()
        return allocator_peak(step)
    finally:
        config.activation_memory_budget = old
        model.zero_grad(set_to_none=True)


def confirmed(work: Workload, over: str, fits: list[Fit], limit: int) -> dict[str, Any]:
    """A real step of each way at the largest size that it is said to take under this budget."""
    found = {}
    for one in fits:
        if one.largest is None or one.there is None or one.there.plan is None:
            continue
        problem = replace(work.problem, inputs=resized(work, over, one.largest))
        measured = Bench(problem).measure(one.there.plan)
        found[one.way] = {
            "largest": one.largest, "limit": limit, "predicted": one.there.peak_bytes,
            "status": measured.status, "peak_bytes": measured.peak_bytes,
        }  # fmt: skip
        print(f"    confirmed: {one.way} {one.largest}: {measured.peak_bytes} of {limit} bytes", flush=True)
        gc.collect()
    return found


def measure(
    name: str, limit: int, peers: bool, steps: bool, seconds: float, ways: list[str], known: dict[str, Any]
) -> dict[str, Any]:
    """Other ways than these are taken from what is known of the network."""
    shape, over, args = NETWORKS[name]
    work = define(parse_source(f"zoo:{name}", args), [shape])
    row: dict[str, Any] = {"plans": {}} | known | {"network": name, "over": over, "limit": limit}
    for way in ways:
        print(f"    {way} ...", flush=True)
        one = fit_way(work, limit, over, way, seconds=seconds, host_bytes=HOST, watch=print)
        row[way] = one.largest
        if one.there is not None and one.there.plan is not None and way in ("rowtune", WITH_HOST):
            row["plans"][way] = one.there.plan.to_dict()
            row[f"{way}, bytes"] = one.there.peak_bytes
    for way, other in (("rowtune", "checkpointing"), (WITH_HOST, "rowtune")):  # plans of one are the next's
        if way not in row or volume(row[way]) < volume(row.get(other)):
            row[way] = row.get(other)
    row["save_on_cpu"] = saved_on_cpu(work, limit, over)
    if peers:
        row["torch.compile"], row["compiled"] = compiled(work, limit, over)
    others = [w for w in ("plain", "checkpointing", "save_on_cpu", "torch.compile") if w in row]
    best = max(others, key=lambda way: volume(row[way]))
    row |= {"best_peer": best, "times": volume(row["rowtune"]) / volume(row[best])}
    row["times_with_host"] = volume(row[WITH_HOST]) / volume(row[best])
    ways = (*others, "rowtune", WITH_HOST)
    print(f"  {name:10}" + "".join(f"{way} {'x'.join(map(str, row[way] or ()))}   " for way in ways))
    both = f"{row['times']:.2f} times the best peer's ({best}), {row['times_with_host']:.2f} with the host"
    print(f"  {name:10}{both}", flush=True)
    if steps:
        fixed = fixed_bytes(work.graph, work.optimizer)
        small = fixed + (limit - fixed) // SHARE
        row["confirmed"] = confirmed(
            work, over, fit(work, small, over, seconds=seconds, host_bytes=HOST), small
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=[*NETWORKS])
    parser.add_argument("--budget", default="8GB")
    parser.add_argument("--ways", nargs="*", default=[*WAYS, WITH_HOST], help="others as they were saved")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-steps", action="store_true")
    parser.add_argument("--seconds", type=float, default=LOOK, help="of the processor, for each way")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    limit = parse_size(given.budget)
    out = Path(__file__).parent / "results" / f"{datetime.date.today()}-fit.json"
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    rows = {row["network"]: row for row in rows if row["limit"] == limit}
    for name in given.networks:
        compiled, steps = not given.no_compile, not given.no_steps
        known = rows.get(name, {})
        rows[name] = measure(name, limit, compiled, steps, given.seconds, given.ways, known)
        if given.save:  # an hour's work is kept as it comes
            text = json.dumps({"torch": torch.__version__, "rows": [*rows.values()]}, indent=1)
            out.write_text(text + "\n")


if __name__ == "__main__":
    main()
