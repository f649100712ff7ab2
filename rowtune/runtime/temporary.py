"""What kernels take beside the tensors that they return, for as long as they run.

No tensor of the step has this memory, so a meter of tensors does not see it; an allocator does. On a card
convolutions, pools and batch norms read tensors that lie densely in one of two orders, and copy others first:
a band of rows of a whole feature map, say, which is a stretch of each of its channels. (cuDNN's own
workspaces are not counted: which of its algorithms runs is known on the device only.) On a CPU nothing is
counted: what its library lays out anew for itself no meter of ours sees either.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rowtune.torch_private import OpOverload

aten = torch.ops.aten
Given = tuple[Any, ...]


def temporary_bytes(op: OpOverload, args: Given, kind: str) -> int:
    """Bytes that a call takes on a kind of device while it runs, beside what it is given and returns."""
    rule = ON_DEVICE.get(kind, {}).get(op)
    return 0 if rule is None else rule(args)


def _copies(*places: int) -> Callable[[Given], int]:
    """The arguments at these places are read densely, all in the order of the first two of them."""

    def rule(args: Given) -> int:
        read = [args[i] for i in places if i < len(args) and isinstance(args[i], Tensor)]
        last = any(
            _is_dense(t, channels_last=True) and not _is_dense(t, channels_last=False) for t in read[:2]
        )
        return sum(t.numel() * t.itemsize for t in read if not _is_dense(t, channels_last=last))

    return rule


def _is_dense(t: Tensor, *, channels_last: bool) -> bool:
    """Whether a tensor lies without gaps, in the order of its dimensions or with its channels last."""
    dims = [0, *range(2, t.dim()), 1] if channels_last and t.dim() > 2 else [*range(t.dim())]
    found = [(int(t.shape[d]), int(t.stride(d))) for d in dims if t.shape[d] != 1]
    return all(stride == n * following for (_, stride), (n, following) in pairwise(found)) and (
        not found or found[-1][1] == 1
    )


ON_DEVICE: dict[str, dict[OpOverload, Callable[[Given], int]]] = {
    "cuda": {
        aten.convolution.default: _copies(0, 1),
        aten.convolution_backward.default: _copies(1, 2, 0),
        aten.max_pool2d_with_indices.default: _copies(0),
        aten.max_pool2d_with_indices_backward.default: _copies(1, 0),
        aten.max_pool3d_with_indices.default: _copies(0),
        aten.max_pool3d_with_indices_backward.default: _copies(1, 0),
        aten.native_batch_norm.default: _copies(0),
        aten.native_batch_norm_backward.default: _copies(1, 0),
    }
}
"""By kind of device and operator."""
