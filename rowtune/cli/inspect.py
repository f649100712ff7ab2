"""`rowtune inspect`: what a model is, where its rows can be banded, and where and why banding stops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from rowtune.cli import options
from rowtune.cli.calls import show_calls
from rowtune.cli.charts import gauge
from rowtune.cli.lists import show_lists
from rowtune.cli.screen import BAD, GOOD, SOFT, Screen, facts, plain_table
from rowtune.tune.sizes import format_both, format_bytes, format_count

if TYPE_CHECKING:
    from rowtune.tune.step import Workload

# Stretches shown without -v: the largest. Operations named of a stage where a terminal is so wide; cells of
# its bar.
MOST, NAMED, WIDE, BAR = 12, 4, 110, 12


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
    from rowtune.report.network import describe
    from rowtune.tune.step import define

    screen = Screen(as_json, quiet, verbose)
    if calls or model.endswith(".json"):
        (show_calls if calls else show_lists)(screen, Path(model))
        return
    source = parse_source(model, model_arg or ())
    screen.opening(source)
    work = define(source, shape or (), dtype=dtype, loss=loss, optimizer=optimizer, seed=seed)
    with screen.err.status("predicting ...") as status:
        found = describe(work, lambda text: status.update(f"predicting {text} ..."))
    screen.notes(note for note in work.loaded.notes if note != PT2_WARNING)
    _show(screen, work, found)
    screen.json(found)


def _show(screen: Screen, work: Workload, found: dict[str, Any]) -> None:
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
                ("multiply-adds", f"{format_count(found['multiply_adds'])} in a forward"),
                ("bandable", f"{banded / total:.0%} of the bytes of all {found['nodes']} nodes' outputs"),
            ]
        )
    )
    _stages(screen, found["stages"])
    _peaks(screen, found["predicted_peaks"])
    if screen.verbose or not found["segments"]:
        _segments(screen, found["segments"])
    if found["opaque"]:
        _opaque(screen, found["opaque"])


def _stages(screen: Screen, stages: list[dict[str, Any]]) -> None:
    """The network from input to loss; a bar says where plain PyTorch's memory goes."""
    wide = screen.out.width >= WIDE or screen.verbose
    table = plain_table(
        ("stage", "left"), ("feature maps", "left"), ("plain keeps", "right"), ("", "left"),
        ("bands", "left"), *((("mult-adds", "right"), ("operations", "left")) if wide else ()),
    )  # fmt: skip
    most = max((s["kept_bytes"] for s in stages), default=0) or 1
    for s in stages:
        operations = [f"{n} {op}" if n > 1 else op for op, n in s["operations"].items()]
        more = (
            f" and {len(operations) - NAMED} more" if len(operations) > NAMED and not screen.verbose else ""
        )
        named = operations if screen.verbose else operations[:NAMED]
        table.add_row(
            Text(s["name"] or s["first"]),
            "x".join(map(str, s["shape"])),
            format_bytes(s["kept_bytes"]),
            Text("━" * round(BAR * s["kept_bytes"] / most), "cyan"),
            _bands(s),
            *((format_count(s["multiply_adds"]), Text(", ".join(named) + more, SOFT)) if wide else ()),
        )
    screen.out.print()
    screen.out.print(table)


def _bands(stage: dict[str, Any]) -> Text:
    if stage["banding"] == "stops":
        return Text(f"stop at {', '.join(sorted({op for op, _ in stage['stops']}))}", BAD)
    barriers = stage["barriers"]
    word = "" if not barriers else f", {barriers} barrier{'s' if barriers > 1 else ''}"
    return Text(f"run through{word}", GOOD)


def _peaks(screen: Screen, peaks: dict[str, int]) -> None:
    """What a training step takes at least, each way."""
    names = {"plain": "plain PyTorch", "checkpointing": "best checkpointing", "rowtune": "smallest plan"}
    rows = [
        (names[way], Text.assemble(gauge(peak, peaks["plain"]), f"  {format_both(peak)}"))
        for way, peak in peaks.items()
    ]
    screen.out.print()
    screen.out.print("[bold]Predicted peaks of a training step[/]")
    screen.out.print(facts(rows))


def _segments(screen: Screen, segments: list[dict[str, Any]]) -> None:
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
