"""Random masks that do not depend on the plan.

The mask of an element is a hash of (step seed, node, image, row, position in the row), so a row that is
computed twice (halo, recomputation) or in another band gets the same mask. Other random operators are drawn
whole, from a generator seeded by (step seed, node).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rowtune.graph.graph import Node
from rowtune.rows import Rows
from rowtune.torch_private import pytree

_MIX1, _MIX2, _GOLDEN = 0x7FEB352D, 0x846CA68B - 2**32, 0x9E3779B9 - 2**32


def _mix(h: Tensor) -> Tensor:
    """A finaliser with good avalanche on 32 bits (the arithmetic wraps)."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * _MIX1
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _MIX2
    return h ^ ((h >> 16) & 0xFFFF)


Seed = int | Tensor
"""Of a step: a number, or a whole number on the device, so that calls written down take another each time."""


def as_tensor(seed: Seed, device: torch.device) -> Tensor:
    """The seed on a device."""
    return seed if isinstance(seed, Tensor) else torch.full((), seed, device=device)


def draws(node: Node) -> bool:
    """Whether a node is a dropout that draws a mask."""
    return node.op == "dropout" and bool(node.args[1]) and bool(node.args[2])


def node_seed(seed: Seed, node: str) -> Seed:
    return (seed * 1000003 + zlib.crc32(node.encode())) & 0x7FFFFFFF


def _first(seed: Seed, like: Tensor) -> Tensor:
    shape = (1,) * like.dim()
    if isinstance(seed, Tensor):
        return seed.to(torch.int32).view(shape)
    return torch.full(shape, seed, dtype=torch.int32, device=like.device)


def dropout_slab(
    x: Tensor, p: float, seed: Seed, node: str, dim: int | None, rows: Rows, images: Rows
) -> Tensor:
    """Dropout of a slice: absolute rows `rows` along `dim`, batch entries `images` along dimension 0."""
    h = _first(node_seed(seed, node), x)
    for d in range(x.dim()):
        start = rows.lo if d == dim else images.lo if d == 0 else 0
        index = torch.arange(start, start + x.shape[d], dtype=torch.int32, device=x.device)
        view = [1] * x.dim()
        view[d] = -1
        h = _mix(h ^ (index * _GOLDEN + d).view(view))
    keep = (h & 0x7FFFFFFF) >= int(p * 2**31)
    if p >= 1.0:
        return x * 0
    return torch.where(keep, x * (1.0 / (1.0 - p)), x.new_zeros(()))


@contextlib.contextmanager
def seeded(seed: Seed, node: str, args: Any, kwargs: Any) -> Iterator[None]:
    """Draw from a state of its own, so that recomputation draws the same."""
    devices = {t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_cuda}
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        devices.add(torch.device(device))
    with torch.random.fork_rng(devices=sorted(devices, key=str), enabled=True):
        torch.manual_seed(int(node_seed(seed, node)))
        yield
