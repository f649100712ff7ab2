"""Predict a plan without lowering all of its bands: interior bands are alike, so a few stand for them."""

from __future__ import annotations

from rowtune.cost.memory import Cost, predict
from rowtune.graph.graph import Graph
from rowtune.plan.lower import lower
from rowtune.plan.plan import Plan
from rowtune.plan.repeat import shortened


def estimate(graph: Graph, plan: Plan, optimizer_slots: int = 1) -> Cost:
    """The same as predict(lower(graph, plan), optimizer_slots), in time that does not grow with the image.

    Where bands do not repeat (resampling tables without a short period, outputs whose heights are not
    proportional, images of few bands), all of a segment is lowered.

    Raises:
        PlanError: as lower does.
    """
    return predict(lower(graph, plan, shortened), optimizer_slots)
