"""One short file per way to order the bands of a rows segment. Each turns groups into steps."""

from __future__ import annotations

from collections.abc import Callable

from rowtune.plan.schedules import cache, recompute, sweep
from rowtune.plan.schedules.schedule import Request, Schedule

SCHEDULES: dict[str, Callable[[Request], Schedule]] = {
    "recompute": recompute.schedule,
    "cache": cache.schedule,
    "sweep": sweep.schedule,
}
