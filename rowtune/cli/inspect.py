"""`rowtune inspect`: what a model is, where its rows can be banded, and where and why banding stops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rowtune.cli import options
from rowtune.cli.calls import show_calls
from rowtune.cli.lists import show_lists
from rowtune.cli.screen import Screen, facts, plain_table

if TYPE_CHECKING:
    from rowtune.tune.step import Workload

# Stretches shown without -v: the largest.
MOST = 12


def command(
    model: options.Model,
    shape: options.Shapes = None,
    model_arg: options.ModelArgs = None,
    dtype: options.Dtype = "",
    loss: options.LossName = "",
    optimizer: options.OptimizerName = "",
    seed: options.Seed = 0,
    calls: Annotated[
        bool, typer.Option("--calls", help="MODEL is a plan.json: list the calls of one step of it.")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what a model is, and where and why banding stops; of a plan.json, how its segments are run."""
    from rowtune.importers.source import PT2_WARNING, parse_source
    from rowtune.tune.step import define

    screen = Screen(as_json, quiet, verbose)
    if calls or model.endswith(".json"):
        (show_calls if calls else show_lists)(screen, Path(model))
        return
    source = parse_source(model, model_arg or ())
    screen.opening(source)
    work = define(source, shape or (), dtype=dtype, loss=loss, optimizer=optimizer, seed=seed)
    found = describe(work)
    screen.notes(note for note in work.loaded.notes if note != PT2_WARNING)
    _show(screen, work, found)
    screen.json(found)


def describe(work: Workload) -> dict[str, Any]:
    """The JSON of inspect."""
    from rowtune.graph.cuts import barrier_parts, opaque_nodes, stretches
    from rowtune.tune.reference import plain_peak

    graph = work.graph
    segments = []
    for start, stop in stretches(graph, 2):
        nodes = graph.nodes[start:stop]
        size = sum(graph.values[node.name].bytes for node in nodes)
        barriers = len(barrier_parts(graph, start, stop, 2)) - 1
        segments.append(
            {
                "first": nodes[0].name,
                "last": nodes[-1].name,
                "nodes": len(nodes),
                "bytes": size,
                "barriers": barriers,
            }
        )
    total = sum(graph.values[node.name].bytes for node in graph.nodes) or 1
    inputs = [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in work.problem.inputs]
    return {
        "status": "ok",
        "model": str(work.problem.model),
        "fingerprint": graph.fingerprint,
        "inputs": inputs,
        "outputs": [list(graph.values[name].shape) for name in work.traced.outputs],
        "loss_output": work.traced.outputs.index(graph.loss_output),
        "parameters": sum(p.numel() for p in work.module.parameters()),
        "norm_layers": len(work.loaded.norm_layers),
        "loss": work.problem.loss,
        "optimizer": work.problem.optimizer,
        "nodes": len(graph.nodes),
        "segments": segments,
        "opaque": [
            {"node": n, "operator": op, "reason": why, "share": graph.values[n].bytes / total}
            for n, op, why in opaque_nodes(graph)
        ],
        "plain_peak_bytes": plain_peak(work),
        "notes": list(work.loaded.notes),
    }


def _show(screen: Screen, work: Workload, found: dict[str, Any]) -> None:
    from rowtune.tune.sizes import format_bytes

    total = sum(work.graph.values[n.name].bytes for n in work.graph.nodes) or 1
    banded = sum(s["bytes"] for s in found["segments"])
    outputs = ["x".join(map(str, shape)) for shape in found["outputs"]]
    screen.out.print(
        facts(
            [
                ("model", f"{found['model']}  (fingerprint {found['fingerprint']})"),
                ("inputs", ", ".join(map(str, work.problem.inputs))),
                ("outputs" if len(found["outputs"]) > 1 else "output", ", ".join(outputs)),
                ("parameters", f"{found['parameters']:,} in {len(list(work.module.parameters()))} tensors"),
                ("norm layers", str(found["norm_layers"])),
                ("loss", found["loss"] + (" (on the first output)" if len(outputs) > 1 else "")),
                ("optimizer", found["optimizer"]),
                ("plain's peak", f"{format_bytes(found['plain_peak_bytes'])} predicted"),
                ("bandable", f"{banded / total:.0%} of the bytes of all {found['nodes']} nodes' outputs"),
            ]
        )
    )
    _segments(screen, found["segments"])
    if found["opaque"]:
        _opaque(screen, found["opaque"])


def _segments(screen: Screen, segments: list[dict[str, Any]]) -> None:
    from rowtune.tune.sizes import format_bytes

    table = plain_table(
        ("rows can run from", "left"),
        ("to", "left"),
        ("nodes", "right"),
        ("barriers", "right"),
        ("outputs", "right"),
    )
    largest = sorted(segments, key=lambda s: s["bytes"], reverse=True)
    shown = segments if screen.verbose else [s for s in segments if s in largest[:MOST]]
    for s in shown:
        table.add_row(s["first"], s["last"], str(s["nodes"]), str(s["barriers"]), format_bytes(s["bytes"]))
    screen.out.print()
    screen.out.print(table if segments else "No stretch of this network can be banded by rows.")
    if len(shown) < len(segments):
        screen.out.print(f"... and {len(segments) - MOST} smaller ones (-v shows all)", style="dim")


def _opaque(screen: Screen, opaque: list[dict[str, Any]]) -> None:
    """One line an operator and reason, with its first node; every node with -v."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in opaque:
        groups.setdefault((item["operator"], item["reason"]), []).append(item)
    table = plain_table(
        ("banding stops at", "left"),
        ("times", "right"),
        ("memory", "right"),
        ("nodes", "left"),
        ("because", "left"),
    )
    for (operator, reason), items in groups.items():
        nodes, share = [item["node"] for item in items], sum(item["share"] for item in items)
        names = ", ".join(nodes) if screen.verbose or len(nodes) < 3 else f"{nodes[0]} ... {nodes[-1]}"
        table.add_row(operator, str(len(nodes)), f"{share:.1%}", names, reason)
    screen.out.print()
    screen.out.print(table)
