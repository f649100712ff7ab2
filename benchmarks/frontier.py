"""Memory against time, side by side with what people use instead, on the same work.

    python benchmarks/frontier.py                     all cases
    python benchmarks/frontier.py per_pixel --rounds 5

Contenders take turns (A B C A B C ...), so that drift of a shared machine hits all alike; times are medians
and are read as ratios to plain eager in the same run. Memory is measured apart from time: `activation` is
the peak of live tensors less parameters and gradients, `allocator` the allocator's own peak with kernel
temporaries (the only figure there is for compiled code, whose buffers are not tensors). Results are written
to benchmarks/results/.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a shared machine: waiting threads should not spin for long

import argparse
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rowtune
from rowtune.graph.losses import Loss, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.tune.device import keep_freed_memory
from rowtune.tune.meter import LiveMeter, allocator_peak

Step = Callable[[], object]


@dataclass
class Contender:
    """`step` runs forward and backward; `live` is False where tensors are not what memory is made of."""

    name: str
    step: Step
    live: bool = True
    times: list[float] = field(default_factory=list)
    activation_bytes: int | None = None
    allocator_bytes: int | None = None
    gradient_error: float | None = None


@dataclass(frozen=True)
class Case:
    name: str
    network: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    loss: str
    plans: dict[str, Callable[[Any], Plan]]
    compiled: bool = True
    file: str = ""


def sweep(band: int, tapes: str = "split") -> Callable[[Any], Plan]:
    return lambda graph: rowtune.uniform_plan(graph, "rows", band, "sweep", tapes=tapes)  # type: ignore[arg-type]


def fronts(*parts: tuple[str, int, str], rest: str = "keep", tapes: str = "split") -> Callable[[Any], Plan]:
    """Rows segments ending at the named nodes, the rest kept: (last node, band rows, halo)."""

    def build(graph: Any) -> Plan:
        segments, at = [], 0
        for last, band, halo in parts:
            segments.append(Segment(graph.nodes[at].name, last, "rows", band, halo, tapes=tapes))  # type: ignore[arg-type]
            at = graph.index[last] + 1
        segments.append(Segment(graph.nodes[at].name, graph.nodes[-1].name, rest))  # type: ignore[arg-type]
        return Plan(tuple(segments))

    return build


def barred(band: int, barriers: str, halo: str = "sweep", tapes: str = "split") -> Callable[[Any], Plan]:
    return lambda graph: rowtune.uniform_plan(graph, "rows", band, halo, tapes=tapes, barriers=barriers)  # type: ignore[arg-type]


def lean(graph: Any) -> Plan:
    """Everything kept but what is cheap to make again."""
    whole = rowtune.uniform_plan(graph, "keep")
    return replace(whole, segments=tuple(replace(s, cheap="recompute") for s in whole.segments))


Part = tuple[str, Segment]


def stages(*parts: Part | list[Part]) -> Callable[[Any], Plan]:
    """Segments like the given ones, cut behind the last node of the named modules; a list of them is a
    checkpoint that they make up, recomputed in turns."""

    def build(graph: Any) -> Plan:
        segments, at = [], 0
        for part in parts:
            inside: list[Segment] = []
            for module, like in part if isinstance(part, list) else [part]:
                named = [i for i, n in enumerate(graph.nodes) if n.module.startswith(module)]
                stop = max(named) + 1 if module else len(graph.nodes)
                relu = graph.nodes[stop - 1].op == "relu" and like.policy == "rows"
                if isinstance(part, list) and (module, like) != part[-1] and relu:
                    inside += [_over(graph, at, stop - 1, like), _over(graph, stop - 1, stop, KEEP)]
                else:
                    inside.append(_over(graph, at, stop, like))
                at = stop
            whole = Segment(inside[0].first, inside[-1].last, "checkpoint", inside=tuple(inside))
            segments.append(whole if isinstance(part, list) else inside[0])
        return Plan(tuple(segments))

    return build


def _over(graph: Any, start: int, stop: int, like: Segment) -> Segment:
    return replace(like, first=graph.nodes[start].name, last=graph.nodes[stop - 1].name)


def again(band: int) -> Segment:
    return Segment("", "", "rows", band, "recompute", barriers="recompute")


def narrow(band: int, images: int = 0) -> Segment:
    return Segment("", "", "rows", band, "recompute", images, barriers="narrow")


def passed(band: int, tapes: str = "split") -> Segment:
    return Segment("", "", "rows", band, "sweep", tapes=tapes, barriers="passes")  # type: ignore[arg-type]


CHECKPOINT = Segment("", "", "checkpoint")
KEEP = Segment("", "", "keep")
PAIRS_OF_RESNET = ("layer1.0", "layer1.2", "layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5")
BLOCKS_OF_RESNET = [f"layer{i}.{j}" for i, depth in ((1, 3), (2, 4), (3, 6), (4, 3)) for j in range(depth)]


def narrow_by_bands(*bands: int) -> list[tuple[str, Segment]]:
    """The first pairs of blocks, where tensors are largest."""
    return [(name, narrow(band)) for name, band in zip(PAIRS_OF_RESNET[: len(bands)], bands, strict=True)]


def in_turns(rows: int) -> Callable[[Any], Plan]:
    """The first blocks in pairs, each made again when its turn comes; then parts of two and three."""
    return stages(
        ("maxpool", CHECKPOINT),
        [("layer1.0", again(rows)), ("layer1.1", again(rows))],
        [("layer1.2", again(rows)), ("layer2.0", again(rows))],
        *((name, CHECKPOINT) for name in ("layer2.2", "layer3.0", "layer3.3")), ("", KEEP),
    )  # fmt: skip


CASES = (
    Case(
        "per_pixel 8x32ch, 1x3x1024x1024, single sweep", "per_pixel", {}, (1, 3, 1024, 1024), "cross_entropy",
        {"rowtune sweep 16": sweep(16), "rowtune sweep 32": sweep(32)},
    ),
    Case(
        "edsr baseline, 1x3x512x512, single sweep", "edsr", {}, (1, 3, 512, 512), "mse",
        {"rowtune sweep 16": sweep(16), "rowtune replay 64": sweep(64, "replay")},
    ),
    Case(
        "vgg16, 1x3x2048x2048", "vgg16", {"dropout": 0.0}, (1, 3, 2048, 2048), "cross_entropy",
        {
            "rowtune 8+4 sweep": fronts(("max_pool2d_2", 8, "sweep"), ("max_pool2d_3", 4, "sweep")),
            "rowtune 16+8 replay": fronts(
                ("max_pool2d_2", 16, "sweep"), ("max_pool2d_3", 8, "sweep"), tapes="replay"
            ),
            "rowtune 16+16 cache": fronts(("max_pool2d_2", 16, "cache"), ("max_pool2d_3", 16, "cache")),
        },
    ),
    Case(
        "unet, 1x3x1024x1024", "unet", {}, (1, 3, 1024, 1024), "cross_entropy",
        {"rowtune replay 16": sweep(16, "replay"), "rowtune late 16": sweep(16, "late")}, compiled=False,
    ),
    Case(
        "batch-norm unet, 1x3x1024x1024", "unet_bn", {}, (1, 3, 1024, 1024), "cross_entropy",
        {
            "rowtune store 16": barred(16, "store"), "rowtune store 32": barred(32, "store", "recompute"),
            "rowtune cheap recomputed": lean,
        },
        compiled=False,
    ),
    Case(
        "unet3d of three levels, 1x1x256x64x64", "unet3d", {"depth": 3}, (1, 1, 256, 64, 64), "cross_entropy",
        {
            "rowtune store 16": barred(16, "store"), "rowtune store 32": barred(32, "store", "recompute"),
            "rowtune cheap recomputed": lean,
        },
        compiled=False,
    ),
    Case(
        "resnet50, 1x3x1024x1024", "resnet50", {}, (1, 3, 1024, 1024), "cross_entropy",
        {
            "rowtune cheap recomputed": lean,
            "rowtune store 32": barred(32, "store", "recompute"),
            "rowtune again 64, two blocks at a time": stages(
                *((name, again(64)) for name in PAIRS_OF_RESNET), ("", KEEP)
            ),
            "rowtune narrow, two blocks at a time": stages(
                *narrow_by_bands(64, 32, 16, 32),
                *((name, again(64)) for name in PAIRS_OF_RESNET[4:]), ("", KEEP)
            ),
            "rowtune in turns, then checkpoints": in_turns(512),
        },
        compiled=False,
    ),
    Case(
        "resnet50 as small as it gets, 1x3x1024x1024", "resnet50", {}, (1, 3, 1024, 1024), "cross_entropy",
        {
            "rowtune passes 8 to layer3.0, narrow after": stages(
                ("layer2", passed(8)), ("layer3.0", passed(8)), ("layer3.2", narrow(8)),
                *((name, narrow(16)) for name in ("layer3.4", "layer4.0", "layer4.1")), ("", CHECKPOINT)
            ),
        },
        compiled=False, file="resnet50-smallest",
    ),
    Case(
        "resnet50, 8x3x224x224", "resnet50", {}, (8, 3, 224, 224), "cross_entropy",
        {
            "rowtune cheap recomputed": lean,
            "rowtune store 28": barred(28, "store", "recompute"),
            "rowtune again 28, two blocks at a time": stages(
                *((name, again(28)) for name in PAIRS_OF_RESNET), ("", KEEP)
            ),
            "rowtune in turns, then checkpoints": in_turns(224),
            "rowtune narrow, two blocks at a time": stages(
                *narrow_by_bands(14, 7, 4, 7),
                *((name, again(14)) for name in PAIRS_OF_RESNET[4:]), ("", KEEP)
            ),
        },
        compiled=False,
    ),
)  # fmt: skip


# -- contenders --------------------------------------------------------------------------------


def checkpointed(model: nn.Module, case: Case, pieces: int) -> nn.Module:
    """torch.utils.checkpoint over `pieces` stretches of the network's own blocks."""
    blocks = BLOCKS[case.network](model)
    size = -(-len(blocks) // pieces)
    return Checkpointed([blocks[i : i + size] for i in range(0, len(blocks), size)])


class Checkpointed(nn.Module):
    def __init__(self, parts: list[list[Callable[[Any], Any]]]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Any:
        value: Any = x
        for i, part in enumerate(self.parts):
            run = _chain(part)
            value = run(value) if i == len(self.parts) - 1 else checkpoint(run, value, use_reentrant=False)
        return value


def _chain(part: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def run(value: Any) -> Any:
        for block in part:
            value = block(value)
        return value

    return run


def _vgg_blocks(model: Any) -> list[Callable[[Any], Any]]:
    return [*model.features, lambda x: model.classifier(torch.flatten(model.avgpool(x), 1))]


def _edsr_blocks(model: Any) -> list[Callable[[Any], Any]]:
    """Head, body (its input rides along for the global skip), upsampler and tail."""
    first: list[Callable[[Any], Any]] = [lambda x: (h := model.head(x), h)]
    body: list[Callable[[Any], Any]] = [lambda v, b=b: (b(v[0]), v[1]) for b in model.body[:-1]]
    last: list[Callable[[Any], Any]] = [
        lambda v: model.body[-1](v[0]) + v[1],
        lambda x: model.tail(model.upsample(x)),
    ]
    return first + body + last


def _resnet_blocks(model: Any) -> list[Callable[[Any], Any]]:
    return [
        lambda x: model.maxpool(model.relu(model.bn1(model.conv1(x)))),
        *(block for stage in model.stages for block in model.get_submodule(stage)),
        lambda x: model.fc(torch.flatten(model.avgpool(x), 1)),
    ]


def modules_checkpointed(model: nn.Module, kinds: tuple[str, ...]) -> Callable[[Tensor], Any]:
    """For networks with skips, torch.utils.checkpoint around every child of the named lists."""
    parts = [m for kind in kinds for m in _children(model.get_submodule(kind))]

    def run(x: Tensor) -> Any:
        for part in parts:
            inside = type(part).forward.__get__(part)
            part.forward = lambda *a, f=inside: checkpoint(f, *a, use_reentrant=False)
        try:
            return model(x)
        finally:
            for part in parts:
                del part.forward

    return run


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


LEVELS = {
    "unet": ("down", "bottom", "merge"),
    "unet_bn": ("down", "bottom", "merge"),
    "unet3d": ("down", "merge"),
}


BLOCKS: dict[str, Callable[[Any], list[Callable[[Any], Any]]]] = {
    "vgg16": _vgg_blocks,
    "resnet50": _resnet_blocks,
    "edsr": _edsr_blocks,
    "per_pixel": lambda model: list(model),
}


def contenders(
    case: Case, model: nn.Module, x: Tensor, target: Tensor, loss: Loss, quick: bool
) -> list[Contender]:
    def training(run: Callable[[], Tensor]) -> Step:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            run().backward()

        return step

    found = [Contender("plain eager", training(lambda: loss(model(x), target)))]
    last_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    found.append(
        Contender(
            "plain channels_last", training(lambda: loss(model(x.to(memory_format=last_format)), target))
        )
    )
    if case.network in LEVELS:
        every = modules_checkpointed(model, LEVELS[case.network])
        deep = modules_checkpointed(model, LEVELS[case.network][1:])
        for name, net in (("checkpoint every level", every), ("checkpoint bottom and decoder", deep)):
            found.append(Contender(name, training(lambda net=net: loss(net(x), target))))
    for pieces in (2, 4, 6, 9, 18) if case.network == "resnet50" else (2, 4, 6):
        if case.network in LEVELS:
            break
        net = checkpointed(model, case, pieces)
        found.append(Contender(f"checkpoint {pieces}", training(lambda net=net: loss(net(x), target))))
    if case.compiled and not quick:
        found += [_compiled(model, x, target, loss, budget, training) for budget in (1.0, 0.5)]
    graph = with_loss(rowtune.trace(model, (x,)), loss)
    for name, build in case.plans.items():
        module = rowtune.apply(model, build(graph), loss)
        found.append(Contender(name, training(lambda module=module: module(x, targets=target))))
    return found


def _compiled(
    model: nn.Module, x: Tensor, target: Tensor, loss: Loss, budget: float, training: Any
) -> Contender:
    """torch.compile keeps its budget in a global, read when the backward graph is made: compile now."""
    import torch._functorch.config as config

    torch._dynamo.reset()
    old, config.activation_memory_budget = config.activation_memory_budget, budget
    try:
        net = torch.compile(model, dynamic=False)
        step = training(lambda: loss(net(x), target))
        step()
    finally:
        config.activation_memory_budget = old
    return Contender(f"torch.compile, budget {budget}", step, live=False)


# -- measuring --------------------------------------------------------------------------------


def measure(case: Case, rounds: int, quick: bool, only: tuple[str, ...]) -> dict[str, Any]:
    model = rowtune.zoo.build(case.network, **case.options)
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    loss = parse(case.loss)
    with torch.device("meta"):
        probe = rowtune.trace(model, (torch.empty(case.shape),))
    target = synthetic_target(loss, probe.values[probe.outputs[0]].shape, torch.float32, 0)
    everyone = contenders(case, model, x, target, loss, quick)
    field_ = [c for c in everyone if c.name.startswith(only)]
    memory(field_, model, x, target)
    best = min((c for c in field_ if c.name.startswith("checkpoint")), key=lambda c: c.activation_bytes or 0)
    running = [c for c in field_ if not c.name.startswith("checkpoint") or c is best]
    best.name = f"least checkpointing ({best.name})"
    for r in range(rounds):  # measuring memory has warmed everything up
        for contender in running:
            gc.collect()
            start = time.perf_counter()
            contender.step()
            contender.times.append(time.perf_counter() - start)
        print(f"  round {r + 1} of {rounds}", flush=True)
    return report(case, running)


def memory(field_: list[Contender], model: nn.Module, x: Tensor, target: Tensor) -> None:
    """Peaks and, against plain, gradients."""
    reference: dict[str, Tensor] = {}
    for contender in field_:
        model.zero_grad(set_to_none=True)
        gc.collect()
        contender.allocator_bytes = allocator_peak(contender.step)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if not reference:
            reference = grads
        largest = max(float(g.abs().max()) for g in reference.values())
        contender.gradient_error = max(
            float((grads[n] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * largest)
            for n, g in reference.items()
        )
        del grads
        if contender.live:
            model.zero_grad(set_to_none=True)
            contender.activation_bytes = live_peak(contender.step, model, (x, target))
        print(f"  memory of {contender.name}: {contender.activation_bytes}", flush=True)


def live_peak(step: Step, model: nn.Module, batch: tuple[Tensor, ...]) -> int:
    meter = LiveMeter("cpu")
    meter.start([*batch, *model.parameters(), *model.buffers()], [*model.parameters(), *model.buffers()])
    with meter:
        step()
    meter.tag([p.grad for p in model.parameters() if p.grad is not None])
    return meter.peaks().activation_bytes


def report(case: Case, running: list[Contender]) -> dict[str, Any]:
    plain = running[0]
    base_time = statistics.median(plain.times)
    rows = []
    print(
        f"\n{case.name}  (plain: {base_time:.2f} s, activation peak {plain.activation_bytes / 2**20:.0f} MiB)"
    )
    print(f"{'':44s}{'time x':>8s}{'activation x':>14s}{'allocator x':>13s}{'gradients':>11s}")
    for c in running:
        t = statistics.median(c.times) / base_time
        a = c.activation_bytes / plain.activation_bytes if c.activation_bytes else None
        m = c.allocator_bytes / plain.allocator_bytes if c.allocator_bytes and plain.allocator_bytes else None
        shown = f"{a:14.3f}" if a is not None else f"{'-':>14s}"
        print(f"{c.name:44s}{t:8.2f}{shown}{m:13.3f}{c.gradient_error:11.1e}", flush=True)
        rows.append(
            {
                "name": c.name, "time_ratio": t, "activation_ratio": a, "allocator_ratio": m,
                "median_seconds": statistics.median(c.times), "seconds": c.times,
                "activation_bytes": c.activation_bytes, "allocator_bytes": c.allocator_bytes,
                "gradient_error": c.gradient_error,
            }
        )  # fmt: skip
    return {"case": case.name, "shape": case.shape, "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="how a case's name begins, and words it contains")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--only", nargs="*", default=[], help="contenders whose name starts so; and plain eager"
    )
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    today = datetime.date.today().isoformat()
    for case in CASES:
        if given.cases and not (
            case.name.startswith(given.cases[0]) and all(word in case.name for word in given.cases)
        ):
            continue
        print(f"\n{case.name}", flush=True)
        found = measure(
            case, given.rounds, given.quick, ("plain eager", *given.only) if given.only else ("",)
        )
        found |= {"date": today, "torch": torch.__version__, "threads": given.threads, "rounds": given.rounds,
                  "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU"}  # fmt: skip
        size = "x".join(map(str, case.shape))
        path = results / f"{today}-cpu-{case.file or case.network}-{size}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
