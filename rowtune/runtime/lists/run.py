"""Rows segments run from lists: the first run of a kind is written down, the others run what was written.

A kind is all that a run's calls depend on: which tensors need gradients, sizes, strides, types, which tensors
share memory, autocast. What a kind was not seen to do (another set of outer gradients, say) is traced again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rowtune.runtime.gradients import Gradients
from rowtune.runtime.lists.code import Function, compiled
from rowtune.runtime.lists.rewrites import rewritten
from rowtune.runtime.lists.tracer import Named, NotListed, Section, Tracer
from rowtune.runtime.recording import View
from rowtune.runtime.storage import storage_of

MOST_KINDS = 8
"""Kinds of runs of one segment that are written down; the others are traced each time."""


class Traced(Protocol):
    """What runs a segment's schedule itself."""

    def forward(self) -> dict[str, Tensor]: ...
    def again(self) -> dict[str, Tensor]: ...
    def single_sweep(self, scale: Tensor | float) -> tuple[dict[str, Tensor], Gradients]: ...
    def backward(self, grads: Mapping[str, Tensor]) -> Gradients: ...
    def recall(self, tensors: dict[str, Tensor]) -> None: ...
    def forget(self) -> None: ...


Start = Callable[[bool], Traced]
"""Begins a traced run; whether it is the first of its step, that changes buffers."""


class _Step(NamedTuple):
    """A section that can be run again."""

    name: str
    function: Function
    given: tuple[Hashable, ...]
    layout: tuple[Any, ...]
    state: tuple[View, ...]
    results: tuple[Hashable, ...]
    leaves: tuple[View, ...]


@dataclass
class Kind:
    """What is known of one kind of run: its sections in order, once one such run is over."""

    steps: tuple[_Step, ...] | None = None
    why_not: str = ""
    writing: Callable[[], object] = field(default=lambda: None)
    """The run that is being written down now, if there is one."""


class Lists:
    """All that was written down of one segment."""

    def __init__(self) -> None:
        self.kinds: dict[Hashable, Kind] = {}

    def run(self, key: Hashable, tensors: dict[str, Tensor], start: Start, last: bool) -> Traced:
        """A run of the segment.

        Args:
            key: what else the calls depend on.
            last: no backward comes after this forward.
        """
        if not all(type(t) in (Tensor, nn.Parameter) for t in tensors.values()):
            return start(True)
        kind = self._kind((key, layout_of(tensors)))
        if kind.steps is not None:
            return Listed(kind.steps, tensors, start)
        if kind.why_not or kind.writing() is not None:
            return start(True)
        run = _Written(kind, tensors, start(True), last)
        kind.writing = weakref.ref(run)
        return run

    def _kind(self, key: Hashable) -> Kind:
        if key not in self.kinds and len(self.kinds) >= MOST_KINDS:
            return Kind(why_not=f"more than {MOST_KINDS} kinds of runs")
        return self.kinds.setdefault(key, Kind())


def layout_of(tensors: Mapping[Any, Tensor]) -> tuple[Any, ...]:
    """Sizes, strides and types, and which tensors share memory, and where."""
    first: dict[int, int] = {}
    shares = [first.setdefault(storage_of(t), i) for i, t in enumerate(tensors.values())]
    alone = len(first) == len(tensors)
    where = (
        () if alone else tuple((s, t.storage_offset()) for s, t in zip(shares, tensors.values(), strict=True))
    )
    return where, tuple((n, t.shape, t.stride(), t.dtype, t.device) for n, t in tensors.items())


class _Written:
    """A traced run that is written down."""

    def __init__(self, kind: Kind, tensors: dict[str, Tensor], run: Traced, last: bool) -> None:
        self.kind, self.tensors, self.run, self.last = kind, tensors, run, last
        self.tracer = Tracer()
        self.layouts: list[tuple[Any, ...]] = []
        self.names: list[str] = []

    def forward(self) -> dict[str, Tensor]:
        outputs = self._outputs("forward", self.run.forward)
        if self.last:
            self._over()
        return outputs

    def again(self) -> dict[str, Tensor]:
        return self._outputs("again", self.run.again)

    def single_sweep(self, scale: Tensor | float) -> tuple[dict[str, Tensor], Gradients]:
        with self._section("sweep", _scaled(scale)) as section:
            outputs, gradients = self.run.single_sweep(scale)
        self.tracer.ask(section, {**_named("out", outputs), **_flat(gradients)})
        self._over()
        return outputs, gradients

    def backward(self, grads: Mapping[str, Tensor]) -> Gradients:
        with self._section("backward", _named("grad", grads)) as section:
            gradients = self.run.backward(grads)
        self.tracer.ask(section, _flat(gradients))
        self._over()
        return gradients

    def recall(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.run.recall(tensors)

    def forget(self) -> None:
        self.tensors = {}
        self.run.forget()

    def _outputs(self, name: str, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        with self._section(name, {}) as section:
            outputs = run()
        self.tracer.ask(section, _named("out", outputs))
        return outputs

    def _section(self, name: str, more: Named) -> Any:
        given = {**_named("in", self.tensors), **more}
        self.names.append(name)
        self.layouts.append(layout_of(given))
        return self.tracer.section(given)

    def _over(self) -> None:
        """All sections were seen."""
        try:
            self.kind.steps = tuple(_steps(self.names, self.layouts, self.tracer))
        except NotListed as why:
            self.kind.why_not = str(why)


def _steps(names: list[str], layouts: list[tuple[Any, ...]], tracer: Tracer) -> list[_Step]:
    found = []
    sections: list[Section] = tracer.sections
    for name, layout, section, listed in zip(names, layouts, sections, tracer.listings(), strict=True):
        listing, given, state, leaves = listed
        function = compiled(rewritten(listing))
        found.append(_Step(name, function, given, layout, state, tuple(section.results), leaves))
    return found


class Listed:
    """A run of what was written down."""

    def __init__(self, steps: tuple[_Step, ...], tensors: dict[str, Tensor], start: Start) -> None:
        self.steps, self.tensors, self.start = steps, tensors, start
        self.at = 0
        self.state: dict[View, Tensor] = {}
        self.traced: Traced | None = None

    def recall(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def forget(self) -> None:
        self.tensors = {}

    def forward(self) -> dict[str, Tensor]:
        made = self._run("forward", {})
        assert made is not None, "a run begins as the one that was written down"
        return {name: t for (_, name), t in made.items()}

    def single_sweep(self, scale: Tensor | float) -> tuple[dict[str, Tensor], Gradients]:
        made = self._run("sweep", _scaled(scale))
        assert made is not None, "a run begins as the one that was written down"
        return {n: t for (k, n), t in made.items() if k == "out"}, _gradients(made)

    def again(self) -> dict[str, Tensor]:
        made = self._run("again", {})
        if made is None:
            return self._anew().forward()
        return {name: t for (_, name), t in made.items()}

    def backward(self, grads: Mapping[str, Tensor]) -> Gradients:
        made = self._run("backward", _named("grad", grads))
        if made is None:
            run = self._anew()
            run.forward()
            return run.backward(grads)
        return _gradients(made)

    def _run(self, name: str, more: Named) -> dict[Any, Tensor] | None:
        """The results of the section that comes next, if it is this one and nothing about it is new."""
        step = self.steps[self.at] if self.at < len(self.steps) else None
        given = {**_named("in", self.tensors), **more}
        if step is None or self.traced or step.name != name or layout_of(given) != step.layout:
            return None
        tensors = [given[key] for key in step.given] + [self.state[view] for view in step.state]
        given = {}
        self.at += 1
        if self.at == len(self.steps):
            self.state = {}
        kind = tensors[0].device.type if tensors else "cpu"
        casts = torch.is_autocast_enabled(kind)
        # Casts are among the calls already, and gradients are made by calls.
        with (
            torch.autocast(kind, enabled=False) if casts else _NOTHING,
            torch._C._AutoDispatchBelowAutograd(),
        ):
            made = step.function(tensors)
        own = len(step.results)
        self.state |= zip(step.leaves, made[own:], strict=True)
        return dict(zip(step.results, made[:own], strict=True))

    def _anew(self) -> Traced:
        """What was not seen before is traced, from the inputs; no buffer changes a second time."""
        if self.traced is None:
            self.traced = self.start(False)
        self.traced.recall(self.tensors)
        return self.traced


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


def _named(kind: str, tensors: Mapping[str, Tensor]) -> dict[Hashable, Tensor]:
    return {(kind, name): t for name, t in tensors.items()}


def _scaled(scale: Tensor | float) -> dict[Hashable, Tensor]:
    return {("scale", ""): scale} if isinstance(scale, Tensor) else {}


def _flat(gradients: Gradients) -> dict[Hashable, Tensor]:
    return {**_named("input", gradients.inputs), **_named("weight", gradients.weights)}


def _gradients(made: Mapping[Any, Tensor]) -> Gradients:
    kinds: dict[str, dict[str, Tensor]] = {"input": {}, "weight": {}, "out": {}}
    for (kind, name), t in made.items():
        kinds[kind][name] = t
    return Gradients(kinds["input"], kinds["weight"])
