"""Run the nodes of a group on slices, or whole nodes as PyTorch runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from rowtune.graph.bands import Banding
from rowtune.graph.graph import Graph, Node, replace
from rowtune.graph.regions import inside
from rowtune.graph.rules import Slab
from rowtune.kernels.in_place import run_in_place
from rowtune.kernels.known import with_value
from rowtune.plan.groups import Group
from rowtune.plan.remake import NORMS
from rowtune.rows import Rows, need
from rowtune.runtime.dropout import Seed, draws, dropout_slab, seeded
from rowtune.runtime.layout import ORDERS, has_channels_last

ALL_IMAGES = Rows(0, -1)
NOTHING: Mapping[str, Tensor] = {}

aten = torch.ops.aten
ANY_LAYOUT: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
"""A graph is traced on contiguous tensors, and flattening is a view there. In channels_last it is none."""


def run_whole(node: Node, lookup: Callable[[str], Any], seed: Seed, *, first_time: bool = True) -> Any:
    """One node on whole tensors. Where it has an effect on a buffer, only the first time has it, so that a
    recomputed batch norm updates its statistics once per forward call."""
    args, kwargs = replace(node.args, lookup), replace(node.kwargs, lookup)
    with inside(node.region):
        return _called(node, args, kwargs, seed, first_time)


def _called(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], seed: Seed, first_time: bool) -> Any:
    if node.op == "dropout":
        return _dropout(node, args, seed)
    if node.effect and not first_time:
        if node.op not in NORMS:
            return args[0]
        # Copies: checkpoint counts the tensors that autograd saves, and the statistics are among them.
        args = (*args[:3], args[3].clone(), args[4].clone(), *args[5:])
    if node.random:
        with seeded(seed, node.name, args, kwargs):
            return node.target(*args, **kwargs)
    return ANY_LAYOUT.get(node.target, node.target)(*args, **kwargs)


def _dropout(node: Node, args: tuple[Any, ...], seed: Seed) -> Tensor:
    x: Tensor = args[0]
    if not draws(node):
        return x
    return dropout_slab(x, float(args[1]), seed, node.name, None, Rows(0, 0), ALL_IMAGES)


class Evaluator:
    """Runs groups on slices of rows `ranges` and images `images`. Tapes of reductions read the finished
    `totals`."""

    def __init__(
        self, graph: Graph, bands: Banding, images: Banding, seed: Seed, device: torch.device
    ) -> None:
        self.graph, self.bands, self.image_bands, self.seed, self.device = graph, bands, images, seed, device
        self.totals: Mapping[str, Tensor] = {}
        self.zeros: dict[torch.dtype, Tensor] = {}

    def run(
        self,
        group: Group,
        wanted: tuple[tuple[str, Rows], ...],
        ranges: Mapping[str, Rows],
        slabs: MutableMapping[str, Tensor],
        whole: Mapping[str, Tensor],
        images: Rows,
        spared: Collection[str] = (),
        unread: Collection[str] = (),
        known: Mapping[str, Tensor] = NOTHING,
    ) -> dict[str, Tensor]:
        """The group's outputs, just the rows `wanted`.

        Args:
            ranges: rows of each value in the group and of what it reads.
            slabs: what it reads, holding exactly those rows; emptied as they are used up.
            whole: parameters and other values used whole.
            images: batch entries at work; ALL_IMAGES for all.
            spared: nodes to leave out.
            unread: nodes whose gradients are wanted, but whose values are not.
            known: outputs of nodes that are to run on those in place of their input.
        """
        made: dict[str, Tensor] = {}
        for node, drops in zip(group.nodes, group.last_use, strict=True):
            rows = ranges.get(node.name)
            if rows is not None and rows.size and node.name not in spared:
                over = group.in_place.get(node.name)
                if over in unread or node.name in unread or node.name in known:
                    over = None
                with inside(node.region):
                    made[node.name] = slabs[node.name] = self._node(
                        node, rows, ranges, slabs, whole, images,
                        node.name in unread, known.get(node.name), over,
                    )  # fmt: skip
            for name in drops:
                slabs.pop(name, None)
                if name not in group.outputs:
                    made.pop(name, None)
        return {n: self._rows_of(n, made[n], ranges[n], rows) for n, rows in wanted if n in made}

    def _rows_of(self, name: str, made: Tensor, have: Rows, rows: Rows) -> Tensor:
        """An output that is also read inside the group may have been made for more rows than it hands on."""
        dim = self.bands.dims[name]
        if dim is None or have == rows:
            return made
        return made.narrow(dim, rows.lo - have.lo, rows.size)

    def _node(
        self,
        node: Node,
        rows: Rows,
        ranges: Mapping[str, Rows],
        slabs: Mapping[str, Tensor],
        whole: Mapping[str, Tensor],
        images: Rows,
        unread: bool,
        output: Tensor | None,
        over: str | None,
    ) -> Tensor:
        rule = self.bands.rule(node.name)
        tensors: dict[str, Tensor] = {}
        reads: dict[str, Rows] = {}
        for name, read in rule.reads.items():
            tensor = slabs[name] if name in slabs else whole[name] if name in whole else None
            if tensor is None:  # a window that lies in padding altogether
                tensor = self.empty(name, images)
            if read.dim is not None and read.window is not None:
                got = need(read.window, *rows)
                start = ranges[name].lo if name in slabs and self.bands.dims[name] is not None else 0
                if got.size != tensor.shape[read.dim] or (got.size and got.lo != start):
                    tensor = tensor.narrow(read.dim, got.lo - start if got.size else 0, got.size)
                reads[name] = got
            tensors[name] = tensor if output is None else with_value(tensor, output)
        if over is not None and (done := run_in_place(node.op, over, tensors)) is not None:
            return done
        shape = self._shape(node, rule.dim, rows, images)
        if draws(node):
            x = tensors[node.inputs[0]]
            return dropout_slab(x, float(node.args[1]), self.seed, node.name, rule.dim, rows, images)
        slab = Slab(node, tensors, rows, reads, shape, images)
        if rule.reduces and rule.reduces.again and node.name in self.totals and torch.is_grad_enabled():
            return rule.reduces.again(slab, self._of_images(node.name, self.totals[node.name], images))
        run = rule.unvalued if unread else rule.run
        assert run is not None
        return run(slab)

    def _of_images(self, name: str, total: Tensor, images: Rows) -> Tensor:
        at = self.image_bands.dims[name]
        if at is None or images == ALL_IMAGES:
            return total
        return total.narrow(at, images.lo, images.size)

    def empty(self, name: str, images: Rows) -> Tensor:
        """No rows of a value."""
        return self.blank(name, Rows(0, 0), images)

    def blank(self, name: str, rows: Rows, images: Rows) -> Tensor:
        """Zeros for some rows of a value, that take no memory."""
        value, dim, at = self.graph.values[name], self.bands.dims[name], self.image_bands.dims[name]
        shape = list(value.shape)
        if dim is not None:
            shape[dim] = rows.size
        if at is not None and at != dim and images != ALL_IMAGES:
            shape[at] = images.size
        if value.dtype not in self.zeros:
            self.zeros[value.dtype] = torch.zeros((), dtype=value.dtype, device=self.device)
        return self.zeros[value.dtype].expand(shape)

    def _shape(self, node: Node, dim: int | None, rows: Rows, images: Rows) -> tuple[int, ...]:
        shape = list(self.graph.values[node.name].shape)
        if dim is not None:
            shape[dim] = rows.size
        at = self.image_bands.dims[node.name]
        if at is not None and at != dim and images != ALL_IMAGES:
            shape[at] = images.size
        return tuple(shape)


def empty_in_order(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of `shape` whose channels come last in memory if those of `part` do."""
    order = ORDERS[part.dim()] if has_channels_last(part) else torch.contiguous_format
    return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=order)


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients that are summed over bands are summed in at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
