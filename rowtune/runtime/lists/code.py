"""A listing as a Python function: straight-line code, each tensor let go of after its last use.

Generated code is never stored: copies and pickles of a module make it anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rowtune.runtime.lists.alike import Moving
from rowtune.runtime.lists.loops import Loop, Rolled
from rowtune.runtime.recording import At, Call
from rowtune.torch_private import OpOverload

aten = torch.ops.aten

NOTHING: Mapping[Any, Callable[..., Any]] = {}

Function = Callable[[list[Tensor]], tuple[Tensor, ...]]

QUICK: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.cat.default: torch.cat,
    aten.convolution.default: torch.convolution,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.add_.Tensor: Tensor.add_,
    aten.mul_.Tensor: Tensor.mul_,
    aten.copy_.default: Tensor.copy_,
    aten.zero_.default: Tensor.zero_,
    aten.as_strided.default: torch.as_strided,
    aten.clone.default: torch.clone,
    aten.view.default: Tensor.view,
    aten.permute.default: torch.permute,
    aten.sum.dim_IntList: torch.sum,
}
"""PyTorch's own bindings of operators with the same arguments, which are called faster than the operators."""


def compiled(listing: Rolled, own: Mapping[Any, Callable[..., Any]] = NOTHING) -> Function:
    """A function of the given tensors, in a list that it empties, for the results; `own` are functions in the
    place of operators."""
    writer = _Writer(listing, own)
    source = "\n".join(writer.lines())
    names = writer.names
    exec(compile(source, "<a rowtune listing>", "exec"), names)
    found: Function = names["run"]
    return found


class _Writer:
    """Views are local variables, named anew when they are free; everything else is a global name."""

    def __init__(self, listing: Rolled, own: Mapping[Any, Callable[..., Any]]) -> None:
        self.listing, self.quick = listing, {**QUICK, **own}
        self.names: dict[str, Any] = {}
        self._global: dict[Any, str] = {}
        self._local: dict[int, str] = {}
        self._free: list[str] = []
        self._count = 0

    def lines(self) -> Iterator[str]:
        last = self._last_uses()
        for view, tensor in self.listing.constants.items():
            if view in last:
                self._local[view] = self._named(("constant", view), tensor)
        given = [self._new(view) for view in self.listing.given]
        yield "def run(given):"
        if given:
            yield f"    [{', '.join(given)}] = given"
        yield "    given.clear()"
        unread = [self._drop(v) for v in self.listing.given if v not in last]
        if unread:
            yield f"    del {', '.join(unread)}"
        for i, call in enumerate(self.listing.calls):
            dying = [v for v in dict.fromkeys(call.reads) if last[v] == i and v not in self.listing.constants]
            written = (
                self._loop(call, dying, last) if isinstance(call, Loop) else self._call(call, dying, last)
            )
            yield from (f"    {line}" for line in written)
        results = ", ".join(self._local[v] for v in self.listing.results)
        yield f"    return ({results},)" if results else "    return ()"

    def _last_uses(self) -> dict[int, int]:
        """The last call that reads each view; results are read by the end."""
        last = {v: i for i, call in enumerate(self.listing.calls) for v in call.reads}
        return last | dict.fromkeys(self.listing.results, len(self.listing.calls))

    def _loop(self, loop: Loop, dying: list[int], last: dict[int, int]) -> Iterator[str]:
        """Variables are set before, and by each turn for the next; what else a turn makes dies in it."""
        firsts = [self._local[c.first] for c in loop.carried]
        variables = {c.view: self._new(c.view) for c in loop.carried}
        if firsts:
            yield f"{', '.join(variables.values())} = {', '.join(firsts)}"
        read = {v for call in loop.body for v in call.reads}
        early = [v for v in dying if v not in read]
        yield from self._del(early)
        yield f"for i in range({loop.times}):"
        yield from (f"    {line}" for line in self._body(loop, variables))
        unread = [v for v in variables if v not in last]
        yield from self._del([*(v for v in dying if v in read), *unread])

    def _body(self, loop: Loop, variables: dict[int, str]) -> Iterator[str]:
        made = {v for call in loop.body for v in call.makes if v not in self._local}
        last = {v: i for i, call in enumerate(loop.body) for v in call.reads}
        last |= dict.fromkeys([c.after for c in loop.carried], len(loop.body))
        for i, call in enumerate(loop.body):
            ends = [v for v in dict.fromkeys(call.reads) if last[v] == i]
            yield from self._call(call, [v for v in ends if v in made], last)
            if old := [variables[v] for v in ends if v in variables]:
                yield f"del {', '.join(old)}"
        if variables:
            after = [self._local[c.after] for c in loop.carried]
            yield f"{', '.join(variables.values())} = {', '.join(after)}"
            yield from self._del([c.after for c in loop.carried if c.after in made])

    def _del(self, views: list[int]) -> Iterator[str]:
        if views:
            yield f"del {', '.join([self._drop(v) for v in dict.fromkeys(views)])}"

    def _call(self, call: Call, dying: list[int], last: Mapping[int, int]) -> Iterator[str]:
        function, arguments = self._function(call)
        run = f"{function}({', '.join(arguments)})"
        used = [(i, v) for i, v in enumerate(call.makes) if v in last and v not in self._local]
        if not used:
            yield run
        elif not _is_list(call.op):
            yield f"{self._new(used[0][1])} = {run}"
        elif len(used) == len(call.makes) > 1:
            yield f"{', '.join(self._new(v) for _, v in used)} = {run}"
        elif len(used) == 1:
            yield f"{self._new(used[0][1])} = {run}[{used[0][0]}]"
        else:
            yield f"made = {run}"
            for i, view in used:
                yield f"{self._new(view)} = made[{i}]"
            yield "del made"
        yield from self._del(dying)

    def _function(self, call: Call) -> tuple[str, list[str]]:
        args = [self._argument(a) for a in call.args]
        kwargs = [f"{k}={self._argument(a)}" for k, a in call.kwargs.items()]
        if call.op is aten.slice.Tensor and not kwargs and (narrowed := self._narrow(call)):
            return self._named(torch.narrow, torch.narrow), narrowed
        target = self.quick.get(call.op, call.op._op)
        return self._named(call.op, target), [*args, *kwargs]

    def _narrow(self, call: Call) -> list[str] | None:
        """A slice of neighbours, for which PyTorch has a quicker call."""
        if len(call.args) < 4:
            return None
        x, dim, start, end, *step = call.args
        size = self.listing.views[x.view].shape[dim]
        if step not in ([], [1]):
            return None
        if isinstance(start, Moving) and isinstance(end, Moving):
            return [self._local[x.view], str(dim), self._argument(start), str(end.start - start.start)]
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start <= end:
            return None
        return [self._local[x.view], str(dim), str(start), str(min(end, size) - start)]

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, At):
            return self._local[argument.view]
        if isinstance(argument, Moving):
            return f"{argument.start} + i * {argument.step}"
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self._argument(a) for a in argument)}]"
        if argument is None or isinstance(argument, (bool, int, str)):
            return repr(argument)
        if isinstance(argument, float) and math.isfinite(argument):
            return repr(argument)
        return self._named((argument.__class__, repr(argument)), argument)

    def _named(self, key: Any, value: Any) -> str:
        if key not in self._global:
            self._global[key] = name = f"g{len(self._global)}"
            self.names[name] = value
        return self._global[key]

    def _new(self, view: int) -> str:
        if self._free:
            self._local[view] = self._free.pop()
        else:
            self._local[view] = f"t{self._count}"
            self._count += 1
        return self._local[view]

    def _drop(self, view: int) -> str:
        name = self._local.pop(view)
        self._free.append(name)
        return name


@cache
def _is_list(op: OpOverload) -> bool:
    returned = op._schema.returns
    return len(returned) > 1 or (len(returned) == 1 and "List" in str(returned[0].type))
