"""Operators that need all rows at once, taken apart: a reduction, which accumulates over bands, and what is
made from it.

A train-mode batch norm becomes `moments` (a reduction), `update_running` (its effect) and `normalise`
(pointwise, with the moments as an input that every band uses whole). Where such an operator lies in a segment
that runs as PyTorch runs it, the original is put back: see `restored`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rowtune.graph.bands import banding
from rowtune.graph.cuts import Stretch, reduces
from rowtune.graph.graph import Fused, Graph, Node, Ref, Value, check, live
from rowtune.kernels.extremes import extremes, largest, take
from rowtune.kernels.moments import moments, normalise, spread_of, update_running

aten = torch.ops.aten


@dataclass
class Parts:
    """What takes an operator's place: nodes with their values, the last of them under its own name. `shared`
    statistics are those of all processes."""

    graph: Graph
    node: Node
    shared: bool = False
    made: list[tuple[Node, Value]] = field(default_factory=list)

    def add(
        self,
        suffix: str,
        op: str,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        value: Value,
        effect: str = "",
    ) -> Ref:
        name = f"{self.node.name}{suffix}"
        node = Node(name, op, target, args, module=self.node.module, effect=effect, region=self.node.region)
        self.made.append((node, replace(value, name=name)))
        return Ref(name)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.graph.values[ref.name].shape

    @property
    def out(self) -> Value:
        return self.graph.values[self.node.name]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        given = self.node.args
        return given[position] if position < len(given) else self.node.kwargs.get(name, default)

    def moments(self, x: Ref, groups: int, centred: bool = True) -> Ref:
        shape = self.shape(x)
        kept = (3, shape[0], groups) if groups else (3, shape[1])
        value = Value("", "node", kept, torch.float64)
        return self.add("_moments", "moments", moments, (x, groups, centred, self.shared), value)


def _batch_norm(p: Parts) -> None:
    x, weight, bias, mean, var, training, momentum, eps = p.node.args[:8]
    if not training:
        return
    stats = p.moments(x, 0)
    _update(p, stats, mean, var, momentum)
    p.add("", "normalise", normalise, (x, stats, weight, bias, 0, eps), p.out)


def _update(p: Parts, stats: Ref, mean: Ref | None, var: Ref | None, momentum: float) -> None:
    if mean is None:
        return
    args: tuple[Any, ...] = (mean, var, stats, momentum)
    if momentum == CUMULATIVE:
        args = (mean, var, stats, None, _batches(p.graph, mean))
    nothing = Value("", "node", (0,), torch.bool)
    p.add("_update", "update_running", update_running, args, nothing, effect=mean.name)


CUMULATIVE = -1.0
"""Stands for momentum=None, which torch.export cannot trace: a cumulative average over all batches."""


def _batches(graph: Graph, mean: Ref) -> Ref:
    """The counter of batches that lives beside a running mean."""
    path = graph.values[mean.name].path.removesuffix("running_mean") + "num_batches_tracked"
    return Ref(next(v.name for v in graph.values.values() if v.path == path))


def _group_norm(p: Parts) -> None:
    x, groups = p.node.args[:2]
    if len(p.shape(x)) < 3:
        return
    stats = p.moments(x, int(groups))
    args = (x, stats, p.arg(2, "weight"), p.arg(3, "bias"), int(groups), p.arg(4, "eps", 1e-5))
    p.add("", "normalise", normalise, args, p.out)


def _instance_norm(p: Parts) -> None:
    x, weight, bias, mean, var, own, momentum, eps = p.node.args[:8]
    if not own:
        return
    channels = p.shape(x)[1]
    stats = p.moments(x, channels)
    _update(p, stats, mean, var, momentum)
    p.add("", "normalise", normalise, (x, stats, weight, bias, channels, eps), p.out)


def _whole_image(p: Parts, x: Ref, axes: int) -> int:
    """Groups of a norm over the last `axes` dimensions: 1 for whole images, the channels for single maps."""
    shape = p.shape(x)
    if axes < 2 or len(shape) < 3:
        return 0
    return {len(shape) - 1: 1, len(shape) - 2: shape[1]}.get(axes, 0)


def _layer_norm(p: Parts) -> None:
    x, axes = p.node.args[0], len(p.arg(1, "normalized_shape", ()))
    if groups := _whole_image(p, x, axes):
        stats = p.moments(x, groups)
        eps = p.arg(4, "eps", 1e-5)
        _scaled(p, (x, stats, None, None, groups, eps), p.arg(2, "weight"), p.arg(3, "bias"))


def _rms_norm(p: Parts) -> None:
    x, axes = p.node.args[0], len(p.arg(1, "normalized_shape", ()))
    if groups := _whole_image(p, x, axes):
        stats = p.moments(x, groups, centred=False)
        eps = p.arg(3, "eps")
        eps = torch.finfo(p.out.dtype).eps if eps is None else eps
        _scaled(p, (x, stats, None, None, groups, eps), p.arg(2, "weight"), None)


def _scaled(p: Parts, args: tuple[Any, ...], weight: Ref | None, bias: Ref | None) -> None:
    """Normalise, then scale and shift element by element."""
    last = "" if weight is None and bias is None else "_normal"
    made = p.add(last, "normalise", normalise, args, p.out)
    if weight is not None:
        made = p.add("" if bias is None else "_scaled", "mul", aten.mul.Tensor, (made, weight), p.out)
    if bias is not None:
        p.add("", "add", aten.add.Tensor, (made, bias), p.out)


def _axes(p: Parts, position: int, name: str = "dim") -> set[int]:
    rank = len(p.shape(p.node.args[0]))
    given = p.arg(position, name)
    if given is None or given == []:
        return set(range(rank))
    return {int(a) % rank for a in ([given] if isinstance(given, int) else given)}


def _maps(p: Parts, axes: set[int]) -> int:
    """Groups of statistics over these axes: single feature maps, or whole images; 0 for any others."""
    shape = p.shape(p.node.args[0])
    rank = len(shape)
    if rank < 3:
        return 0
    return {frozenset(range(2, rank)): shape[1], frozenset(range(1, rank)): 1}.get(frozenset(axes), 0)


def _spread(p: Parts, power: float, correction: float | None) -> None:
    groups = _maps(p, _axes(p, 2 if correction is None else 1))
    if not groups:
        return
    stats = p.moments(p.node.args[0], groups, centred=correction is not None)
    p.add("", "spread_of", spread_of, (stats, correction, power, p.out.shape, p.out.dtype), p.out)


def _correction(p: Parts) -> float:
    if "correction" in p.node.kwargs:
        given = p.node.kwargs["correction"]
        return 1.0 if given is None else float(given)
    return float(bool(p.node.kwargs.get("unbiased", True)))


def _var(p: Parts) -> None:
    _spread(p, 1.0, _correction(p))


def _std(p: Parts) -> None:
    _spread(p, 0.5, _correction(p))


def _vector_norm(p: Parts) -> None:
    if float(p.arg(1, "ord", 2)) == 2.0:
        _spread(p, 0.5, None)


def _extreme(p: Parts) -> None:
    shape = p.shape(p.node.args[0])
    if len(shape) < 3 or _axes(p, 1) != set(range(2, len(shape))):
        return
    sign = 1 if p.node.op == "amax" else -1
    value = Value("", "node", (3, *shape[:2], *[1] * (len(shape) - 2)), torch.float64)
    found = p.add("_extreme", "extremes", extremes, (p.node.args[0], sign), value)
    p.add("", "take", take, (found, 0, sign, p.out.shape, p.out.dtype), p.out)


TABLE: dict[str, Callable[[Parts], None]] = {
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "var": _var,
    "std": _std,
    "linalg_vector_norm": _vector_norm,
    "amax": _extreme,
    "amin": _extreme,
}


def taken_apart(graph: Graph, shared: frozenset[str] = frozenset()) -> Graph:
    """The same graph with its barriers as reductions, ordered so that few tensors cross a barrier.

    Args:
        shared: names of norms whose statistics are those of all processes (SyncBatchNorm).
    """
    values = dict(graph.values)
    nodes: list[Node] = []
    fused: dict[str, Fused] = {}
    pooled = {n.name for n in graph.nodes if n.op.startswith("adaptive_max_pool")}
    for node in graph.nodes:
        parts = Parts(graph, node, node.name in shared)
        source = node.inputs[0] if node.inputs else ""
        if source in pooled and node.op == "getitem":
            _max_pool(parts, next(n for n in nodes if n.name == source))
        elif node.op in TABLE and not graph.values[node.name].parts:
            TABLE[node.op](parts)
        if not parts.made:
            nodes.append(node)
            continue
        values |= {made.name: value for made, value in parts.made}
        whole = (node,) if source not in pooled else (next(n for n in nodes if n.name == source), node)
        # PyTorch's own operator takes neither shared statistics nor a cumulative average.
        if not parts.shared and CUMULATIVE not in node.args:
            fused[node.name] = Fused(whole, tuple(made.name for made, _ in parts.made[:-1]))
        nodes += [made for made, _ in parts.made]
    kept = live(nodes, graph.outputs)  # a norm that nobody reads still has statistics to keep
    return _late(check(replace(graph, nodes=kept, values=values, fused=fused)))


def _max_pool(p: Parts, pool: Node) -> None:
    x, size = pool.args[:2]
    out = p.out.shape
    if p.node.args[1] != 0 and not p.out.dtype.is_floating_point:
        return  # positions of the maxima: left as they are
    value = Value("", "node", (2, *out), torch.float64)
    found = p.add("_largest", "largest", largest, (x, tuple(size)), value)
    p.add("", "take", take, (found, 0, 1, out, p.out.dtype), p.out)


def _late(graph: Graph) -> Graph:
    """Order nodes by the barriers that lie between them and the end: a shortcut's convolution and its
    statistics come next to those of the branch it joins, so that both cross one barrier together."""
    dims = banding(graph, 2)
    # Reductions, and what is made from them without rows.
    finished = {n.name for n in graph.nodes if reduces(dims.rules[n.name])}
    for node in graph.nodes:
        if dims.dims[node.name] is None and any(n in finished for n in node.inputs):
            finished.add(node.name)
    level: dict[str, int] = {}
    for node in reversed(graph.nodes):
        readers = [graph.nodes[c] for c in graph.consumers[node.name] if c < len(graph.nodes)]
        crossing = node.name in finished
        found = [level[r.name] - (crossing and r.name not in finished) for r in readers]
        level[node.name] = min(found, default=0)
    following = 0
    for node in reversed(graph.nodes):  # effects stand where they stood
        if node.effect and not graph.consumers[node.name]:
            level[node.name] = min((level[n] for n in node.inputs if n in level), default=following)
        following = level[node.name]
    ordered = tuple(sorted(graph.nodes, key=lambda n: level[n.name]))
    return graph if ordered == graph.nodes else check(replace(graph, nodes=ordered))


def restored(graph: Graph, part: Stretch) -> Stretch:
    """The stretch with PyTorch's own operators put back, where all the parts of one lie in it, nothing else
    reads them, and buffers change in the same order."""
    here = {node.name for node in part.nodes}
    found = {}
    for name, fused in graph.fused.items():
        own = {*fused.parts, name}
        if own <= here and not any(_read_elsewhere(graph, n, own) for n in fused.parts):
            found[name] = fused
    nodes = list(part.nodes)
    for name, fused in _in_order(part, found).items():
        at = next(i for i, node in enumerate(nodes) if node.name == name)
        nodes[at : at + 1] = fused.nodes
        nodes = [node for node in nodes if node.name not in fused.parts]
    return replace(part, nodes=tuple(nodes))


def _in_order(part: Stretch, found: dict[str, Fused]) -> dict[str, Fused]:
    """Those of the operators `found` that can change their buffers where they stand: not one that would do
    so behind a later call of the same norm."""
    home = {name: own for own, fused in found.items() for name in fused.parts}
    place = {node.name: i for i, node in enumerate(part.nodes)}
    writers = [node for node in part.nodes if node.effect]
    for i, early in enumerate(writers):
        later = [w for w in writers[i + 1 :] if w.effect == early.effect]
        own = home.get(early.name, early.name)
        if any(place[home.get(w.name, w.name)] < place[own] for w in later):
            return _in_order(part, {name: fused for name, fused in found.items() if name != own})
    return found


def _read_elsewhere(graph: Graph, name: str, own: set[str]) -> bool:
    return any(c >= len(graph.nodes) or graph.nodes[c].name not in own for c in graph.consumers[name])
