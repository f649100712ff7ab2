"""Which knobs of a search mattered, from its records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rowtune.report.page import Choice, Knob
from rowtune.tune.records import Record


def knobs(records: Sequence[Record], limit: int) -> tuple[Knob, ...]:
    """Of plans that have a time (also of one step only), the most important knob first.

    A knob's importance is the share of the variance of log step times between the groups that its values
    make, less what groups of this number would explain by chance (epsilon squared). Knobs are not
    independent, so shares may add up to more than one.
    """
    timed = [r for r in records if r.values and r.step_seconds]
    names = dict.fromkeys(name for r in records for name in r.values)
    found = [_knob(name, timed, records, limit) for name in names]
    return tuple(sorted(found, key=lambda k: -k.matters))


def _knob(name: str, timed: Sequence[Record], records: Sequence[Record], limit: int) -> Knob:
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if name in record.values:
            groups[str(record.values[name])]  # also values that no measured plan has
    for record in timed:
        if name in record.values:
            groups[str(record.values[name])].append(record)
    choices = tuple(Choice(value, len(group), _best(group, limit)) for value, group in groups.items())
    times = [[math.log(r.step_seconds or 1.0) for r in group] for group in groups.values() if group]
    return Knob(name, importance(times), choices)


def _best(group: Sequence[Record], limit: int) -> float | None:
    fits = [r.step_seconds for r in group if r.ok and (r.peak_bytes or 0) <= limit]
    return min((t for t in fits if t is not None), default=None)


def importance(groups: Sequence[Sequence[float]]) -> float:
    """Epsilon squared of the groups' means: 0 where there is one group, or no more values than groups."""
    values = [v for group in groups for v in group]
    n, k = len(values), len(groups)
    if k < 2 or n <= k:
        return 0.0
    mean = sum(values) / n
    total = sum((v - mean) ** 2 for v in values)
    if not total:
        return 0.0
    within = sum((v - sum(group) / len(group)) ** 2 for group in groups for v in group)
    return max(0.0, min(1.0, 1 - within / total * (n - 1) / (n - k)))
