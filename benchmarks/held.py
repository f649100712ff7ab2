"""Does the budget hold for a whole run: 2,000 training steps under a budget 1% above the plan's peak.

    OMP_NUM_THREADS=1 python benchmarks/held.py            on the CPU, about five minutes
    python benchmarks/held.py --device cuda:0              on a card, whose driver holds the cap

On the CPU live tensors count, and every allocation of every step is looked at: one past the budget is out of
memory, as on a card. Printed are the most that was alive in each fifth of the run, the process's own memory,
and how often the run had to step down to a smaller plan (never, if the budget holds).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rowtune.importers.source import parse_source
from rowtune.plan.file import PlanFile
from rowtune.plan.uniform import uniform_plan
from rowtune.train.loop import train
from rowtune.train.options import Options, Report, StepReport, Trained
from rowtune.tune.step import define

ROOM = 1.01


class Cap(TorchDispatchMode):
    """Counts the bytes of live tensors, and refuses those past the limit; `most` is since the last look."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.used, self.most, self.refused = limit, 0, 0, 0
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.see(leaf)
        self.most = max(self.most, self.used)
        if self.used > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError("out of memory: past the budget")
        return out

    def see(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def gone(_: object) -> None:
            del self._live[key]
            self.used -= size

        self._live[key] = weakref.ref(storage, gone)
        self.used += size

    def look(self) -> int:
        most, self.most = self.most, self.used
        return most


def trained(given: argparse.Namespace, steps: int, budget: int, cap: Cap | None) -> tuple[Trained, list[Any]]:
    """A run, and for each step after the first the most that was alive and the process's memory."""
    work = define(parse_source(given.model, given.model_arg), [given.shape], device=given.device)
    plan = uniform_plan(work.graph, "rows", given.rows)
    keep = uniform_plan(work.graph, "rows", max(1, given.rows // 2))
    point = {"peak_bytes": 1, "step_seconds": 1.0, "decisions": keep.to_dict()}
    file = PlanFile(work.problem, work.graph.fingerprint, budget, plan, {}, {}, front=(point,))
    seen: list[Any] = []

    def watch(report: Report) -> None:
        if isinstance(report, StepReport):
            card = torch.cuda.max_memory_reserved() if given.device != "cpu" else 0
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            seen.append((cap.look() if cap is not None else card, rss))

    if cap is not None:
        for tensor in (*work.module.parameters(), *work.module.buffers()):
            cap.see(tensor)
    with cap or contextlib.nullcontext():
        return train(file, work, Options(steps=steps), watch), seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="zoo:unet_bn")
    parser.add_argument("--model-arg", nargs="*", default=["base=4", "depth=2"])
    parser.add_argument("--shape", default="1x3x128x64")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    first, _ = trained(given, 4, 1 << 50, None)
    assert first.peak_bytes is not None
    budget = int(ROOM * first.peak_bytes)
    gc.collect()
    cap = Cap(budget) if given.device == "cpu" else None
    start = time.perf_counter()
    result, seen = trained(given, given.steps, budget, cap)
    part = len(seen) // 5
    print(f"plan's peak {first.peak_bytes:,} bytes, budget {budget:,}; {time.perf_counter() - start:.0f} s")
    for fifth in range(5):
        some = seen[max(fifth * part, 2) : (fifth + 1) * part]  # lists are written in the second step
        alive, rss = (max(column) for column in zip(*some, strict=True))
        print(
            f"steps {fifth * part + 1:5}-{(fifth + 1) * part}: at most {alive:,} bytes alive, process {rss:,}"
        )
    refused = 0 if cap is None else cap.refused
    print(f"status {result.status}, {refused} allocations past the budget, {len(result.notes)} steps down")


if __name__ == "__main__":
    main()
