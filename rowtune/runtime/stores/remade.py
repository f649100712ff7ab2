"""Not kept, but made again when backward wants it: what normalisations, activations, pools and joins made.

A node's output is let go of, and backward runs the node again on what it read, which is kept or is itself
made again (rowtune/plan/remake.py says which). Batch norms run again with the statistics that forward found.
Indices of pools are kept in the narrowest type that holds them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowtune.graph.graph import Node, replace
from rowtune.graph.regions import inside
from rowtune.kernels.rounding import packed, unpacked
from rowtune.runtime.dropout import Seed
from rowtune.runtime.evaluate import run_whole
from rowtune.runtime.precision import as_it_was, autocast_key
from rowtune.runtime.stores import keeping as limits
from rowtune.runtime.stores.branches import Branched, Edge, Saved, edges_of
from rowtune.runtime.stores.keeping import Keeping, Kept
from rowtune.torch_private import storage_of

Lookup = Callable[[str], Any]

BRANCHES = frozenset({"relu"})
"""Operators whose gradient is found again from the sign of their output."""


class Remaking:
    """For one call of a segment.

    Args:
        names: the nodes whose outputs are not kept.
        seed: of this step's random masks.
        keeping: where the rest is kept; None: where it is.
        rounded: whether that gives back something else. What decides branches is then kept as bits.
    """

    def __init__(
        self, names: frozenset[str], seed: Seed, keeping: Keeping | None = None, rounded: bool = False
    ) -> None:
        self.names, self.seed, self.keeping, self.autocast = names, seed, keeping, autocast_key()
        self.rounded = rounded
        self.known: dict[int, _Known] = {}
        self.fresh: list[_Fresh] = []
        self.largest_index = 0
        self.edges: tuple[Edge, ...] = ()

    # -- what autograd asks --------------------------------------------------------------------------------

    def pack(self, t: Tensor) -> Tensor | Saved:
        size = t.numel() * t.itemsize
        if size < limits.LEAST_BYTES or t.layout != torch.strided:
            return t
        known = self._known(t)
        if known is not None:
            known.readers += 1
            return self._on_its_sides(View(known, t), t)
        if t.dtype == torch.int64 and 0 < self.largest_index < 1 << 31:
            return _Narrow(t.to(torch.int16 if self.largest_index < 1 << 15 else torch.int32))
        self.fresh.append(_Fresh(t))
        return self._on_its_sides(self.fresh[-1], t) if self._is_rounded(t) else self.fresh[-1]

    def _is_rounded(self, t: Tensor) -> bool:
        """Whether a tensor that is kept comes back on the other side of an edge. Stores keep signs."""
        outside = self.keeping is None or storage_of(t) in self.keeping.outside
        return not outside and any(edge.at for edge in self.edges)

    def _on_its_sides(self, saved: Saved, t: Tensor) -> Saved:
        return Branched(saved, t, self.edges) if self.edges and t.is_floating_point() else saved

    def unpack(self, kept: Tensor | Saved) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.get()

    def forget(self) -> None:
        """Forward is over."""
        self.known.clear()
        if self.keeping is not None:
            self.keeping.forget()

    # -- what the segment tells ----------------------------------------------------------------------------

    def run(self, node: Node, lookup: Lookup) -> Any:
        """The node's output, now and in backward."""
        self.largest_index = _plane(node, lookup)
        self.edges = edges_of(node) if self.rounded else ()
        out = run_whole(node, lookup, self.seed)
        self.largest_index, self.edges = 0, ()
        if isinstance(out, Tensor) and node.name in self.names and out.requires_grad:
            sources = {n: self._source(lookup(n)) for n in node.inputs}
            made = Made(self._again(node, out), sources, out)
            self.known[storage_of(out)] = _Known(weakref.ref(out.untyped_storage()), made)
            for fresh in self.fresh:
                fresh.settle(out, made)
        for fresh in self.fresh if self.keeping is not None else ():
            fresh.kept = self._kept(fresh.kept)
        self.fresh.clear()
        return out

    def _known(self, t: Tensor) -> Made | None:
        found = self.known.get(storage_of(t))
        return found.made if found is not None and found.storage() is not None else None

    def _source(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = self._known(value)
        return self._kept(value.detach()) if made is None else View(made, value)

    def _kept(self, saved: Tensor | View | Kept) -> Tensor | View | Kept:
        return self.keeping.pack(saved) if self.keeping is not None and isinstance(saved, Tensor) else saved

    def _again(self, node: Node, out: Tensor) -> Callable[[Lookup], Tensor]:
        autocast, seed = self.autocast, self.seed
        run = _normalising(node, out) if node.op == "batch_norm" else None

        def again(lookup: Lookup) -> Tensor:
            with torch.no_grad(), as_it_was(autocast):
                found = run(lookup) if run else run_whole(node, lookup, seed, first_time=False)
            assert isinstance(found, Tensor)
            return found

        return _with_signs(again, out) if self.rounded and node.op in BRANCHES else again


def _with_signs(again: Callable[[Lookup], Tensor], out: Tensor) -> Callable[[Lookup], Tensor]:
    """Made again from rounded values, an element near zero may come out on the other side."""
    signs, shape, least = packed(out > 0), out.shape, torch.finfo(out.dtype).tiny

    def signed(lookup: Lookup) -> Tensor:
        with torch.no_grad():
            return again(lookup).clamp_min_(least).mul_(unpacked(signs, shape))

    return signed


def _plane(node: Node, lookup: Lookup) -> int:
    """The largest index that a pool may save, and one."""
    if not node.op.startswith(("max_pool", "adaptive_max_pool")):
        return 0
    return math.prod(lookup(node.inputs[0]).shape[2:])


def _normalising(node: Node, out: Tensor) -> Callable[[Lookup], Tensor] | None:
    """A batch norm with the statistics that it found; None where it does not tell them."""
    mean, scale = (getattr(out.grad_fn, f"_saved_result{i}", None) for i in (1, 2))
    if not node.args[5] or mean is None or scale is None or not mean.numel():
        return None
    eps = float(node.args[7])

    def run(lookup: Lookup) -> Tensor:
        x, weight, bias = replace(node.args[:3], lookup)
        var = scale.pow(-2).sub_(eps)
        with inside(node.region):
            return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    return run


class Made:
    """A node's output, to be made again as often as it is wanted. `readers` are autograd's that are still to
    come: from the first of them to the last it is there."""

    def __init__(self, again: Callable[[Lookup], Tensor], sources: Mapping[str, Any], out: Tensor) -> None:
        self.again, self.sources = again, sources
        self.stride, self.offset = out.stride(), int(out.storage_offset())
        self.readers = 0
        self.here: Tensor | None = None

    def read(self) -> Tensor:
        """For a reader of autograd's."""
        found = self.tensor()
        self.readers -= 1
        self.here = found if self.readers > 0 else None
        return found

    def tensor(self) -> Tensor:
        """For another that is made of it, whose own readers may come long before those of this."""
        if self.here is not None:
            return self.here
        found = self.again(self._lookup)
        if found.stride() != self.stride:
            found = torch.empty_strided(
                found.shape, self.stride, dtype=found.dtype, device=found.device
            ).copy_(found)
        return found

    def _lookup(self, name: str) -> Any:
        source = self.sources[name]
        if isinstance(source, View):
            return source.of(source.made.tensor())
        return source.get() if isinstance(source, Kept) else source


class View:
    """A tensor that lies where a node's output lay."""

    def __init__(self, made: Made, t: Tensor) -> None:
        self.made, self.shape, self.stride = made, t.shape, t.stride()
        self.offset = int(t.storage_offset()) - made.offset

    def get(self) -> Tensor:
        return self.of(self.made.read())

    def of(self, whole: Tensor) -> Tensor:
        if whole.shape == self.shape and whole.stride() == self.stride:
            return whole
        return whole.as_strided(self.shape, self.stride, int(whole.storage_offset()) + self.offset)


class _Fresh:
    """A tensor that is saved while its node runs: perhaps the output itself, which is then not kept."""

    def __init__(self, t: Tensor) -> None:
        self.kept: Tensor | View | Kept = t

    def settle(self, out: Tensor, made: Made) -> None:
        if isinstance(self.kept, Tensor) and storage_of(self.kept) == storage_of(out):
            self.kept = View(made, self.kept)
            made.readers += 1

    def get(self) -> Tensor:
        return self.kept if isinstance(self.kept, Tensor) else self.kept.get()


class _Narrow(NamedTuple):
    indices: Tensor

    def get(self) -> Tensor:
        return self.indices.to(torch.int64)


class _Known(NamedTuple):
    """While the memory of an output lives, it may be saved."""

    storage: weakref.ref[Any]
    made: Made
