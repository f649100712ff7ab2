"""rowtune: train convolutional networks that do not fit, exactly, under a memory budget.

    found = rowtune.search(model, inputs, "8GB", loss="mse")   the fastest exact plan that fits, by measuring
    found = rowtune.load("plan.json")                          one that `rowtune search` wrote
    module = rowtune.apply(model, found, loss="mse")           an nn.Module that trains by it

and, one by one, what those are made of:

    graph = rowtune.trace(model, inputs)                       what is computed
    plan = rowtune.uniform_plan(graph, "rows", band_rows=16)   how
    cost = rowtune.predict(graph, plan)                        what it takes (of a graph with a loss)
    module = rowtune.apply(model, plan)                        an nn.Module that computes it that way

Importing this package does not import torch; the names below do, when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rowtune import zoo as zoo
    from rowtune.cost.predict import predict as predict
    from rowtune.importers.trace import trace as trace
    from rowtune.plan.file import PlanFile as PlanFile
    from rowtune.plan.lower import lower as lower
    from rowtune.plan.plan import Plan as Plan
    from rowtune.plan.plan import Segment as Segment
    from rowtune.plan.uniform import uniform_plan as uniform_plan
    from rowtune.runtime.captured import capture as capture
    from rowtune.runtime.in_backward import step_in_backward as step_in_backward
    from rowtune.runtime.module import apply as apply
    from rowtune.runtime.optimizer_state import step_from_host as step_from_host
    from rowtune.tune.device import keep_freed_memory as keep_freed_memory
    from rowtune.tune.own import load as load
    from rowtune.tune.own import search as search

__version__ = "0.1.0"

_HOMES = {
    "Plan": "rowtune.plan.plan",
    "PlanFile": "rowtune.plan.file",
    "Segment": "rowtune.plan.plan",
    "apply": "rowtune.runtime.module",
    "capture": "rowtune.runtime.captured",
    "keep_freed_memory": "rowtune.tune.device",
    "load": "rowtune.tune.own",
    "lower": "rowtune.plan.lower",
    "predict": "rowtune.cost.predict",
    "search": "rowtune.tune.own",
    "step_from_host": "rowtune.runtime.optimizer_state",
    "step_in_backward": "rowtune.runtime.in_backward",
    "trace": "rowtune.importers.trace",
    "uniform_plan": "rowtune.plan.uniform",
}

__all__ = [
    *("Plan", "PlanFile", "Segment", "__version__", "apply", "capture", "keep_freed_memory", "load", "lower"),
    *("predict", "search", "step_from_host", "step_in_backward", "trace", "uniform_plan", "zoo"),
]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return importlib.import_module("rowtune.zoo")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rowtune' has no attribute {name!r}")
