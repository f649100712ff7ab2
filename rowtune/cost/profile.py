"""What PyTorch keeps for each operator's backward, asked of PyTorch itself on tensors without data.

Each node runs once under FakeTensorMode with gradients on; saved-tensor hooks tell which inputs, outputs or
other tensors autograd keeps, and a storage count tells what is alive for a moment only. So no table of
operators has to be kept in step with PyTorch.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rowtune.graph.graph import Graph, Node, Value, replace
from rowtune.graph.regions import inside


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """Bytes of one node on whole tensors.

    alias       the input whose memory the output is (a view), or ""
    saves       names of inputs and of the node itself that backward reads
    extra       bytes that only autograd keeps (indices of a pool, statistics)
    grad_alias  inputs whose gradient is the output's gradient itself, not new memory
    forward     bytes alive for a moment in forward, beyond inputs, output and extra
    backward    the same in backward, beyond the gradients themselves
    """

    alias: str = ""
    saves: frozenset[str] = frozenset()
    extra: int = 0
    grad_alias: frozenset[str] = frozenset()
    forward: int = 0
    backward: int = 0


class _Counter(TorchDispatchMode):
    """Live bytes of storages made inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.seen: dict[int, Any] = {}

    def know(self, tensor: Tensor) -> None:
        self.seen.setdefault(tensor.untyped_storage()._cdata, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_: object) -> None:
            self.live -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


Profiles = Mapping[tuple[str, str], NodeProfile]


def key_of(node: Node) -> tuple[str, str]:
    """A value may be made by an operator or by the parts it was taken apart into: the name alone won't do."""
    return node.op, node.name


@lru_cache(maxsize=32)
def profiles(graph: Graph) -> Profiles:
    """A profile for every node, and for those that were taken apart; nodes of equal operator and shapes are
    asked once."""
    found: dict[tuple[str, str], NodeProfile] = {}
    asked: dict[Any, tuple[NodeProfile, Node]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for node in (*graph.nodes, *(n for fused in graph.fused.values() for n in fused.nodes)):
            key = _key(graph, node)
            if key in asked:
                known, twin = asked[key]
                found[key_of(node)] = _renamed(known, twin, node)
            else:
                found[key_of(node)] = _ask(graph, node)
                asked[key] = (found[key_of(node)], node)
    return found


def _key(graph: Graph, node: Node) -> Any:
    number = {n: i for i, n in enumerate(node.inputs)}
    args = replace((node.args, node.kwargs), lambda n: number[n])
    shapes = tuple((graph.values[n].shape, graph.values[n].dtype, n in graph.needs_grad) for n in node.inputs)
    return node.op, repr(args), shapes, id(node.target), node.region


def _renamed(profile: NodeProfile, old: Node, new: Node) -> NodeProfile:
    name = dict(zip(old.inputs, new.inputs, strict=True)) | {old.name: new.name, "": ""}
    return NodeProfile(
        name[profile.alias],
        frozenset(name[n] for n in profile.saves),
        profile.extra,
        frozenset(name[n] for n in profile.grad_alias),
        profile.forward,
        profile.backward,
    )


def _ask(graph: Graph, node: Node) -> NodeProfile:
    if node.op == "dropout":
        return _dropout(graph, node)
    if (
        node.op == "loss_combine"
        or (node.effect and node.op != "batch_norm")
        or graph.values[node.name].parts
    ):
        return NodeProfile()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _run(graph, node)
    except Exception:  # an operator that cannot run without data: assume it saves all it reads
        return NodeProfile(saves=frozenset(n for n in node.inputs if n in graph.needs_grad))


def _dropout(graph: Graph, node: Node) -> NodeProfile:
    """Our own masks: a bool per element saved, hashes of 4 bytes an element for a moment."""
    if not node.args[2] or not node.args[1]:
        return NodeProfile(alias=node.inputs[0], grad_alias=frozenset(node.inputs))
    elements = graph.values[node.name].bytes // graph.values[node.name].dtype.itemsize
    return NodeProfile(extra=elements, forward=elements * 12, backward=graph.values[node.name].bytes)


def _run(graph: Graph, node: Node) -> NodeProfile:
    tensors = {n: _fake(graph.values[n], n in graph.needs_grad) for n in node.inputs}
    where = {t.untyped_storage()._cdata: n for n, t in tensors.items()}
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    counter = _Counter()
    for t in tensors.values():
        counter.know(t)
    with counter, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        args, kwargs = replace((node.args, node.kwargs), tensors.__getitem__)
        args = _without_effects(node, args)
        with inside(node.region):
            out = node.target(*args, **kwargs)
    own = out.untyped_storage()._cdata
    alias = where.get(own, "")
    out_bytes = 0 if alias else out.untyped_storage().nbytes()
    saves = {where[k] for t in packed if (k := t.untyped_storage()._cdata) in where}
    saves |= {node.name} if any(t.untyped_storage()._cdata == own for t in packed) else set()
    others = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in packed}
    extra = sum(size for key, size in others.items() if key not in where and key != own)
    forward = max(0, counter.peak - out_bytes - extra)
    packed.clear()
    grad_alias, backward = _back(tensors, out)
    return NodeProfile(alias, frozenset(saves), extra, grad_alias, forward, backward)


def _back(tensors: dict[str, Tensor], out: Tensor) -> tuple[frozenset[str], int]:
    wanted = {n: t for n, t in tensors.items() if t.requires_grad}
    if not out.requires_grad or not wanted:
        return frozenset(), 0
    seed = torch.empty_like(out)
    counter = _Counter()
    counter.know(seed)
    for t in (*tensors.values(), out):
        counter.know(t)
    with counter:
        found = torch.autograd.grad(out, list(wanted.values()), seed, allow_unused=True)
        peak = counter.peak
    key = seed.untyped_storage()._cdata
    alias = {
        n for n, g in zip(wanted, found, strict=True) if g is not None and g.untyped_storage()._cdata == key
    }
    fresh = {g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in found if g is not None}
    fresh.pop(key, None)
    return frozenset(alias), max(0, peak - sum(fresh.values()))


def _without_effects(node: Node, args: Any) -> Any:
    if node.op == "batch_norm" and node.effect:
        return (*args[:3], None, None, *args[5:])
    return args


def _fake(value: Value, grad: bool) -> Tensor:
    made = torch.empty(value.shape, dtype=value.dtype)
    return made.requires_grad_(grad and value.dtype.is_floating_point)
