"""Nothing fits: why, and which budget would do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rowtune.errors import InfeasibleError, ModelError, RowtuneError, UsageError
from rowtune.tune.sizes import format_bytes

if TYPE_CHECKING:
    from rowtune.tune.records import Record
    from rowtune.tune.study import Search


def infeasible(search: Search) -> RowtuneError:
    """Why nothing fits: the least budget that any plan looked at would need."""
    task = search.task
    seen = task.records.latest().values()
    known = [(size, r) for r in seen if (size := _needs(r, search))]
    if not known and search.left() <= 0:
        return UsageError(f"--timeout {task.timeout:.0f} ended before one plan was measured; give more time")
    failed = [r for r in seen if r.status not in ("ok", "slow", "rejected")]
    if not known or (failed and not any(r.ok for r in seen)):
        reasons = "; ".join(sorted({f"{r.status}: {r.reason}" for r in failed or seen})[:3])
        plain = task.records.plain()
        if plain is not None and plain.status == "crash":
            return ModelError(f"the model cannot be trained, with or without a plan: {plain.reason}")
        return InfeasibleError(f"no plan that is predicted to fit could be run: {reasons}")
    size, record = min(known, key=lambda item: item[0])
    how = "measured" if record.ok else "predicted"
    where = f", set by {record.peak_at}" if record.peak_at else ""
    advised = round_up(max(size, task.limit) + task.reserve)
    smallest = f"of {len(known)} plans the smallest needs {format_bytes(size)} ({how}{where})"
    if search.left() <= 0:
        return InfeasibleError(
            f"no plan that was found in the time there was fits {format_bytes(task.limit)}: {smallest}, and "
            f"--timeout {task.timeout:.0f} ended before smaller ones were looked for to the end; give more "
            f"time, or --budget {advised}, or a smaller --shape"
        )
    return InfeasibleError(
        f"no plan fits {format_bytes(task.limit)}: {smallest}; give --budget {advised} or a smaller --shape"
    )


def _needs(record: Record, search: Search) -> int | None:
    """Bytes, where they are known: measured, or predicted and corrected as the search itself does."""
    if record.ok:
        return record.peak_bytes
    predicted = record.predicted_bytes if record.status in ("rejected", "slow") else None
    return math.ceil(predicted * search.correction()) + search.overhead if predicted else None


def round_up(size: int) -> str:
    """A budget flag of three digits that is at least `size`, with one percent to spare."""
    unit = 10 ** max(0, math.floor(math.log10(size * 1.01)) - 2)
    rounded = math.ceil(size * 1.01 / unit) * unit
    for name, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if rounded >= scale:
            return f"{rounded / scale:g}{name}"
    return f"{rounded}B"
