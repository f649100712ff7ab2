"""In which type a step computes: as the model and its inputs are, or under PyTorch's autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rowtune.plan.choices import Precision
from rowtune.torch_private import FakeTensorMode

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """What a forward runs in; backward follows.

    Without a cache of cast weights: that holds on to all of them until forward ends, and a plan decides what
    is kept.
    """
    if precision not in DTYPES:
        return nullcontext()
    return torch.autocast(device, DTYPES[precision], cache_enabled=False)


def blank_mode(precision: Precision) -> tuple[AbstractContextManager[Any], torch.device]:
    """A mode and a device for tensors without data. Autocast looks at devices: it passes meta tensors by."""
    if precision not in DTYPES:
        return nullcontext(), torch.device("meta")
    return FakeTensorMode(), torch.device("cpu")


def autocast_key() -> tuple[str, bool, torch.dtype]:
    """What autocast does now."""
    kind = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def as_it_was(key: tuple[str, bool, torch.dtype]) -> AbstractContextManager[Any]:
    """Autocast as it was when forward ran, for what backward runs again."""
    kind, enabled, dtype = key
    if not enabled and not autocast_key()[1]:
        return nullcontext()
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
