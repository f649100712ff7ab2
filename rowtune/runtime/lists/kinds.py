"""What one kind of runs of a segment calls: written down from runs on stand-ins, tensors without data.

A kind of runs is all that the calls depend on: which tensors need gradients, sizes, strides, types, which
tensors share memory, autocast.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rowtune.kernels.constants import TRACING, during
from rowtune.plan.lower import uncollected
from rowtune.runtime.gradients import Gradients
from rowtune.runtime.lists.alike import NotAlike
from rowtune.runtime.lists.code import Function, compiled
from rowtune.runtime.lists.listing import Listing, check
from rowtune.runtime.lists.loops import Rolled, rolled
from rowtune.runtime.lists.rewrites import REWRITES, rewritten
from rowtune.runtime.lists.tracer import Key, Listed, NotListed, Tracer
from rowtune.runtime.lists.turns import Way, each, in_turns
from rowtune.runtime.recording import View
from rowtune.runtime.stores import calls
from rowtune.runtime.stores.host import Host, HostPool
from rowtune.runtime.stores.shelf import Shelf
from rowtune.runtime.writer import Answer
from rowtune.torch_private import FakeTensorMode, storage_of, without_modes

META = torch.device("meta")

Life = tuple[str, ...]
"""What a run does, in order: forward alone; forward and backward; with the forward again in between, inside a
checkpoint; or one sweep for both."""


class Traced(Protocol):
    """A run of a segment."""

    def forward(self) -> dict[str, Tensor]: ...
    def again(self) -> dict[str, Tensor]: ...
    def single_sweep(self, scale: Tensor | float) -> tuple[dict[str, Tensor], Gradients]: ...
    def backward(self, grads: Mapping[str, Tensor]) -> Gradients: ...
    def recall(self, tensors: Mapping[str, Tensor | Shelf]) -> None: ...
    def forget(self) -> None: ...


class Begin(NamedTuple):
    """How runs of a segment begin: `run(tensors, first_time)` is one of the schedule itself; only the first
    time do buffers change. Outputs `carried` may get gradients; a sweep's are for `scale` times the loss.
    What is put on the host goes to the pool `host`. `casts`: the model turns autocast on or off by itself
    somewhere in the segment."""

    run: Callable[[Mapping[str, Tensor | Shelf], bool], Traced]
    lives: tuple[Life, ...]
    carried: frozenset[str]
    scale: Tensor | float
    host: HostPool
    casts: bool = False


class Given(NamedTuple):
    """Tensors without data in the place of what a segment reads, on `device`: as it is when a run begins, and
    the shelves that some of it is on from then on."""

    tensors: Mapping[str, Tensor]
    shelves: Mapping[str, Shelf]
    device: torch.device

    def on(self, blank: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor | Shelf]]:
        """Stand-ins on a device of tensors without data: for the first section, and for those after it."""
        first = stand_ins(self.tensors, blank)
        return first, {**first, **{n: s.without_data(blank) for n, s in self.shelves.items()}}


class Runnable(NamedTuple):
    """A section that can be run again: `function` takes what is given and then the state, and returns the
    results and then what is left for later sections, once constants are up to date (`renew`). The listing
    that it was made of is gone."""

    function: Function
    given: tuple[Key, ...]
    state: tuple[View, ...]
    results: tuple[Key, ...]
    leaves: tuple[View, ...]
    renew: tuple[Callable[[], object], ...]


def _step(listed: Listed, host: HostPool) -> Runnable:
    whole = rolled(listed.listing)
    try:
        shorter = rolled(rewritten(listed.listing), whole)
    except NotAlike:
        shorter = _one_by_one(listed.listing, whole)
    return Runnable(compiled(shorter, calls.own(Host(host).leave)), *listed[1:])


def _one_by_one(listing: Listing, whole: Rolled) -> Rolled:
    """After those rewrites that treat a turn that is listed as they would those that it stands for."""
    shorter = whole
    for rewrite in REWRITES:
        made = check(rewrite(listing))
        with contextlib.suppress(NotAlike):
            shorter, listing = rolled(made, whole), made
    return shorter


Place = tuple[Life, Any]
"""What a run did up to and including a section, and the layout of the outer gradients."""


@dataclass
class Kind:
    """One kind of runs: its sections, and what its forward leaves for all of them. `layout` is that of what
    is not on shelves later."""

    answer: Answer
    given: Given
    layout: Any
    way: Way = in_turns
    lives: tuple[Life, ...] = ()
    steps: dict[Place, Runnable | None] = field(default_factory=dict)
    leaves: frozenset[View] = frozenset()
    why_not: str = ""

    def learn(self, place: Place, begin: Begin, outer: Mapping[str, Tensor]) -> None:
        """What a run does that was not written down yet: another life than was expected, or a backward for
        other outer gradients. Where forward leaves too little for it, runs to come will leave more."""
        self.steps[place] = None
        with contextlib.suppress(Exception):  # as in `written`
            listed = _traced(self.answer, self.way, place[0], self.given, begin, outer)[-1][1]
            if self.leaves >= {*listed.state}:
                self.steps[place] = _step(listed, begin.host)
            elif place[0] in begin.lives and place[0] not in self.lives:
                _write(self, begin, begin.lives)


def layout_of(tensors: Mapping[Any, Tensor]) -> Any:
    """Sizes, strides and types, and which tensors share memory, and where."""
    first: dict[int, int] = {}
    shares = [first.setdefault(storage_of(t), i) for i, t in enumerate(tensors.values())]
    alone = len(first) == len(tensors)
    offsets = () if alone else [t.storage_offset() for t in tensors.values()]
    where = () if alone else (*zip(shares, offsets, strict=True),)
    return where, tuple([(n, t.shape, t.stride(), t.dtype) for n, t in tensors.items()])


def written(
    answer: Answer, tensors: Mapping[str, Tensor], shelves: Mapping[str, Shelf], begin: Begin
) -> Kind:
    """All that runs like this one call."""
    device = next(iter(tensors.values())).device
    layout = layout_of({n: t for n, t in tensors.items() if n not in shelves})
    try:
        with without_modes():
            there = {n: s.without_data(META) for n, s in shelves.items()}
            given = Given(stand_ins(tensors, META), there, device)
    except NotListed as why:
        return Kind(answer, Given({}, {}, device), layout, why_not=str(why))
    kind = Kind(answer, given, layout)
    try:
        _write(kind, begin, begin.lives[-1:])
    except NotAlike:  # bands that others were to stand for
        kind = Kind(answer, given, layout, each)
        _write(kind, begin, begin.lives[-1:])
    return kind


def _write(kind: Kind, begin: Begin, lives: tuple[Life, ...]) -> None:
    """The sections of these lives. Most segments within a checkpoint have only the longest."""
    try:
        runs = [_traced(kind.answer, kind.way, life, kind.given, begin, None) for life in lives]
    except NotAlike:
        raise
    except Exception as why:  # an operator that does not run without data; on real tensors it may
        kind.why_not = f"{type(why).__name__}: {why}" if not isinstance(why, NotListed) else str(why)
        return
    kept = dict.fromkeys(view for sections in runs for view in sections[0][1].leaves)
    steps: dict[Place, Runnable | None] = {}
    for place, listed in (section for sections in runs for section in sections):
        if place not in steps:
            left = _leaving(listed, kept) if len(place[0]) == 1 else listed
            steps[place] = _step(left, begin.host)
    kind.lives, kind.steps, kind.leaves = lives, steps, frozenset(kept)


def _leaving(listed: Listed, kept: Iterable[View]) -> Listed:
    """A forward that leaves what any later section reads."""
    listing, kept = listed.listing, tuple(kept)
    here = (*listing.given, *(v for call in listing.calls for v in call.makes if v >= 0))
    made = {listing.views[v]: v for v in here}
    results = (*listing.results[: len(listed.results)], *(made[view] for view in kept))
    return listed._replace(listing=replace(listing, results=results), leaves=kept)


def _traced(
    answer: Answer,
    way: Way,
    life: Life,
    given: Given,
    begin: Begin,
    outer: Mapping[str, Tensor] | None,
) -> list[tuple[Place, Listed]]:
    """The sections of one run on stand-ins.

    Args:
        way: which steps of its schedule run.
        outer: the gradients that come in; None for those that are expected, of all outputs that have some.
    """
    device = given.device
    # Autocast looks at devices: where it is on, stand-ins are fake tensors of this one.
    casts = device.type != "meta" and (begin.casts or torch.is_autocast_enabled(device.type))
    blank = device if casts else torch.device("meta")
    tracer = Tracer(device, blank, answer, way)
    layouts = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_modes())
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # the user has had them, or will
        if casts:
            stack.enter_context(FakeTensorMode())
        stack.enter_context(saved_tensors_hooks(_itself, _itself))  # a checkpoint around counts what is saved
        stack.enter_context(during(TRACING, tracer))
        stack.enter_context(uncollected())
        first, later = given.on(blank)
        run = begin.run(first, True)
        outputs: dict[str, Tensor] = {}
        for at, name in enumerate(life):
            more = _beside(name, begin, outputs, outer, blank)
            layouts.append(layout_of(more) if name == "backward" else None)
            here: Mapping[str, Tensor | Shelf] = later if at else first
            if at:
                run.recall(here)
            with tracer.section({**read(here), **named(name, more)}) as section:
                outputs, gradients = call(run, name, more, begin.scale)
            tracer.ask(section, {**named("out", outputs), **flat(gradients)})
            run.forget()
            del gradients
    places = [(life[: at + 1], layout) for at, layout in enumerate(layouts)]
    with without_modes():
        return list(zip(places, tracer.listed(), strict=True))


def _itself(t: Tensor) -> Tensor:
    return t


def _beside(
    name: str,
    begin: Begin,
    outputs: Mapping[str, Tensor],
    outer: Mapping[str, Tensor] | None,
    blank: torch.device,
) -> dict[str, Tensor]:
    """Stand-ins for what a section is given beside the segment's tensors."""
    if name == "sweep" and isinstance(begin.scale, Tensor):
        return stand_ins({"scale": begin.scale}, blank)
    if name != "backward":
        return {}
    if outer is not None:
        return stand_ins(outer, blank)
    expected = {n: t for n, t in outputs.items() if n in begin.carried and t.is_floating_point()}
    return {n: torch.empty_like(t) for n, t in expected.items()}


def call(
    run: Traced, name: str, more: Mapping[str, Tensor], scale: Tensor | float
) -> tuple[dict[str, Tensor], Gradients]:
    """(outputs, gradients) of one section of a run of the schedule itself."""
    if name == "sweep":
        return run.single_sweep(more.get("scale", scale))
    if name == "backward":
        return {}, run.backward(more)
    return run.again() if name == "again" else run.forward(), Gradients({}, {})


def named(kind: str, tensors: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """Keys of their own for tensors of one kind."""
    return {(kind, name): t for name, t in tensors.items()}


def read(tensors: Mapping[str, Tensor | Shelf]) -> dict[Key, Any]:
    """What a segment reads, with keys of its own for all that a shelf has."""
    found: dict[Key, Any] = {}
    for name, t in tensors.items():
        if isinstance(t, Shelf):
            found |= {(f"shelf {i}", name): part for i, part in enumerate(t.parts)}
        else:
            found["in", name] = t
    return found


def flat(gradients: Gradients) -> dict[Key, Tensor]:
    """Gradients by key."""
    return {**named("input", gradients.inputs), **named("weight", gradients.weights)}


def stand_ins(tensors: Mapping[str, Tensor], blank: torch.device) -> dict[str, Tensor]:
    """Tensors without data of the same layout, that share memory where these do."""
    memory: dict[int, Tensor] = {}
    found = {}
    for name, t in tensors.items():
        key = storage_of(t)
        if key not in memory:
            elements = -(-t.untyped_storage().nbytes() // t.itemsize)
            memory[key] = torch.empty(elements, dtype=t.dtype, device=blank)
        if memory[key].dtype != t.dtype:
            raise NotListed("one memory is looked at in two types")
        found[name] = memory[key].as_strided(t.shape, t.stride(), t.storage_offset()).detach()
    return found
