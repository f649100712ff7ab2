"""Which tensors share memory."""

from __future__ import annotations

from torch import Tensor, UntypedStorage


def storage_of(t: Tensor) -> int:
    """Names a tensor's memory while it lives. Not its address: tensors without data (fake ones, those of a
    tracer) have none, and empty ones all have the same."""
    return key_of(t.untyped_storage())


def key_of(storage: UntypedStorage) -> int:
    """The same of a storage."""
    found: int = storage._cdata
    return found
