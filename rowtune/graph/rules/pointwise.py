"""Operators whose output row i reads input row i: pointwise ones with broadcasting, and those that only mix
other axes (linear, softmax over channels, layer norm over channels, frozen batch norm)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rowtune.graph.graph import Ref
from rowtune.graph.rules.rule import WHOLE, Opaque, Question, Read, Reduction, RowRule, Run, as_is
from rowtune.kernels.unvalued import unvalued_sum
from rowtune.rows import pointwise as same_rows
from rowtune.torch_private import OpOverload


def elementwise(q: Question) -> RowRule | Opaque:
    """Broadcasting: dimensions are aligned from the last one. An input with one row there, or none, is used
    whole by every band; a parameter with all the rows is sliced like a feature map."""
    out = q.out
    found = {
        d + len(out) - len(q.shape(n))
        for n, d in q.dims.items()
        if d is not None and q.shape(n)[d] == out[d + len(out) - len(q.shape(n))]
    }
    if len(found) != 1:
        return Opaque("its inputs are banded along different axes")
    dim = found.pop()
    reads = {}
    for name in q.node.inputs:
        own = dim - (len(out) - len(q.shape(name)))
        if own < 0 or (q.shape(name)[own] == 1 and out[dim] != 1):
            if q.dims[name] is not None and q.dims[name] != own:
                return Opaque("its inputs are banded along different axes")
            reads[name] = WHOLE
        elif q.dims[name] is not None and q.dims[name] != own:
            return Opaque("its inputs are banded along different axes")
        else:
            reads[name] = Read(own, same_rows(out[dim]))
    return RowRule(dim, reads, unvalued=_sum_of(q))


def _sum_of(q: Question) -> Run | None:
    """For a plain sum of two: without values."""
    if q.node.op != "add" or q.node.kwargs or not all(isinstance(a, Ref) for a in q.node.args):
        return None
    if len(q.node.inputs) != 2 or q.shape(q.node.inputs[0]) != q.shape(q.node.inputs[1]):
        return None
    return lambda slab: unvalued_sum(*(slab.tensors[n] for n in q.node.inputs))


def along(
    q: Question, mixed: Callable[[Question, int], bool], why: str, run: Run = as_is
) -> RowRule | Opaque:
    """The first input is banded along a dimension that the operator does not mix; the others are whole."""
    x = q.node.inputs[0]
    dim = q.dims[x]
    if dim is None or any(d is not None for n, d in q.dims.items() if n != x):
        return Opaque("a weight depends on the image")
    if mixed(q, dim):
        return Opaque(why, dim if len(q.out) > dim and q.out[dim] == q.shape(x)[dim] else None)
    if len(q.out) != len(q.shape(x)) or q.out[dim] != q.shape(x)[dim]:
        return Opaque(why)
    reads = {n: WHOLE for n in q.node.inputs}
    reads[x] = Read(dim, same_rows(q.out[dim]))
    return RowRule(dim, reads, run)


def linear(q: Question) -> RowRule | Opaque:
    """A linear layer over the last axis, which is not the band's."""
    return along(q, lambda q, d: d == len(q.out) - 1, "a linear layer mixes the band axis")


def one_axis(position: int, default: int) -> Callable[[Question], RowRule | Opaque]:
    """softmax, log_softmax, glu, cumsum ...: mixes one dimension, given at `position`."""

    def rule(q: Question) -> RowRule | Opaque:
        """softmax, log_softmax, glu, cumsum over one axis, which is not the band's."""
        axis = int(q.arg(position, "dim", default)) % len(q.out)
        return along(q, lambda q, d: d == axis, f"{q.node.op} over the band axis")

    return rule


def layer_norm(q: Question) -> RowRule | Opaque:
    """Layer and RMS norm over last axes that do not include the band's."""
    axes = len(q.arg(1, "normalized_shape", ()))
    return along(q, lambda q, d: d >= len(q.out) - axes, f"{q.node.op} over the band axis")


def batch_norm(q: Question) -> RowRule | Opaque:
    """Frozen statistics are pointwise. Train mode needs the statistics of all rows first: a barrier."""
    if q.arg(5, "training", False):
        return Opaque(
            "train-mode batch norm needs the statistics of all rows and images", q.dims[q.node.inputs[0]]
        )
    return along(q, lambda q, d: d == 1, "batch norm's channels")


def per_image(q: Question) -> RowRule | Opaque:
    """Group and instance norm, adaptive pooling, attention: any axis but the batch is mixed."""
    return along(q, lambda q, d: d != 0, f"{q.node.op} needs all rows of an image")


def prelu(q: Question) -> RowRule | Opaque:
    """PReLU with one slope, or one a channel."""
    return along(q, lambda q, d: d == 1, "PReLU's channels")


def like(q: Question) -> RowRule | Opaque:
    """zeros_like and its kin: only the shape of the input matters."""
    return along(q, lambda q, d: False, "")


def pooled_axes(q: Question) -> RowRule | Opaque:
    """mean, sum, amax, var over axes other than the band axis."""
    x = q.node.inputs[0]
    dim, rank = q.dims[x], len(q.shape(x))
    axes = q.arg(1, "dim", None)
    axes = [axes] if isinstance(axes, int) else axes
    gone = set(range(rank)) if not axes else {int(a) % rank for a in axes}
    if dim is None or dim in gone:
        return Opaque(f"{q.node.op} over the band axis")
    kept = rank == len(q.out)
    out_dim = dim if kept else dim - sum(a < dim for a in gone)
    return RowRule(out_dim, {x: Read(dim, same_rows(q.shape(x)[dim]))})


def dropout(q: Question) -> RowRule | Opaque:
    """The mask is a function of (step seed, node, image, absolute row): see runtime/dropout.py."""
    return along(q, lambda q, d: False, "")


def loss_sums(q: Question) -> RowRule | Opaque:
    """The loss's sums over rows: a reduction. Targets of class indices lack the channel axis."""
    loss = q.extra["loss"]
    output, target = (a.name for a in q.node.args)
    dim = q.dims[output]
    if dim is None or not loss.row_local or dim == 1:
        return Opaque(f"the loss {loss.name} needs its whole input")
    own = dim - 1 if loss.class_target and dim > 1 else dim
    rows = q.shape(output)[dim]
    if own >= len(q.shape(target)) or q.shape(target)[own] != rows:
        return Opaque("the loss's target has other rows than its output")
    reads = {output: Read(dim, same_rows(rows)), target: Read(own, same_rows(rows))}
    return RowRule(None, reads, reduces=Reduction())


def random(q: Question) -> RowRule | Opaque:
    """Random numbers are drawn for the whole tensor, so that every plan draws the same."""
    return Opaque(f"{q.node.op} draws random numbers for the whole tensor")


def is_pointwise(target: object) -> bool:
    """PyTorch marks its pointwise operators; this covers the whole aten set without naming it."""
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags
