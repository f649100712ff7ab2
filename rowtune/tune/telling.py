"""What a search says of itself: why it measures what it measures, and how long it will take at most."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rowtune.tune.sizes import format_bytes, format_seconds


def why(values: Mapping[str, Any], knobs: Sequence[Any]) -> str:
    """What a setting asks of the programme beyond its own best plan."""
    asked = {k.name: values[k.name] for k in knobs if values.get(k.name, k.choices[0]) != k.choices[0]}
    if not asked:
        return "the best plan by prediction"
    words = ", ".join(f"{name} {value}" for name, value in asked.items())
    return f"the best by prediction with {words}"


def expected(peak_bytes: int, seconds: float) -> str:
    return f"predicted {format_bytes(peak_bytes)}, {format_seconds(seconds)} a step"


class Pace:
    """How long the rest may take, from how long trials took so far, without the planning before them."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.first = 0

    def begin(self, measured: int) -> None:
        """The first plan is about to be measured."""
        if self.began is None:
            self.began, self.first = time.monotonic(), measured

    def left(self, measured: int, trials: int, limit: float) -> float | None:
        """Seconds at most, within `limit`; None while nothing is known but that there is no limit."""
        done = measured - self.first
        known = math.isfinite(limit)
        if self.began is None or done < 2:
            return max(limit, 0.0) if known else None
        each = (time.monotonic() - self.began) / done
        return max(min(limit, each * max(trials - measured, 0)), 0.0)
