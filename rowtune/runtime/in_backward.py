"""The optimizer's step inside backward: each gradient is used and let go of as soon as it is complete, so
that they are not all there at once.

A parameter's gradient is complete when all that reads the parameter has gone backward, so nothing in this
step reads it again. The optimizer is the user's own, with its state, schedules and state dict; it is shown
one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rowtune.errors import UsageError
from rowtune.plan.choices import Home
from rowtune.plan.plan import Plan
from rowtune.runtime.optimizer_state import step_one, step_one_from_host, wait

ONCE = "a plan with step_in_backward uses each gradient as it comes, once a step"


@contextmanager
def step_in_backward(optimizer: torch.optim.Optimizer, state: Home = "device") -> Iterator[None]:
    """Around `loss.backward()`, in the place of `optimizer.step()`; `state` is the plan's `optimizer_state`.

    Raises:
        UsageError: there are gradients already, or a parameter gets a second one: gradients are accumulated
            over several backwards, of which this would use each by itself.
    """
    groups = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if any(p.grad is not None for _, p in groups):
        raise UsageError(
            f"{ONCE}, and some gradients of an earlier backward are there: call zero_grad() first; to "
            "accumulate gradients take a plan without step_in_backward"
        )
    used: set[int] = set()
    handles = [
        p.register_post_accumulate_grad_hook(_using(optimizer, group, used, state)) for group, p in groups
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        wait(optimizer)


def _using(optimizer: torch.optim.Optimizer, group: dict[str, Any], used: set[int], state: Home) -> Any:
    step = step_one_from_host if state == "host" else step_one

    def use(p: Tensor) -> None:
        if id(p) in used:
            raise UsageError(
                f"{ONCE}, and a parameter of shape {tuple(p.shape)} got a second one; to accumulate "
                "gradients over backwards take a plan without step_in_backward"
            )
        used.add(id(p))
        step(optimizer, group, p)
        p.grad = None

    return use


def check_training(plan: Plan, *, clipped: bool = False, accumulated: bool = False) -> None:
    """A plan may forbid what looks at all gradients at once.

    Raises:
        UsageError: it does.
    """
    for asked, what in ((clipped, "clipping of gradients"), (accumulated, "accumulation of gradients")):
        if asked and plan.step_in_backward:
            raise UsageError(f"{ONCE}, which {what} cannot wait for; take a plan without step_in_backward")
