"""Points of the front that nobody measured: the programme's, as predicted, for other budgets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rowtune.cost.programme import plan_of
from rowtune.plan.plan import Plan
from rowtune.tune.records import Record
from rowtune.tune.space import ProgrammeSpace


def measured_point(record: Record) -> dict[str, Any]:
    """A member of a plan file's front."""
    return {
        "peak_bytes": record.peak_bytes,
        "step_seconds": record.step_seconds,
        "decisions": dict(record.decisions or {}),
    }


def predicted_points(
    space: ProgrammeSpace,
    overhead: int = 0,
    correction: float = 1.0,
    slower: float = 1.0,
    more: Sequence[Plan] = (),
) -> list[dict[str, Any]]:
    """The fastest plans under a few limits, from the smallest that will do to what plain PyTorch takes.

    Args:
        overhead: bytes that the device takes beside tensors.
        correction: measured over predicted peak, as seen so far; peaks are not taken to be smaller than
            predicted.
        slower: measured over predicted seconds, likewise.
        more: other plans that may be points.
    """
    plans = dict.fromkeys([*more, *(plan_of(space.table, path) for path in space.paths())])
    found = []
    for plan in plans:
        cost = space.predict(plan)
        found.append(
            {
                "peak_bytes": int(cost.peak_bytes * max(correction, 1.0)) + overhead,
                "step_seconds": cost.seconds * slower,
                "decisions": plan.to_dict(),
                "predicted": True,
            }
        )
    return found


def joined(
    measured: Iterable[Mapping[str, Any]], predicted: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Any], ...]:
    """Of all points those that no other beats in both memory and time, by increasing peak. A measured one is
    beaten by none that was predicted only, and of a plan that was measured the prediction is forgotten."""
    best, plans = [], set()
    for point in measured:
        plans.add(str(point["decisions"]))
        best.append(point)
    best = _unbeaten(best)
    others = [p for p in predicted if str(p["decisions"]) not in plans]
    kept = [*best, *(p for p in _unbeaten([*best, *others]) if p.get("predicted"))]
    return tuple(dict(p) for p in sorted(kept, key=lambda p: (p["peak_bytes"], -p["step_seconds"])))


def _unbeaten(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["peak_bytes"], p["step_seconds"])):
        if not kept or point["step_seconds"] < kept[-1]["step_seconds"]:
            kept.append(point)
    return kept


def pace(space: ProgrammeSpace, records: Sequence[Record]) -> float:
    """How much longer than predicted the steps of these plans took; 1 where there are none."""
    ratios = [
        record.step_seconds / space.predict(Plan.from_dict(dict(record.decisions))).seconds
        for record in records
        if record.step_seconds and record.decisions
    ]
    return statistics.median(ratios) if ratios else 1.0
