"""What the host does in a step: calls, and processor time where kernels cost next to nothing.

    python benchmarks/overhead.py            a minute or two
    python benchmarks/overhead.py unet --rounds 9

The same plan by both engines in one process, in turns: `traced` runs the schedule, `listed` the calls that it
made once. Images are narrow and channels few, so that kernels take little; on a device they would run beside
the host, and the host's time would be the floor of a step. Gradients are compared bit for bit. `first` is the
first two steps: lists are written down in the second. Results are written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rowtune
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.tune.device import keep_freed_memory
from rowtune.zoo import build


class Case(NamedTuple):
    """A network, its inputs, and the bands of its plan."""

    network: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    bands: dict[str, Any]


CASES = {
    "per_pixel": Case("per_pixel", {"channels": 4}, (1, 3, 2048, 8), {"band_rows": 16}),
    "unet": Case("unet", {"base": 4}, (1, 3, 1024, 16), {"band_rows": 16, "tapes": "replay"}),
    "resnet50": Case("resnet50", {"width": 8}, (1, 3, 1024, 32), {"band_rows": 32}),
    "unet_bn": Case("unet_bn", {"base": 4}, (1, 3, 512, 16), {"band_rows": 16}),
}
ENGINES = ("traced", "listed")


@dataclass
class Row:
    """One engine on one network. `ratio` is its host time over that of `traced`; bytes are activations."""

    network: str
    engine: str
    calls: int
    views: int
    first_seconds: float
    host_ms: float
    ratio: float
    activation_bytes: int


class Count(TorchDispatchMode):
    """Calls, and calls that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [r.alias_info for r in func._schema.returns]
        looks = any(alias is not None and not alias.is_write for alias in returned)
        self.views += looks
        self.calls += not looks
        return func(*args, **(kwargs or {}))


def measure(case: Case, rounds: int) -> list[Row]:
    from rowtune.tune.meter import LiveMeter

    torch.manual_seed(0)
    model, x = build(case.network, **case.options), torch.randn(case.shape)
    graph = rowtune.trace(model, (x,))
    out = graph.values[graph.outputs[0]].shape
    loss = parse(default_name(out, case.shape))
    target = synthetic_target(loss, out, torch.float32)
    plan = rowtune.uniform_plan(with_loss(graph, loss), "rows", **case.bands)
    steps, rows, gradients = {}, {}, {}
    for engine in ENGINES:
        module = rowtune.apply(model, plan, loss, graph=graph, engine=engine)  # type: ignore[arg-type]
        steps[engine] = _step(model, module, x, target)
        start = time.process_time()
        steps[engine]()
        gradients[engine] = steps[engine]()  # the second writes lists down and runs them
        first = time.process_time() - start
        with Count() as count:
            steps[engine]()
        with LiveMeter() as meter:
            meter.start([*model.parameters(), *model.buffers(), x, target], model.parameters())
            steps[engine]()
        row = Row(
            case.network, engine, count.calls, count.views, first, 0.0, 0.0, meter.peaks().activation_bytes
        )
        rows[engine] = row
    same = all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))
    assert same, f"{case.network}: the engines differ"
    times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine, step in steps.items():
            start = time.process_time()
            step()
            times[engine].append(time.process_time() - start)
    for engine, row in rows.items():
        row.host_ms = 1e3 * statistics.median(times[engine])
        row.ratio = row.host_ms / (1e3 * statistics.median(times["traced"]))
    return [*rows.values()]


def _step(
    model: torch.nn.Module, module: torch.nn.Module, x: Tensor, target: Tensor
) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        module(x, targets=target).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=[*CASES])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    print(
        f"{'network':12}{'engine':8}{'calls':>8}{'views':>8}{'first s':>9}{'host ms':>9}{'ratio':>7}{'MB':>8}"
    )
    rows: list[Row] = []
    for name in given.networks:
        for row in measure(CASES[name], given.rounds):
            rows.append(row)
            print(
                f"{row.network:12}{row.engine:8}{row.calls:8}{row.views:8}{row.first_seconds:9.2f}"
                f"{row.host_ms:9.0f}{row.ratio:7.2f}{row.activation_bytes / 1e6:8.2f}",
                flush=True,
            )
    out = Path(__file__).parent / "results" / f"{datetime.date.today()}-overhead.json"
    machine = {
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    out.write_text(json.dumps({**machine, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
