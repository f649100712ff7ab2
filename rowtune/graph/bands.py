"""Where the band axis runs through a graph: one rule for every node, one dimension for every value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from rowtune.graph.graph import Graph, Value
from rowtune.graph.rules import Opaque, Question, RowRule, rule_for
from rowtune.rows import Affine, Window


@dataclass(frozen=True)
class Banding:
    """`axis` of the inputs followed through the graph. `dims[v]` is None where a value is used whole.

    `removed` counts rows taken out of the middle of values where only sizes are wanted (plan/shorten.py).
    """

    axis: int
    rules: dict[str, RowRule | Opaque]
    dims: dict[str, int | None]
    removed: Mapping[str, int] = field(default_factory=dict)

    def rule(self, node: str) -> RowRule:
        found = self.rules[node]
        assert isinstance(found, RowRule), f"{node} is opaque: {found}"
        return found

    def height(self, value: Value) -> int:
        """Rows of a value along the axis: 1 where it is used whole. For a reduction, the rows it adds up."""
        found = self.rules.get(value.name)
        if isinstance(found, RowRule) and found.reduces:
            return next(r.window.out_rows for r in found.reads.values() if r.window is not None)
        dim = self.dims[value.name]
        return 1 if dim is None else value.shape[dim] - self.removed.get(value.name, 0)

    def full_height(self, value: Value) -> int:
        """The same with all rows in place."""
        return self.height(value) + self.removed.get(value.name, 0)


@lru_cache(maxsize=64)
def banding(graph: Graph, axis: int) -> Banding:
    """Follow input dimension `axis` (0: the batch, 2: rows) through the graph."""
    rules: dict[str, RowRule | Opaque] = {}
    starts = {name: axis for name in graph.inputs if len(graph.values[name].shape) > axis}
    dims = {v.name: starts.get(v.name) for v in graph.values.values() if v.kind != "node"}
    extra = {"loss": graph.loss}
    image_rank = max((len(graph.values[i].shape) for i in graph.inputs), default=0)
    for node in graph.nodes:
        asked = Question(node, {n: dims[n] for n in node.inputs}, graph.values, extra)
        out = graph.values[node.name]
        if out.parts or any(graph.values[n].parts for n in node.inputs):
            rule: RowRule | Opaque = Opaque(f"{node.op} has several outputs")
        else:
            rule = rule_for(asked)
        if isinstance(rule, RowRule):  # a target has the rows of the output that it is compared with
            dims.update((n, read.dim) for n, read in rule.reads.items() if n in graph.targets)
        if axis == 0 and isinstance(rule, RowRule):
            rule = _image_by_image(rule, dims)
        if isinstance(rule, Opaque) and rule.dim is None and len(out.shape) == image_rank > axis:
            rule = Opaque(rule.reason, axis)  # an image again: a later segment may start here
        rules[node.name] = rule
        dims[node.name] = rule.dim
    return Banding(axis, rules, dims)


def _image_by_image(rule: RowRule, dims: dict[str, int | None]) -> RowRule | Opaque:
    """Bands of images are sliced by the same numbers everywhere, beside bands of rows: entry i must read
    entry i."""
    for name, read in rule.reads.items():
        if read.dim is None:
            continue
        if read.window is not None and not _same_entries(read.window):
            return Opaque("the batch axis is cut, repeated or merged with another")
        if dims[name] is None:
            return Opaque(f"{name} has an entry for every image, but does not come from the images")
    return rule


MOST_IMAGES = 1 << 20
"""Entries of a batch that are looked at one by one."""


def _same_entries(window: Window) -> bool:
    if isinstance(window, Affine) and window.pointwise:
        return True
    own = range(window.rows)
    return (
        window.rows < MOST_IMAGES
        and window.out_rows == window.rows
        and all(window.lo(i) == i and window.hi(i + 1) == i + 1 for i in own)
    )
