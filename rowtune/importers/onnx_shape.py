"""ONNX operators that move data: reshape, slice, join, gather, sequences; and the ones that make shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.importers.onnx_node import (
    Mode,
    OnnxNode,
    Static,
    Value,
    ints,
    is_static,
    number,
    rows,
    tensors,
    to_tensor,
    torch_dtype,
)


def shape(node: OnnxNode, x: Value) -> Static:
    sizes = [int(n) for n in x.shape]
    return np.asarray(sizes[node.get("start", 0) : node.get("end", len(sizes))], dtype=np.int64)


def size(node: OnnxNode, x: Value) -> Static:
    return np.asarray(math.prod(int(n) for n in x.shape), dtype=np.int64)


def identity(node: OnnxNode, x: Value) -> Value:
    return x


def reshape(node: OnnxNode, x: Tensor, target: Value = None) -> Tensor:
    sizes = list(node.get("shape")) if target is None else ints(node, target, "target shape")
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(node: OnnxNode, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() >= 2:
        return torch.flatten(x, 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def transpose(node: OnnxNode, x: Tensor) -> Tensor:
    return x.permute(node.get("perm", list(reversed(range(x.dim())))))


def _axes(node: OnnxNode, axes: Value, rank: int) -> list[int] | None:
    """Axes from the attribute of older opsets or the input of newer ones, counted from the front."""
    given = node.get("axes") if axes is None else ints(node, axes, "axes")
    return None if given is None else [a % rank for a in given]


def squeeze(node: OnnxNode, x: Tensor, axes: Value = None) -> Tensor:
    chosen = _axes(node, axes, max(x.dim(), 1))
    if chosen is None:
        chosen = [i for i, n in enumerate(x.shape) if n == 1]
    for axis in sorted(chosen, reverse=True):
        x = x.squeeze(axis)
    return x


def unsqueeze(node: OnnxNode, x: Tensor, axes: Value = None) -> Tensor:
    given = node.get("axes") if axes is None else ints(node, axes, "axes")
    for axis in sorted(a % (x.dim() + len(given)) for a in given):
        x = x.unsqueeze(axis)
    return x


def expand(node: OnnxNode, x: Tensor, target: Value) -> Tensor:
    wanted = np.broadcast_shapes(tuple(x.shape), tuple(ints(node, target, "target shape")))
    return x if tuple(x.shape) == wanted else x.expand(wanted)


def tile(node: OnnxNode, x: Tensor, repeats: Value) -> Tensor:
    return x.repeat(ints(node, repeats, "repeats"))


def concat(node: OnnxNode, *values: Value) -> Tensor:
    return torch.cat(tensors(values), dim=node.get("axis", 1))


def _split_sizes(node: OnnxNode, total: int, sizes: Value, parts: int) -> list[int]:
    given = node.get("split") if sizes is None else ints(node, sizes, "sizes")
    if given is not None:
        return list(given)
    chunk = -(-total // parts)
    return [min(chunk, total - i * chunk) for i in range(parts)]


def split(node: OnnxNode, x: Tensor, sizes: Value = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    parts = node.get("num_outputs", node.outputs)
    return torch.split(x, _split_sizes(node, x.shape[axis], sizes, parts), dim=axis)


def split_to_sequence(node: OnnxNode, x: Tensor, sizes: Value = None) -> list[Tensor]:
    axis, keep = node.get("axis", 0), node.get("keepdims", 1)
    total = x.shape[axis]
    if sizes is None:
        pieces = torch.split(x, 1, dim=axis)
        return list(pieces) if keep else [p.squeeze(axis) for p in pieces]
    given = ints(node, sizes, "sizes")
    if sizes.ndim == 0:
        given = [min(given[0], total - i) for i in range(0, total, given[0])]
    return list(torch.split(x, given, dim=axis))


def sequence_construct(node: OnnxNode, *values: Value) -> list[Value]:
    return list(values)


def sequence_at(node: OnnxNode, sequence: list[Value], position: Value) -> Value:
    return sequence[ints(node, position, "position")[0]]


def sequence_length(node: OnnxNode, sequence: list[Value]) -> Static:
    return np.asarray(len(sequence), dtype=np.int64)


def concat_from_sequence(node: OnnxNode, sequence: list[Value]) -> Tensor:
    join = torch.stack if node.get("new_axis", 0) else torch.cat
    return join(tensors(tuple(sequence)), dim=node.get("axis"))


def slice_(node: OnnxNode, x: Tensor, *inputs: Value) -> Tensor:
    if node.opset < 10:
        starts, ends, axes = node.get("starts"), node.get("ends"), node.get("axes")
        steps = None
    else:
        given = [None if v is None else ints(node, v, "limits") for v in (*inputs, None, None)[:4]]
        starts, ends, axes, steps = given
    axes = list(range(len(starts))) if axes is None else axes
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(axes), strict=True):
        length = int(x.shape[axis])
        first, last, step = slice(start, end, step).indices(length)
        if step > 0:
            if (first, last, step) != (0, length, 1):
                x = x[(slice(None),) * (axis % x.dim()) + (slice(first, max(first, last), step),)]
        elif (first, last, step) == (length - 1, -1, -1):
            x = x.flip(axis)
        else:
            x = x.index_select(axis, torch.tensor(list(range(first, last, step)), device=x.device))
    return x


def gather(node: OnnxNode, x: Value, indices: Value) -> Tensor:
    axis = node.get("axis", 0)
    if isinstance(x, Tensor) and is_static(indices):
        return _gather_static(x, axis, indices)
    data, at = tensors((x, indices))
    at = torch.where(at < 0, at + data.shape[axis], at)
    if axis == 0 and data.dim() == 2:
        return F.embedding(at, data)
    axis = axis % data.dim()
    found = data.index_select(axis, at.reshape(-1))
    return found.reshape(*data.shape[:axis], *at.shape, *data.shape[axis + 1 :])


def _gather_static(x: Tensor, axis: int, indices: Static) -> Tensor:
    axis = axis % x.dim()
    wanted = [int(i) % int(x.shape[axis]) for i in indices.reshape(-1)]
    if indices.ndim == 0:
        return x.select(axis, wanted[0])
    if wanted and wanted == list(range(wanted[0], wanted[0] + len(wanted))):
        found = rows(x, axis, wanted[0], len(wanted))
    else:
        found = x.index_select(axis, torch.tensor(wanted, dtype=torch.int64, device=x.device))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(node: OnnxNode, x: Value, indices: Value) -> Tensor:
    x, indices = tensors((x, indices))
    axis = node.get("axis", 0)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


def gather_nd(node: OnnxNode, x: Value, indices: Value) -> Tensor:
    if node.get("batch_dims", 0):
        raise node.error("batch_dims other than 0 cannot be trained")
    data, at = tensors((x, indices))
    return data[tuple(at.long().unbind(-1))]


def scatter_elements(node: OnnxNode, x: Value, indices: Value, updates: Value) -> Tensor:
    data, at, new = tensors((x, indices, updates))
    axis, reduction = node.get("axis", 0), node.get("reduction", "none")
    at = torch.where(at < 0, at + data.shape[axis], at).long()
    if reduction == "none":
        return data.scatter(axis, at, new)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return data.scatter_reduce(axis, at, new, names[reduction])


def scatter_nd(node: OnnxNode, x: Value, indices: Value, updates: Value) -> Tensor:
    data, at, new = tensors((x, indices, updates))
    reduction = node.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise node.error(f"reduction {reduction!r}; 'none' and 'add' can be trained")
    return data.index_put(tuple(at.long().unbind(-1)), new, accumulate=reduction == "add")


def one_hot(node: OnnxNode, indices: Value, depth: Value, values: Value) -> Tensor:
    at, pair = tensors((indices, values))
    count, axis = int(number(node, depth, "depth")), node.get("axis", -1)
    kind = torch.int64
    wrapped = torch.where(at < 0, at + count, at).to(kind).unsqueeze(-1)
    hot = wrapped == torch.arange(count, device=wrapped.device, dtype=kind)
    return torch.where(hot, pair[1], pair[0]).movedim(-1, axis)


def top_k(node: OnnxNode, x: Tensor, count: Value = None) -> tuple[Tensor, Tensor]:
    k = node.get("k") if count is None else int(number(node, count, "k"))
    found = torch.topk(x, k, node.get("axis", -1), bool(node.get("largest", 1)), bool(node.get("sorted", 1)))
    return found.values, found.indices


def cumsum(node: OnnxNode, x: Tensor, axis: Value) -> Tensor:
    dim = int(number(node, axis, "axis"))
    x = x.flip(dim) if node.get("reverse", 0) else x
    y = x.cumsum(dim, dtype=x.dtype)
    y = y - x if node.get("exclusive", 0) else y
    return y.flip(dim) if node.get("reverse", 0) else y


def trilu(node: OnnxNode, x: Tensor, diagonal: Value = None) -> Tensor:
    k = 0 if diagonal is None else int(number(node, diagonal, "diagonal"))
    return torch.triu(x, k) if node.get("upper", 1) else torch.tril(x, k)


def eye_like(node: OnnxNode, x: Tensor) -> Tensor:
    kind = torch_dtype(node, node.get("dtype")) if node.get("dtype") else x.dtype
    eye = torch.ones(x.shape, dtype=kind, device=x.device)
    k = node.get("k", 0)
    return torch.tril(torch.triu(eye, k), k)


def constant_of_shape(node: OnnxNode, sizes: Value) -> Static:
    value = node.get("value")
    fill = np.zeros(1, np.float32) if value is None else value
    target = tuple(ints(node, sizes, "shape"))
    # A view: however large, it costs nothing until it meets a tensor.
    return np.broadcast_to(fill.reshape(()), target)


def range_(node: OnnxNode, start: Value, limit: Value, step: Value) -> Tensor:
    low, high, delta = (number(node, v, "limits") for v in (start, limit, step))
    return torch.arange(low, high, delta)


def nonzero(node: OnnxNode, x: Tensor) -> Tensor:
    raise node.error("the shape of its result depends on data, which no training plan can know beforehand")


def random_like(node: OnnxNode, x: Value, *, mode: Mode) -> Tensor:
    """Only the shape of the input counts, so it may well be a number's."""
    like = to_tensor(x, mode.device) if is_static(x) else x
    return _drawn(node, like, torch_dtype(node, node.get("dtype")) if node.get("dtype") else like.dtype)


def random(node: OnnxNode, *, mode: Mode) -> Tensor:
    kind = torch_dtype(node, node.get("dtype", 1))
    return _drawn(node, torch.empty(node.get("shape"), dtype=kind, device=mode.device), kind)


def _drawn(node: OnnxNode, like: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers from torch's generator; a seed attribute would repeat itself every step, so it is left."""
    if node.op.startswith("RandomUniform"):
        low, high = node.get("low", 0.0), node.get("high", 1.0)
        y = torch.rand_like(like, dtype=kind)
        return y if (low, high) == (0.0, 1.0) else y * (high - low) + low
    mean, scale = node.get("mean", 0.0), node.get("scale", 1.0)
    y = torch.randn_like(like, dtype=kind)
    return y if (mean, scale) == (0.0, 1.0) else y * scale + mean


def bernoulli(node: OnnxNode, x: Value, *, mode: Mode) -> Tensor:
    x = to_tensor(x, mode.device) if is_static(x) else x
    kind = torch_dtype(node, node.get("dtype")) if node.get("dtype") else x.dtype
    return torch.bernoulli(x).to(kind)


def constant(node: OnnxNode) -> Any:
    """The one value that a Constant node holds, as a static."""
    kinds = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if "value" in node.attrs:
        return node.attrs["value"]
    for key, kind in kinds.items():
        if key in node.attrs:
            return np.asarray(node.attrs[key], dtype=kind)
    raise node.error(f"a constant of kind {', '.join(node.attrs)} cannot be trained; only numbers can")
