"""Which tensors share memory."""

from __future__ import annotations

from torch import Tensor


def storage_of(t: Tensor) -> int:
    """Names a tensor's memory while it lives. Not its address: tensors without data (fake ones, those of a
    tracer) have none, and empty ones all have the same."""
    found: int = t.untyped_storage()._cdata
    return found
