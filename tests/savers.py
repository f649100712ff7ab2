"""Small networks of the zoo on which savers are tried: exactness and memory, each with its own loss."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from exactness import Step, error, step
from hypothesis import strategies as st
from test_exact_cuts import segments
from torch import nn

import rowtune
from rowtune.graph.graph import Graph
from rowtune.graph.losses import Loss, default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.choices import Precision, Store
from rowtune.plan.plan import Plan, Segment
from rowtune.runtime.precision import autocast
from rowtune.tune.meter import measure_memory
from rowtune.tune.step import Plain, steps_of
from rowtune.zoo import build

NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "edsr": ({"blocks": 1, "channels": 4}, (2, 3, 12, 10)),
    "per_pixel": ({"layers": 3, "channels": 4}, (1, 3, 20, 12)),
    "resnet50": ({"width": 4, "depths": (1, 1), "classes": 3}, (2, 3, 32, 32)),
    "unet_bn": ({"base": 4, "depth": 2}, (2, 3, 16, 12)),
    "unet3d": ({"base": 2, "depth": 1}, (1, 1, 8, 8, 6)),
    "vgg16_features": ({"width": 2}, (1, 3, 32, 32)),
}


class Case:
    """A network with its batch; what plain PyTorch gives on it is known."""

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] | None = None
    ) -> None:
        torch.manual_seed(0)
        options, shape = NETS[name][0], shape or NETS[name][1]
        self.net: nn.Module = build(name, **options).to(dtype)
        self.x = torch.randn(shape, dtype=dtype)
        self.graph: Graph = rowtune.trace(self.net, (self.x,))
        output = self.graph.values[self.graph.outputs[0]]
        self.loss: Loss = parse(default_name(output.shape, shape))
        self.target = synthetic_target(self.loss, output.shape, dtype, 1)
        self.training = with_loss(self.graph, self.loss)
        self._buffers = {n: b.clone() for n, b in self.net.named_buffers()}
        self._plain: dict[str, Step] = {}

    def plain(self, precision: Precision = "as given") -> Step:
        """What PyTorch gives under this autocast."""
        if precision not in self._plain:
            with autocast(precision, "cpu"):
                self._plain[precision] = self.step(Plain(self.net, self.loss))
        return self._plain[precision]

    def step(self, module: nn.Module) -> Step:
        """Loss, gradients (of the input as well) and buffers of one step, from the same state."""
        with torch.no_grad():
            for name, buffer in self.net.named_buffers():
                buffer.copy_(self._buffers[name])
        x = self.x.clone().requires_grad_()
        return step(self.net, lambda: module(x, targets=self.target), {"x": x})

    def apply(self, plan: Plan, engine: Any = "traced") -> rowtune.RowtuneModule:
        return rowtune.apply(self.net, plan, self.loss, graph=self.graph, engine=engine)

    def error(self, plan: Plan, engine: Any = "traced", steps: int = 1) -> float:
        """The largest of some steps."""
        module = self.apply(plan, engine)
        return max(error(self.step(module), self.plain(plan.dtype)) for _ in range(steps))

    def memory(self, plan: Plan, engine: Any = "traced") -> Memory:
        """Predicted and measured, of a step with momentum."""
        made = rowtune.predict(self.training, plan, 1, engine=engine)
        module = self.apply(plan, engine)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0, momentum=0.9, fused=True)

        def one() -> None:
            steps_of(module, optimizer)((self.x,), self.target)

        module.lists.after = 0
        one()
        found = measure_memory(one, module, optimizer, [self.x, self.target], "cpu")
        return Memory(made.peak_bytes, made.activation_bytes, found.peak_bytes, found.activation_bytes)


class Memory(NamedTuple):
    peak: int
    activations: int
    real_peak: int
    real_activations: int

    @property
    def error(self) -> float:
        """The larger of the relative errors of the peak and of the activations' peak."""
        return max(abs(self.peak / self.real_peak - 1), abs(self.activations / self.real_activations - 1))


@cache
def case(name: str, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] | None = None) -> Case:
    return Case(name, dtype, shape)


@st.composite
def plans(draw: Any, graph: Graph, stores: tuple[Store, ...] = ("device",)) -> Plan:
    """Any cuts, any policies, any of these stores; keep segments may recompute what is cheap."""

    def stored(s: Segment) -> Segment:
        cheap: Any = draw(st.sampled_from(["store", "recompute"])) if s.policy == "keep" else "store"
        return replace(s, store=draw(st.sampled_from(stores)), cheap=cheap)

    return Plan(tuple(stored(s) for s in draw(segments(graph))))
