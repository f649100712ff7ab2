"""What a row rule is: how one operator meets a band of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rowtune.graph.graph import Node, Value, replace
from rowtune.rows import Rows, Window


@dataclass(frozen=True, slots=True)
class Read:
    """How one input is read: sliced along `dim` by `window`, or used whole where `dim` is None."""

    dim: int | None = None
    window: Window | None = None


WHOLE = Read()


@dataclass(frozen=True, slots=True)
class Slab:
    """One call of an operator on slices: each tensor holds exactly the rows `reads` says.

    `rows` are the absolute output rows to make, `shape` the shape the result must have.
    """

    node: Node
    tensors: Mapping[str, Tensor]
    rows: Rows
    reads: Mapping[str, Rows]
    shape: tuple[int, ...]
    images: Rows

    def call(self, **changed: Any) -> Tensor:
        """The operator as it stands, on the slices."""
        args = replace(self.node.args, self.tensors.__getitem__)
        kwargs = replace(self.node.kwargs, self.tensors.__getitem__)
        return self.node.target(*args, **{**kwargs, **changed})  # type: ignore[no-any-return]


Run = Callable[[Slab], Tensor]


def as_is(slab: Slab) -> Tensor:
    return slab.call()


def cut(full: Tensor, dim: int, start: int, rows: int) -> Tensor:
    """`rows` rows of a result; itself where that is all of it: the gradient of a view is a copy."""
    return full if full.shape[dim] == rows else full.narrow(dim, start, rows)


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the shares of bands become one value: `merge` two of them; or `total`, where it is given, makes it
    of all, side by side along a new first dimension, and of the elements that each is of (`count` of all
    rows and images that go into one). Where a band's gradient depends on the finished total,
    `again(slab, total)` stands in for its share in backward; its value is not read. `shared`: the finished
    statistics are those of all processes.

    `add_gradient(node, x, total, grad, into)` adds to `into`, the gradient of the whole x, what comes of the
    gradient of the total: whoever reads x and the total can do so, and spare the maker of both that work.
    """

    merge: Callable[[Tensor, Tensor], Tensor] = torch.add
    again: Callable[[Slab, Tensor], Tensor] | None = None
    shared: bool = False
    add_gradient: Callable[[Node, Tensor, Tensor, Tensor, Tensor], None] | None = None
    total: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None
    count: int = 0


@dataclass(frozen=True, slots=True)
class RowRule:
    """`dim` is the band dimension of the output (None: the output is used whole).

    With `reduces`, the output accumulates over bands: `run` gives the share of the rows it is handed.
    `makes(rows, got)` is how many rows `run` computes from input rows `got` to take `rows` from, as a view
    that keeps them all in memory; None where it makes no more than asked. `unvalued` is `run` for a backward
    that needs no values any more: the same gradients, of a stand-in without memory.
    """

    dim: int | None
    reads: Mapping[str, Read]
    run: Run = as_is
    reduces: Reduction | None = None
    makes: Callable[[Rows, Rows], int] | None = None
    unvalued: Run | None = None


@dataclass(frozen=True, slots=True)
class Opaque:
    """The operator needs its inputs whole along this axis; `reason` is for people.

    `dim` is where the axis lies in the output all the same, so that a later segment can be banded again.
    """

    reason: str
    dim: int | None = None


Dims = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Question:
    """What a rule function is asked: this node, with its inputs' band dimensions."""

    node: Node
    dims: Dims
    values: Mapping[str, Value]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    @property
    def out(self) -> tuple[int, ...]:
        return self.values[self.node.name].shape

    def arg(self, position: int, name: str, default: Any) -> Any:
        """A non-tensor argument, given by position or by name."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)


Rule = Callable[[Question], RowRule | Opaque]
