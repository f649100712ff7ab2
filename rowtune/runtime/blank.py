"""Aten calls on tensors without data, each answered by PyTorch once.

What a call returns depends on sizes, strides and types alone there, and PyTorch works much of it out in
Python. A band like others need not be asked about again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowtune.runtime.layout import has_channels_last, strides
from rowtune.torch_private import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    fake_mode_is_on,
    pytree,
    without_modes,
)

Made = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Like(NamedTuple):
    """What a call's time depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Signature(NamedTuple):
    """A call but for what is in its tensors: an operator and its arguments, a `Like` for each tensor, (type,
    value) for what is neither tensor nor tuple; keyword arguments as pairs. Two calls with one signature do
    the same work; `cold` where a processor's caches have nothing of their tensors any more, as that of whole
    feature maps."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[Any, ...]
    cold: bool = False


aten = torch.ops.aten
CONVOLUTIONS = frozenset({aten.convolution.default, aten.convolution_backward.default})
HANDED_ON = frozenset(
    {
        *(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.roll.default),
        *(aten.reflection_pad2d.default, aten.reflection_pad3d.default),
        *(aten.replication_pad2d.default, aten.replication_pad3d.default),
    }
)
"""Operators that keep the channels last on a CPU, and make them contiguous on meta tensors."""


MOST_KNOWN = 1 << 17
"""Answers that are kept; some hundred bytes each."""


class Answers:
    """Runs operators on meta tensors, or in a FakeTensorMode on fake ones; those that make new memory, or
    write to their first argument or to `out`, from memory where the same was asked before. `asked` is the
    signature of the last call (None: it has none): one object for all calls that are answered from memory.

    Args:
        device: that the tensors stand for.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.known: dict[Signature, tuple[Signature, tuple[Made | None, ...] | Made]] = {}
        self.asked: Signature | None = None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.asked = None
        if len(self.known) > MOST_KNOWN:
            self.known.clear()
        how = _kind(func)
        if how is None and func.is_view:
            return func(*args, **kwargs)
        fake = fake_mode_is_on()
        try:
            named = _key(tuple(kwargs.items()), fake) if kwargs else ()
            key = Signature(func, _key(args, fake), named)
            found = self.known.get(key)
        except (_Data, TypeError):  # real tensors among them, or something without a hash
            return func(*args, **kwargs)
        device = self.device if fake else META
        if found is not None and how is not None:
            self.asked, made = found
            return how(made, args, kwargs, device)
        self.asked = key
        if how is None:
            return func(*args, **kwargs)
        made = self._laid_out(func, args, kwargs)
        if made is not None:
            self.known[key] = key, made
            return how(made, args, kwargs, device)
        out = func(*args, **kwargs)
        if how is not _out or _key(tuple(kwargs.items()), fake) == named:  # else `out` was resized
            self.known[key] = key, _described(out)
        return out

    def _laid_out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator returns where the device's kernels choose a layout of which meta tensors know
        nothing."""
        if func in HANDED_ON and self.device.type == "cpu" and has_channels_last(args[0]):
            made: Tensor = func(*args, **kwargs)
            return made.shape, strides(made.shape), made.dtype
        if func not in CONVOLUTIONS or all(a.is_contiguous() for a in args if isinstance(a, Tensor)):
            return None
        with without_modes(), FakeTensorMode():
            given, named = pytree.tree_map_only(
                Tensor,
                lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device),
                (args, kwargs),
            )
            return _described(func(*given, **named))


@cache
def answers_for(device: torch.device) -> Answers:
    """The process's own: the next plan of a search asks much the same. Nothing of a model is in them."""
    return Answers(device)


class _Data(Exception):
    pass


META = torch.device("meta")


def _key(arguments: tuple[Any, ...] | list[Any], fake: bool) -> tuple[Any, ...]:
    found: list[Any] = []
    for a in arguments:
        kind = a.__class__
        if kind in PLAIN:
            found.append((kind, a))  # 1 is not 1.0, nor True
        elif isinstance(a, Tensor):
            if not (isinstance(a, FakeTensor) if fake else a.is_meta):
                raise _Data
            found.append(Like(a.shape, a.stride(), a.dtype))
        elif isinstance(a, (tuple, list)):
            found.append(_key(a, fake))
        else:
            found.append((kind, a))
    return tuple(found)


PLAIN = frozenset({int, float, bool, str, type(None)})


def _described(out: Any) -> tuple[Made | None, ...] | Made:
    if isinstance(out, Tensor):
        return out.shape, out.stride(), out.dtype
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in out)


def _blank(made: Made, device: torch.device) -> Tensor:
    shape, stride, dtype = made
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


Given = tuple[Any, ...]
Named = dict[str, Any]


def _one(found: Any, args: Given, kwargs: Named, device: torch.device) -> Tensor:
    return _blank(found, device)


def _several(found: Any, args: Given, kwargs: Named, device: torch.device) -> tuple[Tensor | None, ...]:
    return tuple(None if made is None else _blank(made, device) for made in found)


def _first(found: Any, args: Given, kwargs: Named, device: torch.device) -> Any:
    return args[0]


def _out(found: Any, args: Given, kwargs: Named, device: torch.device) -> Any:
    return kwargs["out"]


@cache
def _kind(func: Any) -> Callable[[Any, Given, Named, torch.device], Any] | None:
    """How an operator's answer is made from memory: by its schema; None where it is a view, say."""
    if func is torch.ops.aten._unsafe_view.default:  # a view, though its schema denies it
        return None
    schema = func._schema
    aliased = [a for a in schema.arguments if a.alias_info is not None]
    returned = [str(r.type) for r in schema.returns]
    if not aliased:
        if any(kind not in ("Tensor", "Optional[Tensor]") for kind in returned) or not returned:
            return None
        return _one if len(returned) == 1 else _several
    if len(aliased) != 1 or not aliased[0].alias_info.is_write or returned != ["Tensor"]:
        return None
    if aliased[0].is_out and aliased[0].name == "out":
        return _out
    return _first if aliased[0] is schema.arguments[0] and schema.name.endswith("_") else None
