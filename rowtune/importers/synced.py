"""Batch norms whose statistics are those of all processes: SyncBatchNorm, and all of a model that `rowtune
run` trains in several processes, whatever made it (an ONNX file has no modules to convert)."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

from torch import nn

from rowtune.graph.graph import Graph, Node

_MODELS: WeakSet[nn.Module] = WeakSet()


def share_statistics(model: nn.Module) -> None:
    """From now on `model` is traced with the statistics of its batch norms taken over all processes."""
    _MODELS.add(model)


def shares(model: nn.Module) -> bool:
    """Whether any of its norms do."""
    return model in _MODELS or any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def shared_norms(model: nn.Module, nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the batch norms among `nodes` that share their statistics."""
    converted = {name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    every = model in _MODELS
    return frozenset(n.name for n in nodes if n.op == "batch_norm" and (every or n.module in converted))


def has_statistics(graph: Graph) -> bool:
    """Whether there are batch norms in it that train."""
    return any(node.op == "moments" and not node.args[1] for node in graph.nodes)
