"""The second budget: what a plan may keep in the host's memory from forward to backward."""

from __future__ import annotations

from rowtune.cost.predict import Cost
from rowtune.errors import InfeasibleError
from rowtune.tune.device import free_bytes
from rowtune.tune.sizes import format_bytes


def half_of_free(processes: int = 1) -> int:
    """Of the host's memory, for each of some processes that train at a time."""
    return free_bytes("cpu") // (2 * processes)


def on_host(cost: Cost, limit: int) -> Cost:
    """The cost of a plan.

    Raises:
        InfeasibleError: it keeps more on the host than `limit`.
    """
    if cost.host_bytes > limit:
        raise InfeasibleError(
            f"predicted to keep {format_bytes(cost.host_bytes)} in the host's memory, over its budget of "
            f"{format_bytes(limit)} (half of what is free, if none is given): give a larger --host-budget, "
            "or take a plan that keeps less there"
        )
    return cost
