"""How far gradients are off while a run trains by a plan whose stores round.

A search measures the error with the weights of that moment; it changes as they do. So it is measured again on
the batch at hand, against the same plan with its stores on the host: that rounds nothing, takes no more of
the device's memory, and gives plain PyTorch's gradients whether or not plain PyTorch would fit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from rowtune.graph.graph import Graph
from rowtune.graph.losses import Loss
from rowtune.plan.choices import LOSSY
from rowtune.plan.file import PlanFile
from rowtune.plan.plan import Plan
from rowtune.runtime.module import apply
from rowtune.runtime.precision import DTYPES
from rowtune.tune.step import Batch
from rowtune.tune.verify import SCALE, Check, compare, outcome


def exactly(plan: Plan) -> Plan:
    """The same, but what it rounds is kept on the host as it is."""
    segments = (replace(s, store="host" if s.store in LOSSY else s.store) for s in plan.segments)
    return replace(plan, segments=tuple(segments), max_grad_error=0.0)


class Watch:
    """Measures the error of `runner`, which runs `plan`, by the measure and with the bound of a search."""

    def __init__(self, runner: nn.Module, plan: Plan, loss: Loss | None, graph: Graph | None) -> None:
        self.runner, self.plan, self.loss, self.graph = runner, plan, loss, graph

    def check(self, model: nn.Module, batch: Batch) -> Check:
        """On a batch. Weights, gradients, buffers and the random state are as before."""
        exact = apply(model, exactly(self.plan), self.loss, graph=self.graph, engine="traced")
        scale = SCALE if self.plan.dtype == "fp16" else 1.0
        inputs, target = batch
        expected, got = (outcome(model, one, inputs, target, scale) for one in (exact, self.runner))
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return compare(expected, got, DTYPES.get(self.plan.dtype, own), allowed=self.plan.allowed_error)


def refusal(step: int, check: Check, file: PlanFile) -> str:
    """What to say where there is no exact plan to go on with."""
    return (
        f"at step {step} gradients are off by {check.max_relative_error:.2g} ({check.worst}), more than the "
        f"{file.plan.allowed_error:g} that the plan allows, and the file's front has no exact plan that "
        "fits: search again with a larger --max-grad-error, or without one; --check-error-every 0 trains on "
        "all the same"
    )
