"""Memory that runs out where a test says: an operator is refused before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rowtune.torch_private import autograd_runs


class Fault(TorchDispatchMode):
    """Enter it; once `armed`, the call number `at` of an operator named `op` ("" for any) is out of memory,
    in the backward only or out of it only, `times` in all."""

    def __init__(self, op: str, at: int = 1, *, backward: bool = False, times: int = 1) -> None:
        super().__init__()
        self.op, self.at, self.backward, self.times = op, at, backward, times
        self.armed, self.seen, self.raised = False, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.armed and self.op in str(func) and autograd_runs() == self.backward:
            self.seen += 1
            if self.seen >= self.at and self.raised < self.times:
                self.raised, self.seen = self.raised + 1, 0
                raise torch.OutOfMemoryError("simulated card out of memory")
        return func(*args, **(kwargs or {}))
