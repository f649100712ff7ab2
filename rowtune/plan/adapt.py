"""A plan for another graph of the same model: its eval graph, or its graph at another size."""

from __future__ import annotations

from rowtune.graph.cuts import stretches
from rowtune.graph.graph import Graph
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.uniform import uniform_plan


def eval_plan(graph: Graph, plan: Plan) -> Plan:
    """Inference needs no recomputation: every stretch that can be banded is swept once, at the band height
    of the plan's finest rows segment. A plan without rows stays plain."""
    rows = [s for s in plan.leaves() if s.policy == "rows" and s.band_rows]
    if not rows or not stretches(graph, plan.axis):
        return Plan((Segment(graph.nodes[0].name, graph.nodes[-1].name, "keep"),), plan.axis)
    return uniform_plan(graph, "rows", min(s.band_rows for s in rows), "sweep", axis=plan.axis)
