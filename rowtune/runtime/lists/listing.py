"""A listing: calls to be run again, on tensors that are given, for tensors that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rowtune.runtime.recording import At, Call, View, written_arguments
from rowtune.torch_private import OpOverload


@dataclass(frozen=True)
class Listing:
    """Straight-line calls over `views`. `given` are the views whose tensors come from outside, `constants`
    those of tensors that are the same every time, `results` the views whose tensors go out."""

    calls: tuple[Call, ...]
    views: tuple[View, ...]
    given: tuple[int, ...]
    constants: Mapping[int, Tensor]
    results: tuple[int, ...]
    more: Mapping[int, int] = field(default_factory=dict)
    """By loop: how often the calls of its last turn come again, not listed: see `loops.py`."""

    def buffer(self, view: int) -> int:
        """The memory that a view looks at."""
        return self.views[view].buffer

    def outside(self) -> frozenset[int]:
        """Buffers that others look at as well: what is written there is read."""
        return frozenset(self.buffer(v) for v in (*self.given, *self.constants, *self.results))

    def with_calls(self, calls: Iterator[Call]) -> Listing:
        return replace(self, calls=tuple(calls))


def renamed(call: Call, name: Callable[[int], int]) -> Call:
    """The call on other views."""
    reads = tuple([name(v) for v in call.reads])
    makes = tuple([name(v) if v >= 0 else v for v in call.makes])
    if reads == call.reads and makes == call.makes:
        return call
    args = swapped(call.args, At, lambda at: At(name(at.view)))
    kwargs = {k: swapped(a, At, lambda at: At(name(at.view))) for k, a in call.kwargs.items()}
    return call._replace(args=args, kwargs=kwargs, reads=reads, makes=makes)


def swapped(argument: Any, kind: type, other: Callable[[Any], Any]) -> Any:
    """An argument with everything of one kind in it swapped."""
    if isinstance(argument, kind):
        return other(argument)
    if type(argument) in (list, tuple):
        return type(argument)([swapped(a, kind, other) for a in argument])
    return argument


def written(call: Call) -> Iterator[int]:
    """The views that a call writes to."""
    for where in written_arguments(call.op):
        at = call.args[where] if isinstance(where, int) and where < len(call.args) else call.kwargs.get(where)
        if isinstance(at, At):
            yield at.view
        elif isinstance(at, (list, tuple)):
            yield from (a.view for a in at if isinstance(a, At))


@cache
def is_pure(op: OpOverload) -> bool:
    """Whether an operator does nothing but return tensors, the same ones for the same arguments."""
    return not written_arguments(op) and torch.Tag.nondeterministic_seeded not in op.tags


def check(listing: Listing) -> Listing:
    """Assert what every listing must satisfy: what is read is given, constant, or made before."""
    known = {*listing.given, *listing.constants}
    for i, call in enumerate(listing.calls):
        for view in call.reads:
            assert view in known, f"{call.name} (call {i}) reads a tensor that nothing made"
        known |= {*call.makes}
    for view in listing.results:
        assert view in known, "a result is made by no call"
    return listing
