"""What is known for sure of the chosen plan: measured figures, distances from predictions, and what was left
unexplored."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from rowtune.errors import PlanError
from rowtune.plan.file import PlanFile
from rowtune.plan.plan import Plan
from rowtune.report.page import Certificate, Knob
from rowtune.tune.records import Record
from rowtune.tune.savers import ASKED, used

FIXED = (
    "by the planner's design: segments end at some twenty places of the network, bands run along one axis, "
    "and not every band height and schedule was recorded"
)


def certificate(file: PlanFile, records: Sequence[Record], knobs: Sequence[Knob]) -> Certificate:
    limit = file.budget_bytes - file.reserve_bytes
    bound = min(
        (
            r.predicted_seconds
            for r in records
            if r.predicted_seconds and r.predicted_bytes is not None and r.predicted_bytes <= limit
        ),
        default=None,
    )
    step = file.measured.get("step_seconds")
    if step and bound and bound > step:
        bound = (
            None  # predicted before steps corrected the times: what is slower than a real step bounds nothing
        )
    return Certificate(
        peak_bytes=file.measured.get("peak_bytes"),
        limit_bytes=limit,
        allocator_peak_bytes=file.measured.get("allocator_peak_bytes"),
        predicted_peak_bytes=file.predicted.get("peak_bytes"),
        gradient_error=file.measured.get("max_relative_error"),
        allowed_error=file.plan.allowed_error,
        step_seconds=step,
        bound_seconds=bound,
        over_bound=step / bound - 1 if step and bound else None,
        measured_plans=sum(r.status != "rejected" and r.decisions is not None for r in records),
        unexplored=tuple(_unexplored(records, knobs)),
    )


def _unexplored(records: Sequence[Record], knobs: Sequence[Knob]) -> list[str]:
    found = []
    rejected = sum(r.status == "rejected" for r in records)
    if rejected:
        found.append(f"{_plans(rejected)} predicted only, and not run")
    slow = sum(r.status == "slow" for r in records)
    if slow:
        found.append(f"{_plans(slow)} left after one step, which was too slow")
    never = [f"{k.name} {c.value}" for k in knobs for c in k.choices if not c.measured]
    if never:
        found.append(f"proposed but not measured: {', '.join(never)}")
    unused = unused_savers(records)
    if unused and records:
        found.append(f"no plan tried uses {', '.join(unused)} (--savers +{',+'.join(unused)} allows it)")
    return [*found, FIXED]


def unused_savers(records: Sequence[Record]) -> list[str]:
    """Savers that a search has to be allowed, and that no plan tried uses."""
    seen: set[str] = set()
    for record in records:
        with contextlib.suppress(PlanError, TypeError):  # decisions of another version
            seen |= used(Plan.from_dict(dict(record.decisions or {})))
    return [name for name in ASKED if name not in seen]


def _plans(count: int) -> str:
    return f"{count} plan was" if count == 1 else f"{count} plans were"
