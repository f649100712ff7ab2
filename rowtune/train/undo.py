"""What a try of a step may change, kept on the host, so that it can be tried again under another plan.

Copies are made where no meter looks: they are the host's bytes. Small ones (running statistics, the random
state) are made for every batch; gradients where earlier batches of the step have left some; parameters and
the optimizer's state only where a step that fails may have changed a part of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rowtune.torch_private import inner_tensors, without_modes
from rowtune.train.random_state import capture, restore
from rowtune.tune.device import synchronize

Saved = list[tuple[Tensor, Tensor]]
"""Tensors and their copies on the host."""


class Before:
    """How things were before a try. Made when a batch is at hand and nothing was done with it.

    Args:
        gradients: of these parameters are put back; those of all others are forgotten.
        whole: parameters and all of the optimizer's state are put back as well.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str, *, gradients: bool, whole: bool
    ) -> None:
        self.device, self.optimizer = device, optimizer
        self.parameters = list(model.parameters())
        self.random = capture(device)
        with without_modes(), torch.no_grad():
            self.values = _copies(model.buffers())
            self.gradients = [_copy(p.grad) if gradients else None for p in self.parameters]
            self.state: dict[Tensor, dict[str, Any]] = {p: dict(s) for p, s in optimizer.state.items()}
            values = [t for s in self.state.values() for t in s.values() if isinstance(t, Tensor)]
            tensors = [t for value in values for t in inner_tensors(value)]
            self.values += _copies(t for t in tensors if whole or t.numel() <= 1)  # counters are small
            self.values += _copies(self.parameters) if whole else []

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        synchronize(self.device)
        with without_modes(), torch.no_grad():
            for tensor, copy in self.values:
                tensor.copy_(copy)
            for p, saved in zip(self.parameters, self.gradients, strict=True):
                if saved is None:
                    p.grad = None
                elif p.grad is None:
                    p.grad = saved.to(p.device, copy=True)
                else:
                    p.grad.copy_(saved)
        self.optimizer.state.clear()
        self.optimizer.state.update({p: dict(s) for p, s in self.state.items()})
        restore(self.random, self.device)


def is_atomic(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step that runs out of memory has changed no parameter: fused kernels allocate nothing, and
    what there is to allocate comes before the only one."""
    groups = optimizer.param_groups
    kinds = {(p.dtype, p.device) for group in groups for p in group["params"]}
    return len(groups) == 1 and len(kinds) == 1 and bool(groups[0].get("fused"))


def _copies(tensors: Iterable[Tensor]) -> Saved:
    return [(t, copy) for t in tensors if (copy := _copy(t)) is not None]


def _copy(tensor: Tensor | None) -> Tensor | None:
    """On the host; from a card it comes without waiting, in order with what the card does next."""
    if tensor is None:
        return None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach(), non_blocking=True)
