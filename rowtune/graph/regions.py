"""Regions of a model's forward: `with torch.no_grad()`, `with torch.autocast(...)`, and nested ones.

They are no control flow: what lies in one runs wherever the plan puts it, forward, replay and recomputation,
under the modes that PyTorch ran it under.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Region:
    """`grad` is False without gradients; `autocast` holds (device type, dtype, enabled), one a device."""

    grad: bool = True
    autocast: tuple[tuple[str, torch.dtype, bool], ...] = ()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """As the caller has it, but for what the region says itself: gradients are never turned on."""
        with contextlib.ExitStack() as stack:
            if not self.grad:
                stack.enter_context(torch.no_grad())
            for device, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


def inside(region: Region | None) -> contextlib.AbstractContextManager[None]:
    """The modes of a node's region, if it lies in one."""
    return contextlib.nullcontext() if region is None else region.entered()
