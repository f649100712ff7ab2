"""Calls that differ in their number of rows alone are one family, with a curve of seconds over size.

A plan's bands ask the same operators about ever other numbers of rows. Of a family a few sizes are measured;
what is between is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from rowtune.graph.graph import numel
from rowtune.runtime.blank import Like, Signature

COLD = ", cold"
"""Ends a family of calls whose tensors are in no cache."""


class Sized(NamedTuple):
    """A call's family, its size along the family's curve, and for calls that nothing was measured of their
    multiply-adds and the bytes that they read and write."""

    family: str
    size: int
    operations: float
    bytes: int


@lru_cache(maxsize=200_000)
def sized(call: Signature) -> Sized:
    """Where a call stands."""
    name = call.op._schema.name.removeprefix("aten::")
    found = _BY_NAME.get(name, _elementwise)(call, name)
    return found._replace(family=found.family + COLD) if call.cold else found


def likes(arguments: Any) -> Iterator[Like]:
    """The tensors among a signature's arguments, in order."""
    for argument in arguments:
        if isinstance(argument, Like):
            yield argument
        elif isinstance(argument, tuple) and not is_value(argument):
            yield from likes(argument)


def is_value(argument: tuple[Any, ...]) -> bool:
    """Whether this is (type, value): an argument that is neither tensor nor tuple."""
    return len(argument) == 2 and isinstance(argument[0], type)


def value(argument: Any) -> Any:
    """An argument without tensors as it was given."""
    if is_value(argument):
        return argument[1]
    return tuple(value(a) for a in argument)


def layout(like: Like) -> str:
    """How a tensor lies in memory: dense, channels last, or with gaps (rows of a larger one)."""
    shape, stride = like.shape, like.stride
    ordered = sorted((st, s) for s, st in zip(shape, stride, strict=True) if s > 1)
    dense, step = True, 1
    for st, s in ordered:
        dense &= st == step
        step *= s
    last = len(shape) > 3 and shape[1] > 1 and stride[1] == 1
    return ("last" if last else "") + ("" if dense else "gaps") or "dense"


def _kind(like: Like) -> str:
    return str(like.dtype).removeprefix("torch.")


def _bytes(found: list[Like]) -> int:
    return sum(numel(t.shape) * t.dtype.itemsize for t in found)


def _elementwise(call: Signature, name: str) -> Sized:
    """The largest tensor decides; others are as large, or are spread over it."""
    found = [*likes(call.args), *likes(v for _, v in named(call))]
    size = max((numel(t.shape) for t in found), default=0) or _made(call)
    tags = [f"{_kind(t)} {layout(t) if numel(t.shape) == size else 'spread'}" for t in found]
    return Sized(f"{name} {call.op._overloadname}: {', '.join(tags)}", size, float(size), 2 * _bytes(found))


def _with_values(call: Signature, name: str) -> Sized:
    """Sizes of windows and dimensions matter as well."""
    found = _elementwise(call, name)
    values = [value(a) for a in call.args if not isinstance(a, Like) and not [*likes((a,))]]
    return found._replace(family=f"{found.family} {values}")


def _joined(call: Signature, name: str) -> Sized:
    """All of what is joined is copied."""
    found = [*likes(call.args)]
    size = sum(numel(t.shape) for t in found)
    gaps = sorted({layout(t) for t in found})
    return Sized(f"{name}: {_kind(found[0])} {gaps}", size, float(size), 2 * _bytes(found))


def _product(call: Signature, name: str) -> Sized:
    """Matrix products: the last two tensors are the factors. With few rows the second one's memory bounds
    them, with many the arithmetic: another second factor is another family."""
    found = [*likes(call.args)]
    a, b = found[-2:]
    size = numel(a.shape) * b.shape[-1]
    family = f"{name}: {_kind(a)} {layout(a)} by {[*b.shape]} {layout(b)}"
    return Sized(family, size, 2.0 * size, _bytes(found))


FEW = 20480
"""Elements in the first four dimensions of one image, up to which torch convolves on a processor with kernels
of its own (`use_mkldnn` in its Convolution.cpp), many times slower in three dimensions."""


def _convolution(call: Signature, name: str) -> Sized:
    """Over pixels of the input; the width stays a layer's own in all of its bands. Low bands may run another
    kernel than high ones: a family of their own."""
    found = [*likes(call.args)]
    back = name != "convolution"
    x, weight = found[1 if back else 0], found[2 if back else 1]
    rest = [value(a) for a in call.args if not isinstance(a, Like)]
    stride, _, dilation, transposed, _, groups = rest[-7:-1] if back else rest[-6:]
    mask = f" for {rest[-1]}" if back else f" bias {len(found) > 2}"
    pixels = numel(x.shape) // max(x.shape[1], 1)
    few = x.shape[0] == 1 and groups == 1 and max(weight.shape[-2:]) <= 3 and numel(x.shape[:4]) <= FEW
    per_pixel = numel(weight.shape) / (1 if transposed else math.prod(stride))
    family = (
        f"{name}: {_kind(x)} {layout(x)} width {x.shape[-1]} weight {[*weight.shape]} {layout(weight)} "
        f"stride {stride} dilation {dilation} groups {groups}{' transposed' * transposed}{' few' * few}{mask}"
    )
    operations = 2.0 * pixels * per_pixel * (2 if back else 1)
    return Sized(family, pixels, operations, _bytes(found))


def any_width(family: str) -> str:
    """A convolution's family whatever the width of its images; others as they are."""
    head, found, tail = family.partition(" width ")
    return head + tail.partition(" ")[2] if found else family


def named(call: Signature) -> Iterator[tuple[str, Any]]:
    """Keyword arguments by name."""
    for key, argument in call.kwargs:
        yield key[1] if isinstance(key, tuple) else key, argument


def _made(call: Signature) -> int:
    """Elements of memory that is made from a size alone."""
    sizes = [
        value(a) for a in call.args if isinstance(a, tuple) and not isinstance(a, Like) and not is_value(a)
    ]
    return math.prod(sizes[0]) if sizes and all(isinstance(n, int) for n in sizes[0]) else 0


_BY_NAME: dict[str, Callable[[Signature, str], Sized]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution,
    "cat": _joined,
    "stack": _joined,
    "mm": _product,
    "bmm": _product,
    "addmm": _product,
    "sum": _with_values,
    "mean": _with_values,
    "var_mean": _with_values,
    "max_pool2d_with_indices": _with_values,
    "max_pool2d_with_indices_backward": _with_values,
    "avg_pool2d": _with_values,
    "avg_pool2d_backward": _with_values,
}
"""Operators whose time is not that of their largest tensor alone."""

FREE = frozenset({torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
                  torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
                  torch.ops.aten.new_empty_strided.default, torch.ops.aten.detach.default})  # fmt: skip
"""Calls that touch no memory."""
