"""Small constants that operators read, made once for each device: for numbers of the host a device has to be
waited for, and a zero is a kernel to launch.

Whoever traces with tensors without data gets stand-ins, and is told what they stand for: see `Tracing`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rowtune.torch_private import FakeTensor, fake_mode_is_on, without_modes

T = TypeVar("T")


class Tracing(Protocol):
    """Runs operators on stand-ins for tensors of `device`."""

    device: torch.device

    def stand_in(self, constant: Tensor) -> Tensor:
        """A tensor without data in the place of a constant."""

    def keep_fresh(self, key: Hashable, renew: Callable[[], object]) -> None:
        """To be called before what was traced runs: a constant is a copy of what the user may change."""

    def steps(self, run: Any, steps: Any) -> None:
        """Run steps of a schedule: those that do what others did may be left out."""

    def rows_of_now(self) -> contextlib.AbstractContextManager[None]:
        """Inside, calls look at rows that are worked out now, though autograd asks for them."""


TRACING: ContextVar[Tracing | None] = ContextVar("TRACING", default=None)


STANDS_FOR: ContextVar[str] = ContextVar("STANDS_FOR", default="meta")
"""The kind of device that tensors without data stand for while a step is recorded."""


@contextlib.contextmanager
def during(variable: ContextVar[T], value: T) -> Iterator[None]:
    """A context variable has this value meanwhile."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def standing_for(device: str) -> contextlib.AbstractContextManager[None]:
    """Kernels are those of this kind of device meanwhile ("meta": of none)."""
    return during(STANDS_FOR, device)


def rows_of_now() -> contextlib.AbstractContextManager[None]:
    """Around what autograd asks for by name, and not by rows that it knew when its graph was made."""
    tracing = TRACING.get()
    return contextlib.nullcontext() if tracing is None else tracing.rows_of_now()


def device_of(t: Tensor) -> torch.device:
    """Where a tensor lies, or the one that it stands for."""
    if (device := STANDS_FOR.get()) != "meta":
        return torch.device(device)
    tracing = TRACING.get()
    return t.device if tracing is None else tracing.device


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
        if (tracing := TRACING.get()) is not None:
            return tracing.stand_in(self._on(tracing.device, key, make))
        return make().to(like.device) if _without_data(like) else self._on(like.device, key, make)

    def _on(self, device: torch.device, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        place = (key, device)
        if place not in self.made:
            with _apart():
                self.made[place] = make().to(device)
        return self.made[place]


class Copies:
    """A tensor of the user's on the devices and in the types where it is read; copied again if it changed."""

    def __init__(self, original: Tensor) -> None:
        self.original = original
        self.made: dict[Hashable, tuple[int, Tensor]] = {}

    def like(self, other: Tensor, dtype: torch.dtype) -> Tensor:
        """On the device of `other`."""
        if (tracing := TRACING.get()) is not None:
            renew = functools.partial(self._on, tracing.device, dtype)
            tracing.keep_fresh((id(self), dtype), renew)
            return tracing.stand_in(self._on(tracing.device, dtype))
        return (
            self.original.to(other.device, dtype) if _without_data(other) else self._on(other.device, dtype)
        )

    def _on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        version = 0 if self.original.is_inference() else self.original._version
        found = self.made.get((device, dtype))
        if found is None:
            with _apart():
                found = version, self.original.to(device, dtype)
        elif found[0] != version and found[1] is not self.original:
            with _apart():  # in its place: who wrote down calls has this very tensor
                found = version, found[1].copy_(self.original)
        self.made[device, dtype] = found
        return found[1]


def zero(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A zero, for stand-ins that are never written to: one for each device and type."""
    dtype = like.dtype if dtype is None else dtype
    if (tracing := TRACING.get()) is not None:
        return tracing.stand_in(_zero(dtype, tracing.device))
    return like.new_zeros((), dtype=dtype) if _without_data(like) else _zero(dtype, like.device)


@functools.lru_cache(maxsize=64)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with _apart():
        return torch.zeros((), dtype=dtype, device=device)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Not part of the step that first asks: the next may train, and whoever records one step records all."""
    with without_modes(), torch.inference_mode(False):
        yield


def _without_data(like: Tensor) -> bool:
    return fake_mode_is_on() or isinstance(like, FakeTensor)
