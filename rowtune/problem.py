"""What is trained, on what: the model's name, its inputs, loss and optimizer. Data only, as in a plan.json; a
model is opened by importers/source.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from rowtune.errors import PlanError

Kind = Literal["zoo", "factory", "pt2", "onnx", "python"]
MOST = 2**60
"""Elements: a tensor of that many has no place anywhere."""

Argument = int | float | bool | str | tuple[int | float, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """`text` is what follows `zoo:`, the `module:factory`, the file's path, or, of a model that a Python
    program holds ("python"), the name of its class; `args` go to the factory."""

    kind: Kind
    text: str
    args: tuple[tuple[str, Argument], ...] = ()

    def __str__(self) -> str:
        return f"zoo:{self.text}" if self.kind == "zoo" else self.text


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one input."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Problem:
    """Everything a plan is made for, and nothing about how.

    `dtype` is empty where the model keeps its own.
    """

    model: Source
    inputs: tuple[TensorSpec, ...]
    device: str
    loss: str
    optimizer: str
    seed: int = 0
    dtype: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": {
                "kind": self.model.kind,
                "source": self.model.text,
                "args": _plain(dict(self.model.args)),
            },
            "inputs": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in self.inputs],
            "dtype": self.dtype,
            "device": self.device,
            "loss": self.loss,
            "optimizer": self.optimizer,
            "seed": self.seed,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Problem:
        """The inverse; PlanError for anything missing or of the wrong type."""
        model = typed(data, "model", dict)
        if model.get("kind") not in get_args(Kind):
            raise PlanError(f"model.kind is one of {', '.join(get_args(Kind))}, not {model.get('kind')!r}")
        args = typed(model, "args", dict)
        source = Source(
            model["kind"],
            typed(model, "source", str),
            tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in args.items()),
        )
        words = {key: typed(data, key, str) for key in ("device", "loss", "optimizer", "dtype")}
        inputs = tuple(_spec(item) for item in typed(data, "inputs", list))
        if not 0 <= typed(data, "seed", int) < 2**63:
            raise PlanError(f"seed is at least 0 and below 2^63, not {str(data['seed'])[:40]}")
        return Problem(source, inputs, seed=data["seed"], **words)


def _plain(value: Any) -> Any:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def typed(data: Mapping[str, Any], key: str, kind: type) -> Any:
    """What JSON has under `key`; PlanError where it is not of this very type."""
    value = data.get(key)
    if type(value) is not kind:
        raise PlanError(f"{key} is of type {kind.__name__}, not {value!r}")
    return value


def _spec(item: Any) -> TensorSpec:
    if not isinstance(item, dict) or set(item) != {"name", "shape", "dtype"}:
        raise PlanError(f"an input has name, shape and dtype, not {item!r}")
    shape = typed(item, "shape", list)
    if not all(type(size) is int and size > 0 for size in shape):
        raise PlanError(f"an input's shape is whole numbers of at least 1, not {shape!r}")
    if math.prod(shape) >= MOST:
        raise PlanError(f"an input has fewer than 2^60 elements, not {'x'.join(map(str, shape))[:80]}")
    dtype = typed(item, "dtype", str)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise PlanError(f"an input's dtype is a torch dtype, not {dtype!r}")
    return TensorSpec(typed(item, "name", str), tuple(shape), dtype)
