"""The calls of a rows segment's run, written down from a run on tensors without data.

A run has sections (forward, forward again, backward), each with tensors of its own that are given to it and
asked of it. What one section leaves in memory for a later one is its state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowtune.runtime.lists.alike import Calls, NotAlike, Places, alike
from rowtune.runtime.lists.listing import Listing, written
from rowtune.runtime.lists.turns import Way as Steps
from rowtune.runtime.lists.turns import each
from rowtune.runtime.recording import Turn, View, Way
from rowtune.runtime.stores.calls import NAMESPACE
from rowtune.runtime.writer import Answer, Recorder
from rowtune.torch_private import autograd_runs, storage_of

Key = tuple[str, str]
"""Kind and name of a tensor that goes in or out of a section."""

Named = Mapping[Key, Tensor]

MOST_CALLS = 200_000
"""A run of more calls, bands like others left out, is not written down: that would take long, and the code
much memory."""

READS_VALUES = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"})
"""What comes after depends on what is in a tensor."""


class NotListed(Exception):
    """A run whose calls cannot be run again; says why."""


@dataclass
class Section:
    """Calls `start` to `stop`, the views of what was given and of what was asked for, by key."""

    start: int
    stop: int = 0
    given: dict[Key, int] = field(default_factory=dict)
    results: dict[Key, int] = field(default_factory=dict)


class Listed(NamedTuple):
    """A section on its own: its listing is given `given`, then `state`, and its results are those asked for,
    then what it `leaves` for later sections. `renew` brings its constants up to date."""

    listing: Listing
    given: tuple[Key, ...]
    state: tuple[View, ...]
    results: tuple[Key, ...]
    leaves: tuple[View, ...]
    renew: tuple[Callable[[], object], ...]


class Tracer(Recorder):  # type: ignore[no-untyped-call]
    """Records sections of one run, for `device`; its tensors lie on the device `blank`."""

    def __init__(
        self, device: torch.device, blank: torch.device, answer: Answer, steps: Steps = each
    ) -> None:
        super().__init__(lambda func, args, kwargs: answer(func, args, self._on_blank(kwargs)))
        self.device, self._blank, self._steps = device, blank, steps
        self.more: dict[int, int] = {}  # by loop: how often its last turn comes again
        self._by_name = False
        self._turn: tuple[int, int, int] | None = None  # loop, turn, number of the first call
        self._loops: list[dict[int, Calls]] = []
        self._places, self._placed_calls = Places(), 0
        self.sections: list[Section] = []
        self._renew: dict[Hashable, Callable[[], object]] = {}
        self._real: dict[int, Tensor] = {}  # constants, by buffer
        self._stand_ins: dict[int, Tensor] = {}  # by the constant's storage

    def stand_in(self, constant: Tensor) -> Tensor:
        """A tensor without data for one that is the same in every run."""
        key = storage_of(constant)
        if key not in self._stand_ins:
            like = constant.shape, constant.stride()
            made = torch.empty_strided(*like, dtype=constant.dtype, device=self._blank)
            self._stand_ins[key] = made
            self._real[self._views[self.know(made, "a constant", "constant")].buffer] = constant
        return self._stand_ins[key]

    def keep_fresh(self, key: Hashable, renew: Callable[[], object]) -> None:
        """To be called before the calls run: what a constant is a copy of may have changed."""
        self._renew[key] = renew

    @contextmanager
    def section(self, given: Named) -> Iterator[Section]:
        """Write down what happens inside."""
        self._seen.clear()  # a section makes its own views, of an input say
        made = Section(len(self._calls))
        self._places, self._placed_calls = Places(), len(self._calls)
        for name, tensor in given.items():
            made.given[name] = self.know(tensor, str(name), "batch")
        self.sections.append(made)
        with self:
            yield made
        made.stop = len(self._calls)

    def ask(self, section: Section, results: Named) -> None:
        """These tensors go out of the section."""
        for key, tensor in results.items():
            section.results[key] = self.know(tensor, str(key), "activation")

    def _on_blank(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A model may say itself where it makes a tensor."""
        return {**kwargs, "device": self._blank} if kwargs.get("device") == self.device else kwargs

    def _allow(self, operator: str) -> None:
        if operator in READS_VALUES or not operator.startswith(("aten::", "prims::", NAMESPACE)):
            raise NotListed(f"{operator} cannot be run from a list")

    def _given(self, argument: Any, reads: list[int]) -> Any:
        """Memory that is made is made on the device."""
        is_blank = isinstance(argument, torch.device) and argument == self._blank
        return self.device if is_blank else super()._given(argument, reads)

    # -- turns ---------------------------------------------------------------------------------------------

    def steps(self, run: Any, steps: Any) -> None:
        if self.more:
            self._forget_parts()
        self._steps(self, run, steps)

    def _forget_parts(self) -> None:
        """Other images begin. The rows that a loop looked at for those before are not those of its last turn:
        they are looked at anew."""
        first: dict[int, int] = {}
        for view in self._seen.values():
            first.setdefault(self._views[view].buffer, view)
        whole = {*first.values(), *self.sections[-1].given.values()}
        self._seen = {key: view for key, view in self._seen.items() if view in whole}

    def begin_loop(self) -> int:
        """The number of a loop."""
        self._loops.append({})
        return len(self._loops) - 1

    @contextmanager
    def turn(self, loop: int, turn: int) -> Iterator[None]:
        """Calls inside are those of a turn of a loop."""
        start = len(self._calls)
        self._turn = loop, turn, start
        yield
        self._turn = None
        self._loops[loop][turn] = dict(enumerate(self._calls[start:]))

    @contextmanager
    def rows_of_now(self) -> Iterator[None]:
        before, self._by_name = self._by_name, True
        yield
        self._by_name = before

    def oldest(self, loop: int, turn: int) -> int | None:
        """How many turns later what a turn makes is still read; None if this one is not like those before."""
        self._places.add(self._calls[self._placed_calls :])
        self._placed_calls = len(self._calls)
        try:
            return alike(self._loops[loop], loop, turn, self._places, self._views).oldest
        except NotAlike:
            return None

    def _placed(self) -> tuple[int, Way, Turn | None]:
        if len(self._calls) >= MOST_CALLS:
            raise NotListed(f"more than {MOST_CALLS} calls")
        way: Way = "backward" if autograd_runs() and not self._by_name else "forward"
        if self._turn is None:
            return 0, way, None
        loop, turn, start = self._turn
        return 0, way, Turn(loop, turn, len(self._calls) - start)

    # -- listings ------------------------------------------------------------------------------------------

    def listed(self) -> list[Listed]:
        """The sections, each on its own.

        Raises:
            NotListed: the calls cannot be run again.
            NotAlike: they could, with all bands among them.
        """
        views = tuple(self._views)
        reads = [self._outside(section) for section in self.sections]
        left: list[dict[View, int]] = [{} for _ in self.sections]
        for at, outside in enumerate(reads):
            made = [self._made_in(section) for section in self.sections[:at]]
            for view in map(views.__getitem__, outside):
                home = next((i for i in range(at - 1, -1, -1) if view in made[i]), None)
                if home is None:
                    raise NotAlike if self.more else NotListed("a tensor comes from nowhere")
                if self._is_part(self.sections[home], made[home][view]):
                    raise NotAlike
                left[home][view] = made[home][view]
        found = []
        for section, outside, leaves in zip(self.sections, reads, left, strict=True):
            given, results = (
                (*section.given.values(), *outside),
                (*section.results.values(), *leaves.values()),
            )
            calls = tuple(self._calls[section.start : section.stop])
            more = {
                loop: n for loop, n in self.more.items() if any(c.turn and c.turn.loop == loop for c in calls)
            }
            listing = Listing(calls, views, given, self._constants(section), results, more)
            state = tuple(views[v] for v in outside)
            keys = tuple(section.given), tuple(section.results)
            renew = tuple(self._renew.values())
            found.append(Listed(listing, keys[0], state, keys[1], tuple(leaves), renew))
        return found

    def _is_part(self, section: Section, view: int) -> bool:
        """Whether a view is of part of what a section was given: a loop may have looked at others by it."""
        given = section.given.values()
        buffers = {self._views[v].buffer for v in given}
        return bool(self.more) and view not in given and self._views[view].buffer in buffers

    def _made_in(self, section: Section) -> dict[View, int]:
        here = [v for call in self._calls[section.start : section.stop] for v in call.makes if v >= 0]
        return {self._views[v]: v for v in (*section.given.values(), *here)}

    def _constants(self, section: Section) -> dict[int, Tensor]:
        """The real tensors of all constant views that a section reads."""
        reads = {v for call in self._calls[section.start : section.stop] for v in call.reads}
        found = {}
        for v in reads | {*section.results.values()}:
            view = self._views[v]
            if (real := self._real.get(view.buffer)) is not None:
                found[v] = real.as_strided(view.shape, view.stride, real.storage_offset() + view.offset)
        return found

    def _outside(self, section: Section) -> list[int]:
        """Views that a section reads and did not make: what earlier sections left."""
        given = {self._views[v].buffer for v in section.given.values()}
        known = {*section.given.values()}
        found: dict[int, None] = {}
        for call in self._calls[section.start : section.stop]:
            found |= dict.fromkeys(v for v in call.reads if v not in known)
            known |= {*call.makes}
            if call.op is torch.ops.aten.as_strided.default and self._views[call.reads[0]].buffer in given:
                raise NotListed("a tensor from outside is looked at by its place in memory")
            if any(self._views[v].buffer in self._real for v in written(call)):
                raise NotListed(f"{call.name} writes to a constant")
        found |= dict.fromkeys(v for v in section.results.values() if v not in known)
        return [v for v in found if self._views[v].buffer not in self._real]
