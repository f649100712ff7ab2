"""Small constants that operators read, made once for each device: for numbers of the host a device has to be
waited for, and a zero is a kernel to launch.

Tensors without data (fake ones) belong to whoever traces with them and are never kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from rowtune.torch_private import FakeTensor, fake_mode_is_on


class Tables:
    """The tables of one operator, kept as long as its rule is. They are small: some numbers a row."""

    def __init__(self) -> None:
        self.made: dict[Hashable, Tensor] = {}

    def index(self, rows: tuple[int, ...], like: Tensor) -> Tensor:
        """Rows to pick."""
        return self.get(rows, like, lambda: torch.tensor(rows))

    def column(self, numbers: tuple[float, ...], like: Tensor, dim: int) -> Tensor:
        """One number a row, to multiply with a tensor that has its rows at `dim`."""
        shape = [len(numbers) if d == dim else 1 for d in range(like.dim())]
        key = (numbers, like.dtype, like.dim())
        return self.get(key, like, lambda: torch.tensor(numbers, dtype=like.dtype).view(shape))

    def get(self, key: Hashable, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes on the CPU, on the device of `like`; made once for each key and device."""
        if _without_data(like):
            return make().to(like.device)
        place = (key, like.device)
        if place not in self.made:
            with torch.inference_mode(False):  # the next step may train
                self.made[place] = make().to(like.device)
        return self.made[place]


class Copies:
    """A tensor of the user's on the devices and in the types where it is read; copied again if it changed."""

    def __init__(self, original: Tensor) -> None:
        self.original = original
        self.made: dict[Hashable, tuple[int, Tensor]] = {}

    def like(self, other: Tensor, dtype: torch.dtype) -> Tensor:
        """On the device of `other`."""
        if _without_data(other):
            return self.original.to(other.device, dtype)
        version = 0 if self.original.is_inference() else self.original._version
        found = self.made.get((other.device, dtype))
        if found is None or found[0] != version:
            with torch.inference_mode(False):
                found = version, self.original.to(other.device, dtype)
            self.made[other.device, dtype] = found
        return found[1]


def zero(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A zero, for stand-ins that are never written to: one for each device and type."""
    dtype = like.dtype if dtype is None else dtype
    return like.new_zeros((), dtype=dtype) if _without_data(like) else _zero(dtype, like.device)


@functools.lru_cache(maxsize=64)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


def _without_data(like: Tensor) -> bool:
    return fake_mode_is_on() or isinstance(like, FakeTensor)
