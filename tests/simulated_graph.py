"""A CUDA graph that is not there: a step's kernels are written down with the tensors that they were called
on, and run again on those very tensors, as a graph's are, whatever the host would have done another time.

While it is written down nothing is computed: what it changed of tensors from before is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

UNSAID = ("running_mean", "running_var")
"""Batch norms write to these, of which their schema says nothing."""

Kernel = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.own: dict[int, Any] = {}  # storages made here, kept alive
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.is_write or argument.name in UNSAID:
                for t in pytree.tree_leaves(given):
                    if isinstance(t, Tensor):
                        self._save(t)
        out = func(*args, **kwargs)
        self.kernels.append((func, args, kwargs, out))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.own.setdefault(t.untyped_storage()._cdata, t.untyped_storage())
        return out

    def _save(self, t: Tensor) -> None:
        key = t.untyped_storage()._cdata
        if key not in self.own and key not in self.before:
            whole = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
            self.before[key] = whole, whole.clone()


def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """As rowtune.runtime.captured.cuda_graph. What was made is full of garbage until it is replayed."""
    with _Recorder() as recorder:
        made = work()
    for whole, copy in recorder.before.values():
        whole.copy_(copy)

    def replay() -> None:
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, out in recorder.kernels:
                again = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                    if (
                        isinstance(old, Tensor)
                        and old.untyped_storage()._cdata != new.untyped_storage()._cdata
                    ):
                        old.detach().copy_(new)

    return made, replay
