"""What backward wants of a segment that PyTorch runs: found by running it once on tensors without data."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rowtune.graph.graph import Node
from rowtune.plan.program import SegmentProgram
from rowtune.plan.remake import Block, is_cheap, made_again
from rowtune.runtime.evaluate import run_whole
from rowtune.runtime.precision import autocast_key
from rowtune.runtime.stores import keeping
from rowtune.torch_private import FakeTensor, FakeTensorMode, pytree, storage_of, without_modes


def not_kept(segment: SegmentProgram, env: Mapping[str, Any]) -> frozenset[str]:
    """The nodes whose outputs are made again in backward. Worked out once for tensors of a kind."""
    read = [n for n in (*segment.part.inputs, *segment.part.weights) if n in env]
    key = autocast_key(), *((n, _like(env[n])) for n in read)
    known: dict[Hashable, frozenset[str]] = segment.__dict__.setdefault("_not_kept", {})
    if key not in known:
        known[key] = made_again(_blocks(segment, {n: env[n] for n in read}))
    return known[key]


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value)
    return value.shape, value.stride(), value.dtype, value.requires_grad


def _blocks(segment: SegmentProgram, env: Mapping[str, Any]) -> list[Block]:
    """The memory that the segment makes, and what of it autograd saves."""
    with without_modes(), torch.enable_grad():
        fake = autocast_key()[1] or any(isinstance(t, FakeTensor) for t in env.values())
        with FakeTensorMode() if fake else nullcontext():
            run = _BlankRun(segment, {n: _blank(t, fake) for n, t in env.items()})
            with saved_tensors_hooks(run.pack, _never):
                for node in segment.part.nodes:
                    run.run(node)
            return run.blocks()


def _blank(value: Any, fake: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    device = value.device if fake and value.device.type != "meta" else "cpu" if fake else "meta"
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    made.requires_grad_(value.requires_grad)
    return made.view_as(made) if value.requires_grad and value.grad_fn is not None else made


def _never(kept: Any) -> Tensor:
    raise AssertionError("nothing goes backward through a run without data")


class _BlankRun:
    """`env` holds everything to the end, so that no memory has the name of another."""

    def __init__(self, segment: SegmentProgram, env: dict[str, Any]) -> None:
        self.segment, self.env = segment, env
        self.block_of: dict[int, str] = {}
        self.made: list[tuple[str, int, Node | None]] = []
        self.saved: list[Tensor] = []
        outside = {*segment.part.weights}
        for name, value in env.items():
            if isinstance(value, Tensor):
                self._new(value, name, 0 if name in outside else value.numel() * value.itemsize, None)

    def _new(self, t: Tensor, name: str, size: int, node: Node | None) -> None:
        if self.block_of.setdefault(storage_of(t), name) == name:
            self.made.append((name, size, node))

    def pack(self, t: Tensor) -> Tensor:
        self.saved.append(t)
        return t

    def run(self, node: Node) -> None:
        out = self.env[node.name] = run_whole(node, self.env.__getitem__, seed=0)
        outside = node.name in self.segment.part.outputs  # kept, as what comes behind most often wants it
        if isinstance(out, Tensor):
            self._new(out, node.name, 0 if outside else out.untyped_storage().nbytes(), node)
            return
        for i, part in enumerate(pytree.tree_leaves(out)):
            if isinstance(part, Tensor):
                self._new(part, f"{node.name}[{i}]", part.untyped_storage().nbytes(), None)

    def blocks(self) -> list[Block]:
        wanted = {self.block_of.get(storage_of(t)) for t in self.saved}
        return [
            Block(
                name,
                size if size >= keeping.LEAST_BYTES else 0,
                tuple(self._parents(node)) if node else (),
                node is not None and size >= keeping.LEAST_BYTES and is_cheap(node),
                name in wanted,
            )
            for name, size, node in self.made
        ]

    def _parents(self, node: Node) -> list[str]:
        parts = [t for n in node.inputs for t in pytree.tree_leaves(self.env[n]) if isinstance(t, Tensor)]
        return list(dict.fromkeys(self.block_of[storage_of(t)] for t in parts))
