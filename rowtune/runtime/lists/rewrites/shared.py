"""The same call on the same tensors: made once. Casts, zeros, narrow statistics, views of one tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from rowtune.graph.graph import numel
from rowtune.runtime.lists.listing import Listing, is_pure, renamed, written
from rowtune.runtime.recording import At, Call
from rowtune.runtime.stores.calls import NAMESPACE

aten = torch.ops.aten

SMALL = 1 << 14
"""Bytes. What is shared lives longer."""

ROWS = frozenset((aten.cat.default, aten.clone.default))
"""Windows of rows are joined again in backward so as not to live till then, however small; and so are those
that come from the host."""


def rewrite(listing: Listing) -> Listing:
    """A call is left out where one before returned the same: no argument was written to since, and what it
    returned is never written to (but by the call itself, where it is told where to), nor handed out."""
    writes = Counter(listing.buffer(v) for call in listing.calls for v in written(call))
    version = dict.fromkeys(writes, 0)
    outside = listing.outside()
    instead: dict[int, int] = {}
    seen: dict[Any, tuple[int, ...]] = {}
    of_turns: set[Any] = set()
    defined = {*listing.given, *listing.constants}
    kept: list[Call] = []

    def name(view: int) -> int:
        return instead.get(view, view)

    for call in listing.calls:
        call = renamed(call, name)
        if call.turn is None and of_turns:  # what a turn made is that of the last turn after a loop
            seen = {key: made for key, made in seen.items() if key not in of_turns}
            of_turns.clear()
        made = [v for v in call.makes if v >= 0]
        if made and is_pure(call.op) and all(v in defined for v in made):
            continue  # a view of what is there, seen before
        key = _key(listing, call, version) if _shareable(listing, call, writes, outside) else None
        if key is not None and key in seen:
            instead |= dict(zip(call.makes, seen[key], strict=True))
            continue
        if key is not None:
            seen[key] = call.makes
            if call.turn is not None and call.turn.loop in listing.more:
                of_turns.add(key)
        for view in written(call):
            version[listing.buffer(view)] += 1
        defined |= {*made}
        kept.append(call)
    return listing.with_calls(iter(kept))


def _shareable(listing: Listing, call: Call, writes: Counter[int], outside: frozenset[int]) -> bool:
    told = _told(call)
    rows = call.op in ROWS or call.name.startswith(NAMESPACE)
    if not call.makes or rows or not (is_pure(call.op) or told):
        return False
    read = {listing.buffer(v) for v in call.reads if v not in told}
    for view in call.makes:
        if view < 0:
            continue
        found = listing.views[view]
        if found.buffer in read:
            return False  # a view: seen by number, where it is one
        large = numel(found.shape) * found.dtype.itemsize > SMALL
        if large or writes[found.buffer] > len(told) or found.buffer in outside:
            return False
    return True


def _told(call: Call) -> tuple[int, ...]:
    """The view that a call writes its result to, where it is told to and writes nothing else."""
    out = call.kwargs.get("out")
    own = isinstance(out, At) and call.makes == (out.view,) and {*written(call)} == {out.view}
    return call.makes if own else ()


def _key(listing: Listing, call: Call, version: dict[int, int]) -> Any:
    told = _told(call)
    now = tuple(version.get(listing.buffer(v), 0) for v in call.reads if v not in told)
    where = [listing.views[v][1:] for v in told]  # how the result lies in memory
    named = tuple((k, a) for k, a in call.kwargs.items() if not told or k != "out")
    try:
        key = call.op, _frozen(call.args), _frozen(named), now, tuple(where)
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(argument: Any) -> Any:
    """Hashable; 1 is not 1.0."""
    if isinstance(argument, At):
        return argument
    if isinstance(argument, (list, tuple)):
        return tuple([_frozen(a) for a in argument])
    return argument.__class__, argument
