"""What rowtune uses of torch that torch does not promise to keep, one name each: the first place to look when
a new torch breaks something. All of it was checked on torch 2.13; a name that was checked elsewhere says so.

Private attributes of public objects (an operator's `_schema`, a tensor's `_version`) are read where they are
needed. Importing this imports torch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, UntypedStorage, _guards
from torch._subclasses import fake_tensor
from torch.utils import _python_dispatch, _pytree

OpOverload = torch._ops.OpOverload
"""The type of an exported call's target: one operator, one signature (torch.ops.aten.add.Tensor)."""

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""Base class of what sees every aten call."""

pytree = _pytree
"""Nested tuples, lists and dicts as a flat list of leaves and a structure, as torch.export takes them."""

FakeTensor = fake_tensor.FakeTensor
"""A tensor with sizes and a device, and no data."""

FakeTensorMode = fake_tensor.FakeTensorMode
"""While it is entered, operators make tensors without data."""

FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"
"""The logger that tells of an operator which failed on tensors without data."""

fake_mode_of = _guards.detect_fake_mode
"""The mode that the fake tensors among some inputs belong to; None where there is none."""

GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)
"""Hooks on all modules, by handle."""

SET_GRAD = torch._C._set_grad_enabled
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
"""Targets of the calls that begin and end a region in an exported graph."""


def fake_mode_is_on() -> bool:
    """Whether operators now make tensors without data, whoever asked for it."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def storage_of(t: Tensor) -> int:
    """Names a tensor's memory while it lives. Not its address: tensors without data (fake ones, those of a
    tracer) have none, and empty ones all have the same."""
    return key_of(t.untyped_storage())


def key_of(storage: UntypedStorage) -> int:
    """The same of a storage."""
    found: int = storage._cdata
    return found


without_modes = _python_dispatch._disable_current_modes
"""A context in which nobody sees aten calls."""


def autograd_runs() -> bool:
    """Whether autograd is going backward in this thread."""
    return torch._C._current_graph_task_id() >= 0


below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which operators neither record gradients nor count versions."""


def region_passes() -> tuple[ModuleType, ModuleType]:
    """The passes by which torch.export moves what lies in autocast and in no_grad blocks into submodules: a
    module each, with a function of the module's own name. Not imported before they are asked for: they bring
    half a second of other modules."""
    from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass

    return replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass


def inner_tensors(t: Tensor) -> list[Tensor]:
    """The tensors that have a tensor's memory: of a subclass that wraps others, those."""
    if type(t) is Tensor or not _python_dispatch.is_traceable_wrapper_subclass(t):
        return [t]
    names, _ = t.__tensor_flatten__()
    held = (getattr(t, name) for name in names)  # a DTensor's mesh is among them
    return [inner for each in held if isinstance(each, Tensor) for inner in inner_tensors(each)]


def default_store() -> Any:
    """The store that the default process group was made from."""
    return torch.distributed.distributed_c10d._get_default_store()


def under(prefix: str, store: Any) -> Any:
    """The same store, with names of its own."""
    return torch.distributed.distributed_c10d.PrefixStore(prefix, store)


def groups() -> list[Any]:
    """All process groups there are, the default one among them."""
    return list(torch.distributed.distributed_c10d._world.pg_map)


def abort_groups() -> None:
    """End all process groups without waiting for anything; others' calls in them fail, or wait for ever."""
    torch.distributed.distributed_c10d._abort_process_group()
