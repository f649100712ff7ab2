"""The calls of one real run of a rows segment, written down while they compute.

A run has sections (forward, forward again, backward), each with tensors of its own that are given to it and
asked of it. What one section leaves in memory for a later one is its state.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rowtune.runtime.lists.listing import Listing, written
from rowtune.runtime.recording import Role, View
from rowtune.runtime.writer import Recorder

Named = Mapping[Hashable, Tensor]

MOST_CALLS = 200_000
"""A run of more calls is not written down: as code it would take long to make, and much memory."""

READS_VALUES = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"})
"""What comes after depends on what is in a tensor."""


class NotListed(Exception):
    """A run whose calls cannot be run again; says why."""


@dataclass
class Section:
    """Calls `start` to `stop`, the views of what was given and of what was asked for, by key."""

    start: int
    stop: int = 0
    given: dict[Hashable, int] = field(default_factory=dict)
    results: dict[Hashable, int] = field(default_factory=dict)


class Tracer(Recorder):  # type: ignore[no-untyped-call]
    """Records sections of one run on the device itself."""

    def __init__(self) -> None:
        super().__init__(lambda func, args, kwargs: func(*args, **kwargs))
        self.sections: list[Section] = []
        self.constants: dict[int, Tensor] = {}
        self.why_not = ""
        self._constant: set[int] = set()  # buffers
        self._buffer_of: dict[Hashable, int] = {}

    @contextmanager
    def section(self, given: Named) -> Iterator[Section]:
        """Write down what happens inside."""
        self._forget_views()
        made = Section(len(self._calls))
        for key, tensor in given.items():
            made.given[key] = self._bind(key, tensor)
        self.sections.append(made)
        with self:
            yield made
        made.stop = len(self._calls)
        if made.stop > MOST_CALLS:
            self.why_not = f"more than {MOST_CALLS} calls"

    def ask(self, section: Section, results: Named) -> None:
        """These tensors go out of the section."""
        for key, tensor in results.items():
            section.results[key] = self.know(tensor, str(key), "activation")

    def _bind(self, key: Hashable, tensor: Tensor) -> int:
        """What was given before under this key may lie elsewhere now: a recomputed input."""
        before = self._buffer_of.get(key)
        if before is not None:
            self.rename(tensor, before)
        view = self.know(tensor, str(key), "batch")
        self._buffer_of[key] = self._views[view].buffer
        return view

    def know(self, tensor: Tensor, name: str, role: Role, born: int | None = None) -> int:
        buffers = len(self._buffers)
        view = super().know(tensor, name, role, born)
        buffer = self._views[view].buffer
        if role == "constant" and buffer >= buffers:
            self._constant.add(buffer)
        if buffer in self._constant and view not in self.constants:
            self.constants[view] = tensor.detach()
        return view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in READS_VALUES or not name.startswith(("aten::", "prims::")):
            self.why_not = f"{name} cannot be run from a list"
        return super().__torch_dispatch__(func, types, args, kwargs)

    # -- listings ------------------------------------------------------------------------------------------

    def listings(self) -> list[tuple[Listing, tuple[Hashable, ...], tuple[View, ...], tuple[View, ...]]]:
        """For every section: (its listing, the keys of what is given, the state that it reads, and the state
        that it leaves), given and results in this order.

        Raises:
            NotListed: the calls cannot be run again.
        """
        if self.why_not:
            raise NotListed(self.why_not)
        reads = [self._outside(section) for section in self.sections]
        left: list[dict[View, int]] = [{} for _ in self.sections]
        for at, outside in enumerate(reads):
            for view in outside:
                self._leave(left, at, self._views[view])
        found = []
        for section, outside, leaves in zip(self.sections, reads, left, strict=True):
            given = (*section.given.values(), *outside)
            results = (*section.results.values(), *leaves.values())
            calls = tuple(self._calls[section.start : section.stop])
            listing = Listing(calls, tuple(self._views), given, self.constants, results)
            state = tuple(self._views[v] for v in outside)
            found.append((listing, tuple(section.given), state, tuple(leaves)))
        return found

    def _outside(self, section: Section) -> list[int]:
        """Views that a section reads and did not make: what earlier sections left."""
        known = {*section.given.values(), *self.constants}
        found: dict[int, None] = {}
        for call in self._calls[section.start : section.stop]:
            found |= dict.fromkeys(v for v in call.reads if v not in known)
            known |= {*call.makes}
            if call.op is torch.ops.aten.as_strided.default and self._lies(section, call.reads[0]):
                raise NotListed("a tensor from outside is looked at by its place in memory")
            for view in written(call):
                if self._views[view].buffer in self._constant:
                    raise NotListed(f"{call.name} writes to a tensor that is not its segment's own")
        found |= dict.fromkeys(v for v in section.results.values() if v not in known)
        return [*found]

    def _lies(self, section: Section, view: int) -> bool:
        """Whether a view is of memory that was given."""
        given = {self._views[v].buffer for v in section.given.values()}
        return self._views[view].buffer in given

    def _leave(self, left: list[dict[View, int]], before: int, view: View) -> None:
        """The latest section before `before` that has this view leaves it."""
        for at in range(before - 1, -1, -1):
            section = self.sections[at]
            here = [*section.given.values()]
            here += [v for call in self._calls[section.start : section.stop] for v in call.makes if v >= 0]
            found = next((v for v in here if self._views[v] == view), None)
            if found is not None:
                left[at][view] = found
                return
        raise NotListed("a tensor comes from nowhere")

    def _forget_views(self) -> None:
        """What a section looks at, it looks at itself: a view of an input is made again from the input."""
        for key, known in self._known.items():
            self._known[key] = known._replace(views={})
