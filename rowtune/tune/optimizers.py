"""Optimizers by name and options, as `sgd:lr=0.01,momentum=0.9`, and what they keep."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rowtune.errors import ModelError, UsageError, meant

DEFAULT_OPTIMIZER = "sgd:lr=0.01,momentum=0.9"

Maker = Callable[..., torch.optim.Optimizer]
_OPTIMIZERS: dict[str, tuple[Callable[[], Maker], dict[str, Any]]] = {
    "sgd": (lambda: torch.optim.SGD, {"lr": 0.01}),
    "adam": (lambda: torch.optim.Adam, {"lr": 0.001}),
    "adamw": (lambda: torch.optim.AdamW, {"lr": 0.001}),
    "rmsprop": (lambda: torch.optim.RMSprop, {"lr": 0.001}),
    "adamw8bit": (lambda: _low_bit("AdamW8bit"), {"lr": 0.001}),
    "adamw4bit": (lambda: _low_bit("AdamW4bit"), {"lr": 0.001}),
}
# Left to itself PyTorch updates all parameters of a card at once, with a temporary as large as all of them.
_FUSED = frozenset({"sgd", "adam", "adamw"})
_WAYS = frozenset({"fused", "foreach", "capturable", "differentiable"})


@dataclass(frozen=True)
class LowBit:
    """How torchao lays out a moment of a parameter: `bits` for each element, and a scale for each block; a
    table of the numbers that there are. What is smaller or does not divide stays as it is."""

    bits: int
    block: int

    def bytes(self, count: int, itemsize: int) -> int:
        if count < LEAST or count % self.block:
            return count * itemsize
        return count * self.bits // 8 + 4 * (count // self.block) + 4 * (1 << self.bits)


LEAST = 4096
LOW_BITS = {"adamw8bit": LowBit(8, 256), "adamw4bit": LowBit(4, 128)}
TEMPORARIES = 6
"""Parameter-sized tensors of float32 that torchao's update has at a time where it is not compiled."""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without warnings in the log: torchao tells of kernels for other machines that it did not load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _low_bit(name: str) -> Maker:
    """An optimizer of torchao's. Its update is compiled, one kernel for each shape of a parameter: on a card;
    on a processor that takes longer than it is worth.

    Raises:
        UsageError: torchao is not installed.
    """
    try:
        with without_warnings():
            made: Any = getattr(importlib.import_module("torchao.optim"), name)
    except ImportError as error:
        raise UsageError(
            f"--optimizer {name.lower()} is torchao's, which cannot be imported ({error}): pip install "
            "rowtune[torchao], or take adamw"
        ) from error

    class Eager(made):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            cards = any(p.is_cuda for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("default" if cards else "force_eager"):
                return super().step(closure)

    Eager.__name__ = name
    return Eager


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer by name and options, as `sgd:lr=0.01,momentum=0.9`."""

    name: str
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return self.name + ":" + ",".join(f"{k}={v}" for k, v in self.options)

    @property
    def slots(self) -> int:
        """Parameter-sized tensors that it keeps from step to step."""
        options = dict(self.options)
        if self.name == "sgd":
            return int(options.get("momentum", 0) != 0)
        if self.name == "rmsprop":
            return 1 + int(options.get("momentum", 0) != 0) + int(bool(options.get("centered", False)))
        return 2 + int(bool(options.get("amsgrad", False)))

    @property
    def low_bit(self) -> LowBit | None:
        """How its state is rounded, if it is."""
        return LOW_BITS.get(self.name)

    def state(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes that it keeps for a parameter."""
        count = math.prod(shape)
        kept = self.low_bit.bytes(count, dtype.itemsize) if self.low_bit else count * dtype.itemsize
        return self.slots * kept

    def update(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> int:
        """Bytes that a parameter's update takes meanwhile on this kind of device."""
        return TEMPORARIES * 4 * math.prod(shape) if self.low_bit and device == "cpu" else 0

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            raise ModelError("the model has no parameter that requires a gradient: there is nothing to train")
        return _OPTIMIZERS[self.name][0]()(trained, **{**self._lean(trained), **dict(self.options)})

    def _lean(self, trained: Sequence[nn.Parameter]) -> dict[str, bool]:
        """The way of stepping that takes no memory to speak of, unless the user names one."""
        if self.low_bit or _WAYS & dict(self.options).keys():
            return {}
        usual = all(p.is_floating_point() and not hasattr(p, "full_tensor") for p in trained)
        fused = self.name in _FUSED and usual  # sharded weights have no fused kernels for all of them
        return {"fused": True} if fused else {"foreach": False}

    def with_lr(self, lr: float) -> OptimizerSpec:
        return replace(self, options=tuple({**dict(self.options), "lr": lr}.items()))


def parse_optimizer(text: str) -> OptimizerSpec:
    """`adam`, `sgd:lr=0.1,momentum=0.9`, ...; UsageError for an unknown name or option."""
    name, _, rest = text.partition(":")
    if name not in _OPTIMIZERS:
        raise UsageError(
            f"--optimizer is one of {', '.join(_OPTIMIZERS)} with options as in sgd:lr=0.1, not {text!r}"
            f"{meant(name, _OPTIMIZERS)}"
        )
    make, options = _OPTIMIZERS[name][0](), dict(_OPTIMIZERS[name][1])
    known = set(inspect.signature(make).parameters) - {"params"}
    for item in filter(None, rest.split(",")):
        key, eq, value = item.partition("=")
        if not eq or key not in known:
            raise UsageError(
                f"--optimizer {text}: {name} has no option {item!r}; it takes {', '.join(sorted(known))}"
                f"{meant(key, known)}"
            )
        options[key] = _number(value, text)
    try:
        make([nn.Parameter(torch.zeros(1))], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--optimizer {text}: {error}") from error
    return OptimizerSpec(name, tuple(options.items()))


def _number(value: str, text: str) -> float | bool:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--optimizer {text}: {value!r} is neither a number nor true or false")
    return number
