"""What an ONNX operator function sees: its node, and values that are tensors or plain numbers.

Two kinds of value flow through an imported graph. A *tensor* is data. A *static* is a numpy array: shapes,
axes, scales and whatever is computed from them. Statics never touch torch, so that no shape arithmetic is
left in an exported graph; they become tensors only where they meet one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from torch import Tensor

from rowtune.errors import ModelError

Static: TypeAlias = np.ndarray[Any, Any]
Value: TypeAlias = Any  # Tensor | Static | list[Tensor | Static] | None

DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True, eq=False)
class OnnxNode:
    """One ONNX node: operator, attributes, the opset that defines it, how many outputs count."""

    op: str
    name: str
    opset: int
    attrs: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def get(self, key: str, default: Any = None) -> Any:
        return self.attrs.get(key, default)

    def error(self, problem: str) -> ModelError:
        """A ModelError that names this node."""
        return ModelError(f"ONNX operator {self.op} ({self.name}): {problem}")


@dataclass(frozen=True)
class Mode:
    """What the few operators with a mode need: training or not, and the device of the weights."""

    training: bool
    device: torch.device


def is_static(value: Value) -> bool:
    return isinstance(value, np.ndarray)


def torch_dtype(node: OnnxNode, element: int) -> torch.dtype:
    if element not in DTYPES:
        name = onnx.TensorProto.DataType.Name(element) if element in range(64) else element
        raise node.error(f"element type {name} has no counterpart for training; export in float32")
    return DTYPES[element]


def to_tensor(array: Static, device: torch.device | None = None) -> Tensor:
    """A static as a tensor; one filled with a single value (a broadcast view) is not materialised first."""
    if array.dtype.kind not in "biuf":  # bfloat16 is no numpy type of its own
        return torch.tensor(array.astype(np.float32), device=device).to(torch.bfloat16)
    if array.size > 1 and not any(array.strides):
        kind = torch.from_numpy(np.zeros(1, array.dtype)).dtype
        return torch.full(array.shape, array.flat[0].item(), dtype=kind, device=device)
    return torch.tensor(np.ascontiguousarray(array).reshape(array.shape), device=device)


def tensor(value: Value, like: Tensor) -> Any:
    """A static as a tensor like another: of its device and, among floats, its type (a module may be cast)."""
    if not isinstance(value, np.ndarray):
        return value
    made = to_tensor(value, like.device)
    return made.to(like.dtype) if made.is_floating_point() and like.is_floating_point() else made


def tensors(values: tuple[Value, ...]) -> list[Tensor]:
    """All values as tensors on the device of those that are tensors already."""
    like = next((v for v in values if isinstance(v, Tensor)), None)
    if like is None:
        return [to_tensor(v) if isinstance(v, np.ndarray) else v for v in values]
    return [tensor(v, like) for v in values]


def operands(a: Value, b: Value) -> tuple[Any, Any]:
    """Both sides of a pointwise operator: a single static number stays a number, out of the graph."""
    if isinstance(a, Tensor) and isinstance(b, np.ndarray):
        return a, _number_or_tensor(b, a)
    if isinstance(b, Tensor) and isinstance(a, np.ndarray):
        return _number_or_tensor(a, b), b
    return a, b


def _number_or_tensor(value: Static, like: Tensor) -> Any:
    if value.size == 1 and value.ndim <= like.dim():
        return plain(value.reshape(-1)[0])
    return tensor(value, like)


def plain(value: Any) -> Any:
    """A Python number of a numpy one (bfloat16's scalars included)."""
    number = value.item() if hasattr(value, "item") else value
    return number if isinstance(number, bool | int | float) else float(number)


def rows(x: Tensor, axis: int, start: int, count: int) -> Tensor:
    """`count` entries of an axis; plain slicing, which every tracer knows."""
    whole = start == 0 and count == x.shape[axis]
    return x if whole else x[(slice(None),) * axis + (slice(start, start + count),)]


def ints(node: OnnxNode, value: Value, what: str) -> list[int]:
    """A static list of integers; ModelError if it was computed from data."""
    if isinstance(value, np.ndarray):
        return [int(v) for v in value.reshape(-1)]
    if isinstance(value, list | tuple):
        return [int(v) for v in value]
    raise node.error(
        f"its {what} must follow from shapes and constants, but this model computes it from data"
    )


def number(node: OnnxNode, value: Value, what: str) -> Any:
    """A static single number; ModelError if it was computed from data."""
    if isinstance(value, np.ndarray) and value.size == 1:
        return plain(value.reshape(-1)[0])
    raise node.error(f"its {what} must be one constant number")
