"""A search that measures nothing: bands of rows, with the figures that are predicted.

For tests of what is done with a plan, which would otherwise wait for a worker process and depend on what it
had time for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rowtune.cost.predict import predict
from rowtune.plan.file import MEASURED, PlanFile, save_plan
from rowtune.plan.uniform import uniform_plan
from rowtune.tune.find import Found, Request, budget_bytes
from rowtune.tune.reference import plain_peak


def find(request: Request, progress: Callable[[Any], None] = lambda _: None) -> Found:
    """In the place of rowtune.tune.find.find."""
    work = request.work
    plan = uniform_plan(work.graph, "rows", 16)
    cost = predict(work.graph, plan, work.optimizer.slots)
    figures = {"peak_bytes": cost.peak_bytes, "plain_peak_bytes": plain_peak(work)}
    file = PlanFile(
        problem=work.problem,
        fingerprint=work.graph.fingerprint,
        budget_bytes=budget_bytes(request),
        plan=plan,
        predicted={"peak_bytes": cost.peak_bytes},
        measured=dict.fromkeys(MEASURED) | figures,
    )
    save_plan(file, request.out)
    return Found(file, None, request.out)  # type: ignore[arg-type]
