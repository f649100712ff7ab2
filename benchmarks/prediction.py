"""How long a prediction takes at 8192 x 8192, first and again, and what recording every band would take.

    python benchmarks/prediction.py                  predictions alone: some minutes
    python benchmarks/prediction.py --full           all bands recorded as well: an hour
    python benchmarks/prediction.py edsr --bands 8   one network, one band height

Networks are at full width, traced and predicted without data. Times are one run each, after a first
prediction of the same graph (plain); `again` is the same plan once more, whose segments are known. Band
heights are rows of the network's output: vgg16_features ends 32 times lower than it begins. With --full,
results are written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import rowtune
from rowtune.graph.graph import Graph
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import with_loss
from rowtune.plan.lower import lower
from rowtune.plan.program import Banded
from rowtune.plan.repeat import shortened
from rowtune.runtime.recorder import record
from rowtune.zoo import build

NETWORKS = ("vgg16_features", "unet", "edsr")
WAYS = (("recompute", "split"), ("cache", "split"), ("sweep", "split"), ("sweep", "whole"), ("sweep", "late"))


@dataclass
class Row:
    """`off` is the relative difference of the two peaks; None where only the prediction was made."""

    network: str
    halo: str
    tapes: str
    band_rows: int
    pieces: int
    seconds: float
    again_seconds: float
    full_seconds: float | None = None
    off: float | None = None


def traced(name: str, size: int) -> Graph:
    with torch.device("meta"):
        model = build(name)
    shape = (1, 3, size, size)
    graph = rowtune.trace(model, (torch.empty(shape, device="meta"),))
    return with_loss(graph, parse(default_name(graph.values[graph.outputs[0]].shape, shape)))


def measure(graph: Graph, name: str, way: tuple[str, str], band: int, full: bool) -> Row:
    halo, tapes = way
    plan = rowtune.uniform_plan(graph, "rows", band, halo, tapes=tapes)  # type: ignore[arg-type]
    program = lower(graph, plan, shortened)
    pieces = sum(len(s.how.pieces) for s in program.segments if isinstance(s.how, Banded))
    ours, seconds = timed(lambda: rowtune.predict(graph, plan).activation_bytes)
    again = timed(lambda: rowtune.predict(graph, plan).activation_bytes)[1]
    row = Row(name, halo, tapes, band, pieces, seconds, again)
    if full:
        theirs, row.full_seconds = timed(lambda: record(lower(graph, plan)).activation_bytes)
        row.off = ours / theirs - 1
    return row


def timed(work) -> tuple[int, float]:  # type: ignore[no-untyped-def]
    gc.collect()
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def shown(row: Row) -> str:
    line = f"{row.network:16}{row.halo:10}{row.tapes:7}{row.band_rows:5}{row.pieces:8}"
    line += f"{row.seconds:10.3f}{row.again_seconds * 1e3:9.2f} ms"
    if row.full_seconds is None:
        return line
    return f"{line}{row.full_seconds:9.2f}{row.full_seconds / row.seconds:8.0f}x{row.off:10.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--bands", default="8,16,32,64")
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    print(
        f"{'network':16}{'halo':10}{'tapes':7}{'band':>5}{'pieces':>8}"
        f"{'predict':>10}{'again':>12}{'full':>9}{'ratio':>9}{'off':>10}"
    )
    rows: list[Row] = []
    for name in given.networks:
        graph = traced(name, given.size)
        rowtune.predict(graph, rowtune.uniform_plan(graph, "keep"))
        for way in WAYS:
            for band in map(int, given.bands.split(",")):
                rows.append(measure(graph, name, way, band, given.full))
                print(shown(rows[-1]), flush=True)
    print(f"slowest {max(r.seconds for r in rows):.2f} s")
    if not given.full:
        return
    out = Path(__file__).parent / "results" / f"{datetime.date.today()}-prediction.json"
    machine = {
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    out.write_text(
        json.dumps({"size": given.size, **machine, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )
    print(f"written to benchmarks/results/{out.name}")


if __name__ == "__main__":
    main()
