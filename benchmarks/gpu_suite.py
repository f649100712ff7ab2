"""The stages of gpu_suite.sh that are programs: one JSON file each, rewritten after every step.

    python benchmarks/gpu_suite.py verify --out results [--tiny] [--device cpu] [--seconds 500]

A step that fails is a line of the file with its reason; nothing stops a stage but its time. `--tiny` shrinks
everything, so that the whole suite can be tried where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import frontier
import torch
from torch import Tensor

import rowtune
from rowtune.graph.losses import parse
from rowtune.graph.places import has_barriers
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.importers.source import parse_source
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.tune.device import device_name, synchronize
from rowtune.tune.measure import Bench
from rowtune.tune.step import Workload, define

# Test-sized networks, their arguments and shapes: what is verified in float64.
SMALL: dict[str, tuple[str, str]] = {
    "convnext_tiny": ("depths=1,1,1,1 dims=8,16,24,32 classes=5", "2x3x64x64"),
    "deeplabv3plus": (
        "width=4 depths=1,1,1,1 channels=8 low_channels=4 rates=1,2 classes=3 dropout=0.0", "2x3x64x64"
    ),
    "densenet121": ("growth=4 depths=1,1,1,1 width=8 classes=5", "2x3x64x64"),
    "edsr": ("blocks=2 channels=8", "2x3x32x24"),
    "efficientnet_v2_s": ("width=0.25 depths=1,1,1,1,1,1 classes=5 dropout=0.0", "2x3x64x64"),
    "hrnet_w18": ("width=4 stem=8 modules=1,1 blocks=1 head=segmentation classes=3", "1x3x64x64"),
    "mobilenet_v3_large": ("width=0.25 depths=1,1,1,1,1,1 classes=5 dropout=0.0", "2x3x64x64"),
    "per_pixel": ("layers=5 channels=8", "1x3x64x48"),
    "resnet50": ("width=8 depths=1,1,1,1 classes=5", "2x3x64x64"),
    "unet": ("base=4 depth=2", "1x3x64x48"),
    "unet3d": ("base=4 depth=2", "1x1x32x16x16"),
    "unet_bn": ("base=4 depth=2", "2x3x64x48"),
    "vgg16": ("width=8 classes=5 dropout=0.0", "1x3x64x64"),
    "vgg16_features": ("width=8", "1x3x64x64"),
}  # fmt: skip
TINY_NETWORKS = ("per_pixel", "unet_bn")
# Network, shape on a GPU, shape of a dry run with the arguments that go with it.
LARGE: tuple[tuple[str, str, str, str], ...] = (
    ("per_pixel", "1x3x2048x2048", "1x3x64x64", "layers=4 channels=4"),
    ("vgg16", "1x3x2048x2048", "1x3x64x64", "width=4 classes=5"),
    ("unet", "1x3x2048x2048", "1x3x64x64", "base=4 depth=1"),
    ("resnet50", "1x3x2048x2048", "1x3x64x64", "width=4 depths=1,1,1,1 classes=5"),
    ("edsr", "1x3x2048x2048", "1x3x32x32", "blocks=2 channels=4"),
)


# What is kept of the answers of search and run.
FOUND = (
    *("peak_bytes", "budget_bytes", "step_seconds", "plain_peak_bytes", "plain_step_seconds"),
    *("predicted_peak_bytes", "max_relative_error", "failed", "trials"),
)
RAN = ("status", "exit_code", "peak_bytes", "step_seconds", "error")
BAD = ("failed", "wrong", "crash", "oom")


class Results:
    """Rows of one stage, on the disk after each."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.end = time.monotonic() + given.seconds
        today = datetime.date.today().isoformat()
        name = device_name(given.device)
        self.head = {
            "stage": given.stage, "date": today, "device": name, "tiny": given.tiny,
            "torch": str(torch.__version__), "python": platform.python_version(),
            "cudnn": torch.backends.cudnn.version(), "commit": _commit(),
        }  # fmt: skip
        kind = "-".join(name.lower().split()[:2]) if given.device != "cpu" else "cpu"
        safe = "".join(c if c.isalnum() or c in "-." else "-" for c in kind)
        self.path = Path(given.out) / f"{today}-{safe}-{given.stage}.json"
        self.rows: list[dict[str, Any]] = []
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")

    def step(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run one step and keep what it says, or why it failed; nothing once the stage's time is over."""
        if time.monotonic() > self.end:
            self.rows.append({"name": name, "status": "no time left"})
            self.write()
            return
        start = time.monotonic()
        try:
            row = {"status": "ok", **run()}
        except Exception as error:
            row = {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.rows.append({"name": name, **row, "took": round(time.monotonic() - start, 2)})
        shown = {k: v for k, v in self.rows[-1].items() if k != "name"}
        print(f"{name:48s} {json.dumps(shown)[:200]}")
        self.write()


def _commit() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    return "unknown"


def workload(name: str, arguments: str, shape: str, device: str, dtype: str = "", loss: str = "") -> Workload:
    source = parse_source(f"zoo:{name}", arguments.split())
    return define(source, [shape], device=device, dtype=dtype, loss=loss)


def policies(work: Workload) -> dict[str, Plan]:
    """Every policy, halo, kind of tapes and way with barriers, over all that can be banded."""
    graph = work.graph
    found = {"keep": uniform_plan(graph, "keep"), "checkpoint": uniform_plan(graph, "checkpoint")}
    for halo in ("recompute", "cache", "sweep"):
        found[f"rows {halo}"] = uniform_plan(graph, "rows", 8, halo)  # type: ignore[arg-type]
    for tapes in ("whole", "late", "replay"):
        found[f"rows sweep {tapes}"] = uniform_plan(graph, "rows", 8, tapes=tapes)  # type: ignore[arg-type]
    if has_barriers(graph, 2):
        for barriers in ("recompute", "narrow", "passes"):
            halo = "sweep" if barriers == "passes" else "recompute"
            found[f"rows {barriers}"] = uniform_plan(graph, "rows", 8, halo, barriers=barriers)  # type: ignore[arg-type]
    return found


# -- stages ----------------------------------------------------------------------------------------------


def verify(results: Results, given: argparse.Namespace) -> None:
    """Float64 gradients of every network under every policy."""
    for name in TINY_NETWORKS if given.tiny else SMALL:
        arguments, shape = SMALL[name]
        work = workload(name, arguments, shape, given.device, "float64")
        bench = Bench(work.problem, work=work)
        for policy, plan in policies(work).items():

            def check(plan: Plan = plan, bench: Bench = bench) -> dict[str, Any]:
                made = bench.check(plan)
                return {
                    "status": "ok" if made.ok else "wrong",
                    "error": made.max_relative_error,
                    "at": made.worst,
                }

            results.step(f"{name}, {policy}", check)


def budgets(results: Results, given: argparse.Namespace) -> None:
    """`rowtune search` and `rowtune run` as a user calls them, under caps far below plain's peak."""
    for name, shape, tiny, arguments in LARGE:
        for budget in ("75%",) if given.tiny else ("2GB", "4GB", "8GB"):
            size = tiny if given.tiny else shape
            model = [f"zoo:{name}", *(w for a in arguments.split() * given.tiny for w in ("--model-arg", a))]
            out = str(Path(given.out) / "plan.json")
            ask = [*model, "--shape", size, "--budget", budget, "--device", given.device, "-o", out]
            trials, seconds = ("2", "20") if given.tiny else ("6", "60")
            ask += ["--trials", trials, "--timeout", seconds, "--fresh", "--force"]

            def both(ask: list[str] = ask, out: str = out) -> dict[str, Any]:
                found = _rowtune("search", *ask)
                if found["exit_code"]:
                    return {"status": "infeasible" if found["exit_code"] == 4 else "failed", **found}
                ran = _rowtune("run", out, "--steps", "5", "--device", given.device)
                return {
                    **{key: found.get(key) for key in FOUND},
                    "run": {key: ran.get(key) for key in RAN},
                    "violated": ran.get("peak_bytes") is None or ran["peak_bytes"] > found["budget_bytes"],
                }

            results.step(f"{name} {size}, {budget}", both)
        if given.tiny:
            return


def _rowtune(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "main.py", *words, "--json"], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return {
        "exit_code": done.returncode,
        **({"stderr": last} if last else {}),
        **(json.loads(lines[-1]) if lines else {}),
    }


def predict(results: Results, given: argparse.Namespace) -> None:
    """Predicted activation peak against what the allocator gave out."""
    for name, shape, tiny, arguments in LARGE[:1] if given.tiny else LARGE:
        work = workload(name, arguments if given.tiny else "", tiny if given.tiny else shape, given.device)
        bench = Bench(work.problem, work=work)
        for policy, plan in [("plain", None), *policies(work).items()]:

            def one(plan: Plan | None = plan, work: Workload = work, bench: Bench = bench) -> dict[str, Any]:
                cost = rowtune.predict(
                    work.graph, plan or uniform_plan(work.graph, "keep"), work.optimizer.slots
                )
                made = bench.measure(plan, worth_seconds=20.0)
                peak = made.allocator_peak_bytes or made.peak_bytes
                return {
                    "status": made.status, "reason": made.reason, "predicted_bytes": cost.peak_bytes,
                    "allocator_bytes": made.allocator_peak_bytes, "peak_bytes": made.peak_bytes,
                    "ratio": round(cost.peak_bytes / peak, 4) if peak else None,
                    "retries": made.alloc_retries, "step_seconds": made.step_seconds,
                    "cpu_seconds": made.cpu_seconds,
                }  # fmt: skip

            results.step(f"{name}, {policy}", one)


def speed(results: Results, given: argparse.Namespace) -> None:
    """Contenders in turns; times as ratios to plain in the same run."""
    for name, shape, tiny, arguments in LARGE[:1] if given.tiny else LARGE:
        for precision in ("tf32", "bf16"):
            size = tuple(map(int, (tiny if given.tiny else shape).split("x")))
            options = dict(parse_source(f"zoo:{name}", arguments.split() * given.tiny).args)

            def race(name: str = name, size: tuple[int, ...] = size, options: Any = options,
                     precision: str = precision) -> dict[str, Any]:  # fmt: skip
                return _race(_case(name, size, options, given.tiny), precision, given)

            results.step(f"{name} {'x'.join(map(str, size))}, {precision}", race)


def _case(name: str, size: tuple[int, ...], options: dict[str, Any], tiny: bool) -> frontier.Case:
    sweeps = [(16, "split")] if tiny else [(64, "split"), (256, "split"), (128, "replay"), (256, "replay")]
    plans = {f"rowtune {tapes} {band}": frontier.sweep(band, tapes) for band, tapes in sweeps}
    if name == "resnet50":
        plans = {f"rowtune store {band}": frontier.barred(band, "store", "recompute") for band in (128, 512)}
    loss = "mse" if name == "edsr" else "cross_entropy"
    return frontier.Case(name, name, options, size, loss, plans, compiled=not tiny)


def _race(case: frontier.Case, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(given.device)
    model = rowtune.zoo.build(case.network, **case.options).to(device)
    loss = parse(case.loss)
    x = torch.randn(case.shape, device=device)
    graph = with_loss(rowtune.trace(model, (x,)), loss)
    target = synthetic_target(loss, graph.values[graph.loss_output].shape, torch.float32).to(device)
    with _precision(precision, device):
        everyone = frontier.contenders(case, model, x, target, loss, quick=not case.compiled)
        rows = [_memory(c, model, device) for c in everyone]
        fitting = [(c, row) for c, row in zip(everyone, rows, strict=True) if "reason" not in row]
        for _ in range(1 if given.tiny else 5):
            for contender, _row in fitting:
                contender.times.append(_seconds(contender.step, given.device))
    base = statistics.median(fitting[0][0].times)
    for contender, row in fitting:
        seconds = statistics.median(contender.times)
        row |= {"seconds": seconds, "time_ratio": seconds / base}
    return {"contenders": rows}


@contextlib.contextmanager
def _precision(precision: str, device: torch.device) -> Iterator[None]:
    """TF32 convolutions and products, or bfloat16 autocast."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _memory(contender: frontier.Contender, model: Any, device: torch.device) -> dict[str, Any]:
    """A first step to warm up, then one whose peak counts."""
    row: dict[str, Any] = {"name": contender.name}
    try:
        contender.step()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.step()
            torch.cuda.synchronize()
            row["allocator_bytes"] = torch.cuda.max_memory_allocated() - before
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def _seconds(step: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def host(results: Results, given: argparse.Namespace) -> None:
    """Kernels of a step, how long the host takes to launch them and the device to run them."""
    for name, shape, tiny, arguments in LARGE[:1] if given.tiny else LARGE:
        work = workload(name, arguments if given.tiny else "", tiny if given.tiny else shape, given.device)
        module, (inputs, target) = work.module.to(given.device), work.batch(device=given.device)
        for policy, plan in policies(work).items():

            def one(plan: Plan = plan, work: Workload = work, module: Any = module, inputs: Any = inputs,
                    target: Tensor = target) -> dict[str, Any]:  # fmt: skip
                banded = replace(plan, segments=tuple(_taller(s) for s in plan.segments))
                runner = rowtune.apply(module, banded, work.loss)
                found = _profiled(lambda: runner(*inputs, targets=target).backward(), given.device)
                if given.device == "cpu":
                    return found
                step = rowtune.capture(runner)  # the first call runs, the second is written down
                seconds = [_seconds(lambda: step(*inputs, targets=target), given.device) for _ in range(5)]
                return {**found, "captured_seconds": statistics.median(seconds[2:])}

            results.step(f"{name}, {policy}", one)


def _taller(segment: Any) -> Any:
    return replace(segment, band_rows=128) if segment.policy == "rows" else segment


def _profiled(step: Callable[[], object], device: str) -> dict[str, Any]:
    step()
    wall = statistics.median(_seconds(step, device) for _ in range(3))
    synchronize(device)
    start = time.perf_counter()
    step()
    launched = time.perf_counter() - start
    synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device != "cpu" else []
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        synchronize(device)
    events = profile.events() or []
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    operators = sum(e.name.startswith("aten::") for e in events)
    busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
    copies = sum("memcpy" in e.name.lower() and "dtoh" in e.name.lower() for e in kernels)
    return {"wall_seconds": wall, "host_seconds": launched, "device_seconds": busy, "kernels": len(kernels),
            "operators": operators, "device_to_host_copies": copies}  # fmt: skip


def profile(results: Results, given: argparse.Namespace) -> None:
    """What the device does: products, convolutions, copies, the link to the host, a launch."""
    n, device = (256 if given.tiny else 8192), torch.device(given.device)

    def rate(name: str, unit: str, amount: float, run: Callable[[], object]) -> None:
        results.step(name, lambda: {unit: amount / _best(run, given)})

    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=device, dtype=dtype)
        rate(f"matmul {n} {dtype}", "tflops", 2 * n**3 / 1e12, lambda a=a: a @ a)
        for channels in (32, 64, 256):
            side = 16 if given.tiny else 1024
            x = torch.randn(1, channels, side, side, device=device, dtype=dtype)
            w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
            work = 2 * 9 * channels**2 * side**2 / 1e12
            for layout in (torch.contiguous_format, torch.channels_last):
                y, name = x.to(memory_format=layout), f"conv {channels} {dtype} {layout}"
                rate(name, "tflops", work, lambda y=y, w=w: torch.conv2d(y, w, padding=1))
    size = (1 << 20) if given.tiny else (1 << 28)
    here = torch.empty(size, dtype=torch.uint8, device=device)
    there = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    other = torch.empty_like(here)
    rate("device to device", "gb_a_second", size / 1e9, lambda: other.copy_(here))
    rate("device to host", "gb_a_second", size / 1e9, lambda: there.copy_(here, non_blocking=True))
    rate("host to device", "gb_a_second", size / 1e9, lambda: here.copy_(there, non_blocking=True))
    small = torch.zeros(1, device=device)
    rate("launches", "a_second", 1000, lambda: [small.add_(1) for _ in range(1000)])


def _best(run: Callable[[], object], given: argparse.Namespace) -> float:
    for _ in range(3):
        run()
    return min(_seconds(run, given.device) for _ in range(3 if given.tiny else 10))


STAGES = {
    "verify": verify, "budgets": budgets, "predict": predict, "speed": speed, "host": host,
    "profile": profile,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", default=os.environ.get("OUT", "gpu-results"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small networks and images")
    parser.add_argument("--seconds", type=float, default=500.0, help="of the stage")
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    results = Results(given)
    STAGES[given.stage](results, given)
    bad = [row for row in results.rows if row["status"] in BAD or row.get("violated")]
    print(f"written to {results.path}: {len(results.rows)} steps, {len(bad)} bad")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
