"""Leaving for the host and coming back as calls: for lists, which know operators alone.

A list is written down from a run on tensors without data. There these two are operators, and a place on the
host is a tensor that stands for it. The list's code calls what they stand for, on the places themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rowtune.runtime.stores.lanes import Place
from rowtune.runtime.stores.store import Part

NAMESPACE = "rowtune::"


def leave(t: Tensor, along: tuple[int, ...]) -> Tensor:
    """A tensor that stands for the place on the host where this one goes."""
    found: Tensor = _operators().leave(t, [*along])
    return found


def fetch(place: Place | Tensor, size: list[int], stride: list[int], part: Part) -> Tensor:
    """A part of what lies there, of this size and these strides."""
    if isinstance(place, Place):
        return place.lane.fetch(place, size, stride, part)
    found: Tensor = _operators().fetch(place, size, stride, [n for one in part for n in one])
    return found


def own(put: Callable[[Tensor, tuple[int, ...]], Place]) -> Mapping[Any, Callable[..., Any]]:
    """What code calls for the operators; `put` is where tensors leave for."""
    found = _operators()
    return {
        found.leave.default: lambda t, along: put(t, tuple(along)),
        found.fetch.default: lambda place, size, stride, flat: fetch(place, size, stride, _parts(flat)),
    }


def _parts(flat: list[int]) -> Part:
    return tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


@cache
def _operators() -> Any:
    """Made when the first list wants them: torch keeps operators for the whole process."""
    library: Any = torch.library.Library("rowtune", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("leave(Tensor t, int[] along) -> Tensor")
    library.define("fetch(Tensor place, int[] size, int[] stride, int[] part) -> Tensor")
    library.impl("leave", _leave, "Meta")
    library.impl("fetch", _fetch, "Meta")
    _KEPT.append(library)
    return torch.ops.rowtune


_KEPT: list[Any] = []
"""Operators go with what made them."""


def _leave(t: Tensor, along: list[int]) -> Tensor:
    return torch.empty_like(t)


def _fetch(place: Tensor, size: list[int], stride: list[int], part: list[int]) -> Tensor:
    return place.new_empty_strided(size, stride)
