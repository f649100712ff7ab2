"""A plan file and the records of its search -> the content of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rowtune.plan.file import PlanFile
from rowtune.plan.plan import Plan
from rowtune.report.advice import Study, advice
from rowtune.report.certificate import certificate
from rowtune.report.knobs import knobs
from rowtune.report.page import Failure, Memory, Page, Point, Stretch, Verdict
from rowtune.report.step import StepCost, Unknown
from rowtune.report.words import kind, nested, policies
from rowtune.tune.records import PLAIN, Record, front, readable_records
from rowtune.tune.sizes import format_bytes

REASON = 160
"""Letters of a reason that make two failures alike."""


def read_study(file: PlanFile, path: Path) -> tuple[list[Record], str]:
    """The trials of the study beside a plan, the last measurement of each, and what was wrong with their
    file; without it only the plan's front is known."""
    records = path.parent / Path(file.study).name
    if file.study and records.is_file():
        found, bad = readable_records(records)
        note = f"{records}: {bad} damaged line(s) left out" if bad else ""
        return list({r.digest: r for r in found}.values()), note
    members = [
        Record(
            str(i), "ok", decisions=m["decisions"], peak_bytes=m["peak_bytes"], step_seconds=m["step_seconds"]
        )
        for i, m in enumerate(file.front)
        if not m.get("predicted")
    ]
    if file.predicted_for:
        return members, ""
    return members, f"{records} is missing: showing the plans on the front only"


def make_page(file: PlanFile, records: Sequence[Record], name: str, step: StepCost | Unknown) -> Page:
    """The content of a report.

    Args:
        records: of the study, the last of each plan, plain PyTorch's included.
        name: of the plan file, for people.
        step: the plan's step (`step_cost`), or why it is not known.
    """
    limit = file.budget_bytes - file.reserve_bytes
    segments, memory, note = _step(file, step)
    mattered = knobs(records, limit)
    study = Study(file, name, records, front([r for r in records if r.digest != PLAIN]), limit)
    problem = file.problem
    return Page(
        plan=name,
        model=str(problem.model),
        inputs=tuple(map(str, problem.inputs)),
        training=f"{problem.loss}, {problem.optimizer}, on {problem.device}",
        device=problem.device,
        words=policies(file.plan.to_dict()),
        verdict=verdict(file, memory),
        predicted=dict(file.predicted),
        measured=dict(file.measured),
        segments=segments,
        memory=memory,
        note=note,
        trials=_points(file, records, limit),
        front=tuple(dict(member) for member in file.front),
        knobs=mattered,
        failures=_failures(records),
        advice=advice(study),
        certificate=certificate(file, records, mattered),
        versions=dict(file.versions),
        savings=() if isinstance(step, Unknown) else step.savings,
        host_bytes=0 if isinstance(step, Unknown) else step.host_bytes,
    )


def verdict(file: PlanFile, memory: Memory | None) -> Verdict:
    """One sentence, and its figures."""
    m, limit = file.measured, file.budget_bytes - file.reserve_bytes
    peak, step = m.get("peak_bytes") or 0, m.get("step_seconds")
    plain_peak, plain_step = m.get("plain_peak_bytes"), m.get("plain_step_seconds")
    times = step / plain_step if step and plain_step else None
    if file.predicted_for:
        return _foreseen(file, limit)
    fits = 0 < peak <= limit
    word = "fits" if fits else "does not fit" if peak else "was not measured in"
    parts = [f"{word} {format_bytes(file.budget_bytes)}: peak {format_bytes(peak or None)}"]
    parts += [f", {times:.2f}x plain's time"] if times else []
    if plain_peak:
        parts.append(f"; plain needs {format_bytes(plain_peak)}")
    elif memory is not None:
        parts.append(f"; plain would need {format_bytes(memory.plain.peak_bytes)} and could not run here")
    else:
        parts.append("; plain could not run here")
    return Verdict("".join(parts), fits, peak, file.budget_bytes, limit, step, plain_peak, plain_step, times)


def _foreseen(file: PlanFile, limit: int) -> Verdict:
    """Of a plan that was not measured."""
    peak, step = int(file.predicted.get("peak_bytes") or 0), file.predicted.get("seconds")
    fits = peak <= limit
    words = f"is predicted {'to fit' if fits else 'not to fit'} {format_bytes(file.budget_bytes)}"
    text = (
        f"{words}: peak {format_bytes(peak)}; nothing was measured, times are those of {file.predicted_for}"
    )
    return Verdict(text, fits, peak, file.budget_bytes, limit, step, None, None, None)


def _step(file: PlanFile, step: StepCost | Unknown) -> tuple[tuple[Stretch, ...], Memory | None, str]:
    """The plan's segments with what is known of them, memory over the step, and what is missing."""
    found = stretches(file.plan)
    if isinstance(step, Unknown):
        return found, None, step.why
    costs = iter(step.segments)
    known = [replace(s, **vars(next(costs))) if s.depth == 0 else s for s in found]
    rough = "" if step.timed else "this device was not calibrated: segments' times are rough"
    return tuple(known), step.memory, rough


def stretches(plan: Plan) -> tuple[Stretch, ...]:
    """A plan's segments, those inside a checkpoint behind it."""
    return tuple(_stretch(depth, s) for depth, s in nested(plan.to_dict()["segments"]))


def _stretch(depth: int, s: Mapping[str, Any]) -> Stretch:
    rows = s["policy"] == "rows"
    return Stretch(
        first=s["first"],
        last=s["last"],
        depth=depth,
        policy=s["policy"],
        band_rows=s.get("band_rows", 0),
        images=s.get("images", 0),
        halo=s.get("halo", "sweep") if rows else "",
        tapes=s.get("tapes", "split") if rows and s.get("halo", "sweep") == "sweep" else "",
        barriers=s.get("barriers", "store") if rows else "",
        store=s.get("store", "device"),
        cheap=s.get("cheap", "store"),
    )


def _points(file: PlanFile, records: Sequence[Record], limit: int) -> tuple[Point, ...]:
    """Every plan tried; the chosen one with the figures of the plan file."""
    chosen = file.plan.to_dict()
    best = {record.digest for record in front(records)}
    return tuple(
        Point(
            plan=policies(r.decisions),
            kind=kind(r.decisions),
            status=r.status,
            reason=r.reason,
            peak_bytes=r.peak_bytes,
            predicted_bytes=r.predicted_bytes,
            step_seconds=r.step_seconds,
            predicted_seconds=r.predicted_seconds,
            fits=r.ok and (r.peak_bytes or 0) <= limit,
            best=r.digest in best,
            chosen=r.decisions == chosen,
        )
        for r in records
    )


def _failures(records: Sequence[Record]) -> tuple[Failure, ...]:
    """What did not become a measurement, the most frequent first; figures in reasons do not tell two of
    the kinds apart that rowtune itself gives."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], Record] = {}
    for record in records:
        if record.status == "ok":
            continue
        key = record.status, _kind_of_reason(record)
        counts[key] += 1
        examples.setdefault(key, record)
    return tuple(
        Failure(status, reason, count, policies(examples[status, reason].decisions))
        for (status, reason), count in counts.most_common()
    )


def _kind_of_reason(record: Record) -> str:
    if record.status == "slow":
        return "its first step was too slow to win"
    if record.status == "rejected" and record.reason.startswith("predicted"):
        over = "over the budget" in record.reason
        return "predicted over the budget, not run" if over else "predicted too slow to win, not run"
    return record.reason[:REASON] or "no reason given"
