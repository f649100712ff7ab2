"""Which tensors share memory."""

from __future__ import annotations

from rowtune.torch_private import storage_of as storage_of
