"""`rowtune report`: what was tried, what was chosen, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from rowtune.cli import options
from rowtune.cli.charts import Point, gauge, legend, scatter
from rowtune.cli.progress import policies
from rowtune.cli.run import read_plan
from rowtune.cli.screen import BAD, GOOD, MARKS, SOFT, Screen, facts, plain_table

if TYPE_CHECKING:
    from rowtune.plan.file import PlanFile
    from rowtune.tune.records import Record

CHOSEN, PLAIN, TABLE_ROWS = "★", "P", 12


def command(
    plan: options.PlanPath = Path("plan.json"),
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Pack what a bug report needs into this zip archive; no weights."),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what was tried, what was chosen, and why."""
    screen = Screen(as_json, quiet, verbose)
    file = read_plan(plan)
    if bundle is not None:
        from rowtune.cli.bundle import write_bundle

        write_bundle(screen, plan, file, bundle, force)
    if file.predicted_for:
        screen.note(f"nothing of this plan was measured: it was predicted for {file.predicted_for}")
    records = _records(screen, file, plan)
    show(screen, file, records, str(plan))
    screen.json(as_dict(file, records, str(plan)))


def _records(screen: Screen, file: PlanFile, plan: Path) -> list[Record]:
    """The trials, last measurement of each plan; without the records file only the front is known."""
    from rowtune.tune.records import Record, readable_records

    path = plan.parent / Path(file.study).name
    if file.study and path.is_file():
        found, bad = readable_records(path)
        if bad:
            screen.note(f"{path}: {bad} damaged line(s) left out")
        return list({r.digest: r for r in found}.values())
    if file.study:
        screen.note(f"{path} is missing: showing the plans on the front only")
    return [
        Record(
            str(i), "ok", decisions=m["decisions"], peak_bytes=m["peak_bytes"], step_seconds=m["step_seconds"]
        )
        for i, m in enumerate(file.front)
        if not m.get("predicted")
    ]


def show(screen: Screen, file: PlanFile, records: Sequence[Record], name: str) -> None:
    """Verdict, scatter, segments, trials."""
    out = screen.out
    out.print()
    out.print(f"[bold]{name}[/]  {file.problem.model}")
    out.print(_verdict(file))
    out.print()
    width = min(out.width, 100)
    points, limit = _points(file, records), file.budget_bytes - file.reserve_bytes
    if points:
        out.print("[bold]Memory and time of every plan measured[/]")
        out.print(scatter(points, limit, width))
        out.print(_legend(points))
        out.print()
    out.print("[bold]The plan, segment by segment[/]")
    out.print(segments_table(file.plan.to_dict()["segments"]))
    out.print()
    _trials(screen, file, records)


def _verdict(file: PlanFile) -> Any:
    from rowtune.tune.sizes import format_bytes, format_seconds

    m, limit = file.measured, file.budget_bytes
    peak = m.get("peak_bytes") or 0
    size = f"  {format_bytes(peak)} of {format_bytes(limit)}"
    predicted = file.predicted.get("peak_bytes")
    rows: list[tuple[str, str | Text]] = [
        ("inputs", ", ".join(map(str, file.problem.inputs))),
        ("training", f"{file.problem.loss}, {file.problem.optimizer}, on {file.problem.device}"),
        ("peak", Text.assemble(gauge(peak, limit), size)),
        (
            "predicted",
            f"{format_bytes(predicted)}, at {file.predicted.get('peak_at') or 'an unnamed tensor'}",
        ),
        ("step", format_seconds(m.get("step_seconds"))),
    ]
    if m.get("plain_peak_bytes") and m.get("plain_step_seconds"):
        plain = f"{format_bytes(m['plain_peak_bytes'])}, {format_seconds(m['plain_step_seconds'])} a step"
        share, times = peak / m["plain_peak_bytes"], (m.get("step_seconds") or 0) / m["plain_step_seconds"]
        rows.append(
            ("plain PyTorch", f"{plain}: the plan takes {share:.0%} of its memory, {times:.2f}x its time")
        )
    else:
        rows.append(("plain PyTorch", "does not fit on this machine"))
    if m.get("allocator_peak_bytes"):
        rows.append(("with kernels", f"{format_bytes(m['allocator_peak_bytes'])} allocator's peak"))
    if m.get("max_relative_error") is not None:
        rows.append(("gradients", f"equal to plain's within {m['max_relative_error']:.1e}"))
    return facts(rows)


def kind(decisions: Mapping[str, Any] | None) -> str:
    """rows, checkpoint or keep: the strongest policy a plan uses."""
    used = {s["policy"] for _, s in nested((decisions or {}).get("segments", ()))}
    return next((policy for policy in ("rows", "checkpoint") if policy in used), "keep")


def nested(segments: Sequence[Mapping[str, Any]], depth: int = 0) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(how deep, segment), those inside a checkpoint behind it."""
    for segment in segments:
        yield depth, segment
        yield from nested(segment.get("inside", ()), depth + 1)


def _points(file: PlanFile, records: Sequence[Record]) -> list[Point]:
    from rowtune.tune.records import front

    chosen = file.plan.to_dict()
    best = {record.digest for record in front(records)}
    points = []
    for record in records:
        if not record.ok or record.decisions == chosen:
            continue
        mark, style = MARKS[kind(record.decisions)] if record.decisions else (PLAIN, BAD)
        style = f"bold {style}" if record.digest in best else f"dim {style}"
        points.append(Point(record.peak_bytes or 0, record.step_seconds or 0.0, mark, style))
    points.sort(key=lambda p: (p.mark == PLAIN, p.style.startswith("bold")))
    if file.measured.get("peak_bytes") and file.measured.get("step_seconds"):
        points.append(
            Point(file.measured["peak_bytes"], file.measured["step_seconds"], CHOSEN, f"bold {GOOD}")
        )
    return points


def _legend(points: Sequence[Point]) -> Text:
    names = {PLAIN: "plain PyTorch", CHOSEN: "chosen"} | {mark: policy for policy, (mark, _) in MARKS.items()}
    seen = {p.mark: p.style for p in points}
    entries = [(mark, seen[mark].removeprefix("dim "), name) for mark, name in names.items() if mark in seen]
    text = legend([*entries, ("┊", BAD, "budget")])
    text.append("dim: another plan is both smaller and faster", SOFT)
    return text


def segments_table(segments: Sequence[Mapping[str, Any]]) -> Any:
    table = plain_table(
        ("from", "left"),
        ("to", "left"),
        ("policy", "left"),
        ("band", "right"),
        ("halo", "left"),
        ("more", "left"),
    )
    for depth, s in nested(segments):
        rows = s["policy"] == "rows"
        more = [f"{key} {s[key]}" for key in ("images", "tapes", "barriers") if key in s]
        table.add_row(
            "  " * depth + s["first"],
            s["last"],
            Text(s["policy"], MARKS[s["policy"]][1]),
            str(s.get("band_rows", "")),
            s.get("halo", "sweep") if rows else "",
            ", ".join(more),
        )
    return table


def _trials(screen: Screen, file: PlanFile, records: Sequence[Record]) -> None:
    """What fits first, by time; then what does not, by peak; failures and rejections are counted."""
    limit, chosen = file.budget_bytes - file.reserve_bytes, file.plan.to_dict()
    plans = [r for r in records if r.ok]
    plans.sort(key=lambda r: ((r.peak_bytes or 0) > limit, r.step_seconds or 0.0))
    shown = plans if screen.verbose else plans[:TABLE_ROWS]
    table = plain_table(
        ("", "left"),
        ("plan", "left"),
        ("peak", "right"),
        ("predicted", "right"),
        ("step", "right"),
        ("", "left"),
    )
    for record in shown:
        table.add_row(*_row(record, record.decisions == chosen, limit))
    screen.out.print("[bold]Plans tried, the fastest that fit first[/]")
    screen.out.print(table)
    if len(shown) < len(plans):
        screen.out.print(f"... and {len(plans) - len(shown)} more (-v shows all)", style=SOFT)
    failed = [r for r in records if r.status not in ("ok", "slow", "rejected")]
    slow = sum(r.status == "slow" for r in records)
    rejected = sum(r.status == "rejected" for r in records)
    if rejected:
        screen.out.print(f"{rejected} plans were predicted over the budget and not run", style=SOFT)
    if slow:
        screen.out.print(f"{slow} plans could not win after one step and were left at that", style=SOFT)
    for record in failed if screen.verbose else failed[:4]:
        screen.out.print(Text(f"{record.status}: {policies(record.decisions)}: {record.reason}", BAD))


def _row(record: Record, chosen: bool, limit: int) -> list[str | Text]:
    from rowtune.tune.sizes import format_bytes, format_seconds

    mark, style = (
        (CHOSEN, GOOD) if chosen else MARKS[kind(record.decisions)] if record.decisions else (PLAIN, BAD)
    )
    over = (record.peak_bytes or 0) > limit
    return [
        Text(mark, style),
        policies(record.decisions),
        format_bytes(record.peak_bytes),
        Text(format_bytes(record.predicted_bytes), SOFT),
        format_seconds(record.step_seconds),
        Text("over budget", "yellow") if over else Text("chosen", GOOD) if chosen else Text(""),
    ]


def as_dict(file: PlanFile, records: Sequence[Record], name: str) -> dict[str, Any]:
    """The JSON of report."""
    return {
        "status": "ok",
        "plan": name,
        "model": str(file.problem.model),
        "budget_bytes": file.budget_bytes,
        "predicted": dict(file.predicted),
        "predicted_for": file.predicted_for,
        "measured": dict(file.measured),
        "segments": file.plan.to_dict()["segments"],
        "front": [dict(member) for member in file.front],
        "trials": [
            {
                "plan": policies(r.decisions),
                "status": r.status,
                "reason": r.reason,
                "peak_bytes": r.peak_bytes,
                "predicted_bytes": r.predicted_bytes,
                "step_seconds": r.step_seconds,
                "fits": r.ok and (r.peak_bytes or 0) <= file.budget_bytes - file.reserve_bytes,
            }
            for r in records
        ],
    }
