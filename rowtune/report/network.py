"""A model as `rowtune inspect` maps it: its stages, what bounds banding, and what a step would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rowtune.cost.predict import composed
from rowtune.graph.bands import banding
from rowtune.graph.cuts import barrier_parts, opaque_nodes, stretches
from rowtune.graph.graph import Graph
from rowtune.graph.rules import Opaque
from rowtune.graph.stages import Stage, multiply_adds, stages
from rowtune.plan.plan import Plan, Segment
from rowtune.tune.fit import least_peaks
from rowtune.tune.step import Workload

AXIS = 2
HIDDEN = frozenset(
    {"update_running", "add_", "moments", "getitem", "write_buffer", "loss_combine", "loss_sums"}
)
"""Parts of operators, and bookkeeping: not said among a stage's operations."""
CALLED = {"normalise": "norm"}


@dataclass(frozen=True)
class MappedStage:
    """A stretch of the network of one resolution. `kept_bytes` is what plain PyTorch's forward leaves there
    for backward, `multiply_adds` its forward's. `banding`: whole (rows run through), barriers (rows run
    through, and must all have passed so many times) or stops, at the operators in `stops` with reasons."""

    name: str
    first: str
    last: str
    shape: tuple[int, ...]
    kept_bytes: int
    operations: Mapping[str, int]
    multiply_adds: int
    banding: str
    barriers: int
    stops: tuple[tuple[str, str], ...]


def describe(work: Workload, watch: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Plain JSON values: what the model is, its stages, the stretches that can be banded and what bounds
    them, and the predicted peaks of plain PyTorch, of the best checkpointing and of the smallest plan.

    Args:
        watch: told what is predicted now, for people who wait.
    """
    graph = work.graph
    total = sum(graph.values[node.name].bytes for node in graph.nodes) or 1
    watch("stages")
    mapped = mapped_stages(graph)
    watch("peaks")
    peaks = least_peaks(work)
    return {
        "status": "ok",
        "model": str(work.problem.model),
        "fingerprint": graph.fingerprint,
        "inputs": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in work.problem.inputs],
        "outputs": [list(graph.values[name].shape) for name in work.traced.outputs],
        "loss_output": work.traced.outputs.index(graph.loss_output),
        "parameters": sum(p.numel() for p in work.module.parameters()),
        "norm_layers": len(work.loaded.norm_layers),
        "loss": work.problem.loss,
        "optimizer": work.problem.optimizer,
        "nodes": len(graph.nodes),
        "multiply_adds": multiply_adds(graph, graph.nodes),
        "stages": [asdict(stage) for stage in mapped],
        "segments": _bandable(graph),
        "opaque": [
            {"node": n, "operator": op, "reason": why, "share": graph.values[n].bytes / total}
            for n, op, why in opaque_nodes(graph)
        ],
        "plain_peak_bytes": peaks["plain"],
        "predicted_peaks": peaks,
        "notes": list(work.loaded.notes),
    }


def mapped_stages(graph: Graph) -> tuple[MappedStage, ...]:
    """A training graph's stages; what they keep is that of a plan that keeps everything, stage by stage."""
    found = stages(graph, AXIS)
    segments = tuple(Segment(graph.nodes[s.start].name, graph.nodes[s.stop - 1].name) for s in found)
    _, peak = composed(graph, Plan(segments, AXIS))
    kept = [max(mark.after - mark.before, 0) for mark in peak.forward]
    return tuple(_mapped(graph, stage, size) for stage, size in zip(found, kept, strict=True))


def _mapped(graph: Graph, stage: Stage, kept: int) -> MappedStage:
    nodes = graph.nodes[stage.start : stage.stop]
    rules = banding(graph, AXIS).rules
    stops: dict[tuple[str, str], None] = {}
    for node in nodes:
        rule = rules[node.name]
        if isinstance(rule, Opaque) and not node.effect:
            stops[node.op, rule.reason] = None
    barriers = len(barrier_parts(graph, stage.start, stage.stop, AXIS)) - 1 if not stops else 0
    operations = Counter(CALLED.get(n.op, n.op) for n in nodes if n.op not in HIDDEN)
    return MappedStage(
        name=stage.name,
        first=nodes[0].name,
        last=nodes[-1].name,
        shape=stage.shape,
        kept_bytes=kept,
        operations=dict(operations.most_common()),
        multiply_adds=multiply_adds(graph, nodes),
        banding="stops" if stops else "barriers" if barriers else "whole",
        barriers=barriers,
        stops=tuple(stops),
    )


def _bandable(graph: Graph) -> list[dict[str, Any]]:
    """The longest stretches that can be one rows segment."""
    found = []
    for start, stop in stretches(graph, AXIS):
        nodes = graph.nodes[start:stop]
        found.append(
            {
                "first": nodes[0].name,
                "last": nodes[-1].name,
                "nodes": len(nodes),
                "bytes": sum(graph.values[node.name].bytes for node in nodes),
                "barriers": len(barrier_parts(graph, start, stop, AXIS)) - 1,
            }
        )
    return found
