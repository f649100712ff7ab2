"""The programme's table: what a segment from one cut to another keeps, takes and costs, from recordings.

An option stands between checkpoints of all before and all behind it, so that what it keeps is its own. It
is recorded once, and so is what is like it (rowtune/cost/seen.py); its time is that of its calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from rowtune.cost.leaving import Leaving
from rowtune.cost.predict import alive, composed, seen
from rowtune.cost.profile import Clock, Profile, is_cold
from rowtune.cost.seen import RecordedStep
from rowtune.errors import RowtuneError
from rowtune.graph.cuts import is_local, legal_cut
from rowtune.graph.graph import Graph
from rowtune.graph.places import bandable, candidate_cuts, is_split
from rowtune.graph.replay import reads_output
from rowtune.plan.choices import LOSSY, Cheap, Store
from rowtune.plan.plan import Plan, Segment
from rowtune.runtime.blank import Signature
from rowtune.runtime.recorder import Brought
from rowtune.runtime.segment_recording import Work

NOTHING: Mapping[str, Any] = MappingProxyType({})
UNBOUNDED = 1 << 62
CUTS = 20
"""Places where segments may end."""


class Span(NamedTuple):
    """The most that is alive in an option beyond what is left from before, what enters it included: by
    itself, and where others hold on to all that enters."""

    alone: int
    held: int


class Part(NamedTuple):
    """A segment that is run: its policy, its calls and how many the host makes."""

    policy: str
    work: Work
    host: int


@dataclass(frozen=True)
class Option:
    """Segments from cut `start` to cut `stop`. For backward they leave `kept`, and hold on to tensors that
    cross a cut, `holds` with their bytes. `forward` and `backward` are what is alive in them meanwhile, the
    gradients of later parameters apart; `host_bytes` are kept on the host."""

    start: int
    stop: int
    segments: tuple[Segment, ...]
    kept: int
    holds: tuple[tuple[str, int], ...]
    forward: Span
    backward: Span
    parts: tuple[Part, ...] = field(repr=False, compare=False)
    host_bytes: int = 0

    @property
    def main(self) -> Segment:
        """The segment that says how most of it is computed."""
        rows = [s for s in self.segments if s.policy == "rows"]
        return (rows or [s for s in self.segments if s.policy == "checkpoint"] or [*self.segments])[0]


Key = tuple[int, int, tuple[Segment, ...]]


class Kept(NamedTuple):
    """All that a table knows: options (None: it cannot be lowered), bytes of tensors that they hold on to
    across cuts, bytes that cross cuts; and the seconds that were spent on it, by what was looked for."""

    known: dict[Key, Option | None]
    sizes: dict[str, int]
    crossing: dict[int, int]
    spent: dict[str, float]


class Table:
    """The options of one graph that were recorded so far.

    Args:
        graph: with its loss.
        whole: what holds for all of a plan beside its segments: dtype, say, or step_in_backward.
        max_grad_error: that stores which round may cost, in plans that have some.
        host_bytes: that a plan may keep on the host.
        brought: to the device by the optimizer, for a parameter's update.
    """

    def __init__(
        self,
        graph: Graph,
        axis: int = 2,
        whole: Mapping[str, Any] = NOTHING,
        max_grad_error: float = 0.0,
        host_bytes: int = UNBOUNDED,
        brought: Brought = (),
    ) -> None:
        self.graph, self.axis, self.whole, self.max_grad_error = graph, axis, dict(whole), max_grad_error
        self.host_bytes, self.brought = host_bytes, brought
        inner = candidate_cuts(graph, CUTS)
        self.cuts = (0, *inner, len(graph.nodes))
        self.known: dict[Key, Option | None] = {}
        self.spent: dict[str, float] = {}
        self._clock = Clock(Profile())
        self._seconds: dict[Option, float] = {}
        self._leaving: tuple[Leaving, ...] = ()
        self.sizes: dict[str, int] = {}
        """Bytes of tensors that options hold on to across cuts."""
        self._crossing: dict[int, int] = {}
        self._crossers: dict[int, tuple[str, ...]] = {}

    def plan(self, segments: Sequence[Segment]) -> Plan:
        """These segments, and what holds for all."""
        rounds = any(s.store in LOSSY for s in segments)
        error = self.max_grad_error if rounds else 0.0
        return Plan(tuple(segments), self.axis, **self.whole, max_grad_error=error)

    # -- what is known ---------------------------------------------------------------------------------------

    @property
    def options(self) -> list[Option]:
        return [o for o in self.known.values() if o is not None]

    def seconds(self, option: Option) -> float:
        """Of one step, by the profile at hand."""
        if option not in self._seconds:
            parts = option.parts
            self._seconds[option] = sum(self._clock.seconds(*part) for part in parts)
        return self._seconds[option]

    def price(self, profile: Profile) -> None:
        """Take times from this profile from now on."""
        self._clock = Clock(profile)
        self._seconds, self._leaving = {}, ()

    @property
    def leaving(self) -> tuple[Leaving, ...]:
        """By cut, the options that leave it."""
        if not self._leaving:
            self._leaving = tuple(self._that_leave())
        return self._leaving

    def _that_leave(self) -> Iterator[Leaving]:
        crossers = {cut: frozenset(self.crossers(cut)) for cut in range(len(self.cuts))}
        starting: dict[int, list[Option]] = {}
        for option in self.options:
            starting.setdefault(option.start, []).append(option)
        for cut in range(len(self.cuts)):
            options = starting.get(cut, [])
            seconds, entering = [*map(self.seconds, options)], self.crossing(cut)
            yield Leaving(options, seconds, entering, self.later_gradients, crossers, self.sizes)

    def work(self) -> dict[Signature, float]:
        """All calls of all options, and how often they are made."""
        found: dict[Signature, float] = {}
        for option in self.options:
            for part in option.parts:
                for call, often in part.work:
                    call = call._replace(cold=is_cold(part.policy))
                    found[call] = found.get(call, 0.0) + often
        return found

    @cached_property
    def later_gradients(self) -> tuple[int, ...]:
        """By cut, the bytes of the gradients of parameters that are read behind it: when backward comes to
        the cut they are all there, unless each is used as it comes."""
        if self.whole.get("step_in_backward"):
            return (0,) * len(self.cuts)
        return tuple(
            sum(
                v.bytes
                for v in self.graph.parameters()
                if v.requires_grad and any(c >= cut for c in self.graph.consumers[v.name])
            )
            for cut in self.cuts
        )

    @property
    def kept(self) -> Kept:
        return Kept(self.known, self.sizes, self._crossing, self.spent)

    def take(self, kept: Kept) -> None:
        """Know what a table of the same graph knew."""
        self.known |= kept.known
        self.sizes |= kept.sizes
        self._crossing |= kept.crossing
        self.spent |= kept.spent
        self._leaving = ()

    # -- recording -------------------------------------------------------------------------------------------

    def add(self, keys: Iterable[Key], until: float) -> int:
        """Record options until the clock says `until`, one at least; how many there were."""
        count = 0
        for key in keys:
            if key not in self.known:
                self.known[key] = self._recorded(*key)
                self._leaving = ()
                count += 1
            if time.monotonic() > until:
                break
        return count

    def _recorded(self, start: int, stop: int, segments: tuple[Segment, ...]) -> Option | None:
        before = (self._checkpoint(0, start),) if start else ()
        after = (self._checkpoint(stop, len(self.cuts) - 1),) if stop < len(self.cuts) - 1 else ()
        try:
            plan = self.plan((*before, *segments, *after))
            step = seen(self.graph).step(self.graph, plan, self.brought)
        except RowtuneError:  # what cannot be lowered is no option
            return None
        own = slice(len(before), len(step.segments) - len(after))
        entering = self._named(step, start)
        alone = alive(self.graph, step)
        held = alive(self.graph, step, held=frozenset(entering.values()))
        base = alone.forward[own][0].before - self.crossing(start)
        kept = {
            b
            for one in step.segments[own]
            for n in one.footprint.kept
            if (b := one.blocks.get(n)) is not None
        }
        crossing = entering | self._named(step, stop)
        sizes = {one.blocks[n]: size for one in step.segments for n, size in one.footprint.shared.items()
                 if n in one.blocks}  # fmt: skip
        holds = {name: sizes[b] for name, b in crossing.items() if b in kept}
        self.sizes |= holds
        leaves = {*self._named(step, stop)}
        left = alone.forward[own][-1].after - base - self.crossing(stop)
        return Option(
            start,
            stop,
            segments,
            left - sum(size for name, size in holds.items() if name not in leaves),
            tuple(holds.items()),
            Span(*(max(mark.peak for mark in peak.forward[own]) - base for peak in (alone, held))),
            Span(
                *(max(mark.peak for mark in peak.backward[own]) - base - self.later_gradients[stop]
                  for peak in (alone, held))
            ),
            tuple(Part(s.policy, s.footprint.work, s.footprint.host) for s in step.segments[own]),
            sum(s.footprint.host_bytes for s in step.segments[own]),
        )  # fmt: skip

    def _named(self, step: RecordedStep, cut: int) -> dict[str, int]:
        """The memory of tensors that cross a cut, each by the name of the first that lies in it."""
        found: dict[int, str] = {}
        for name in self.crossers(cut):
            if name in step.blocks:
                found.setdefault(step.blocks[name], name)
        return {name: block for block, name in found.items()}

    def crossers(self, cut: int) -> tuple[str, ...]:
        """Values that are made before a cut and read behind it."""
        if cut not in self._crossers:
            at, nodes, consumers = self.cuts[cut], self.graph.nodes, self.graph.consumers
            found = (n.name for n in nodes[:at] if any(c >= at for c in consumers[n.name]))
            self._crossers[cut] = tuple(found)
        return self._crossers[cut]

    def crossing(self, cut: int) -> int:
        """Bytes of the tensors that cross a cut."""
        if cut in (0, len(self.cuts) - 1):
            return 0
        if cut not in self._crossing:
            halves = self._checkpoint(0, cut), self._checkpoint(cut, len(self.cuts) - 1)
            _, peak = composed(self.graph, self.plan(halves))
            self._crossing[cut] = peak.forward[0].after - peak.forward[0].before
        return self._crossing[cut]

    def _checkpoint(self, start: int, stop: int) -> Segment:
        return self.segment(self.cuts[start], self.cuts[stop], "checkpoint")

    def segment(self, start: int, stop: int, policy: str) -> Segment:
        """Nodes [start, stop)."""
        nodes = self.graph.nodes
        return Segment(nodes[start].name, nodes[stop - 1].name, policy)  # type: ignore[arg-type]

    # -- ways to compute a stretch --------------------------------------------------------------------------

    def keep(self, start: int, stop: int, store: Store = "device", cheap: Cheap = "store") -> Key:
        made = self.segment(self.cuts[start], self.cuts[stop], "keep")
        return start, stop, (replace(made, store=store, cheap=cheap),)

    def checkpoint(self, start: int, stop: int, images: int = 0, store: Store = "device") -> Key:
        made = replace(self._checkpoint(start, stop), store=store)
        if images and is_local(self.graph, self.cuts[start], self.cuts[stop], 0):
            made = replace(made, images=images)
        return start, stop, (made,)

    def turns(self, start: int, stop: int, like: Segment) -> Key:
        """A checkpoint of the stretches between cuts, each recomputed once more in its turn."""
        parts = [(self.cuts[k], self.cuts[k + 1]) for k in range(start, stop)]
        inside = [s for a, b in parts for s in self._turn(a, b, b == self.cuts[stop], like)]
        return start, stop, (replace(self._checkpoint(start, stop), inside=tuple(inside)),)

    def rows(self, start: int, stop: int, like: Segment) -> Key | None:
        """`like` on all that can be banded, the rest kept; None where nothing can."""
        first, last, axis = self.cuts[start], self.cuts[stop], self.axis if like.band_rows else 0
        made: list[Segment] = []
        at = first
        for a, b in bandable(self.graph, first, last, axis):
            if a > at:
                made.append(self.segment(at, a, "keep"))
            made.append(self._banded(a, b, like))
            at = b
        if at < last and made:
            made.append(self.segment(at, last, "keep"))
        return (start, stop, tuple(made)) if made else None

    def _banded(self, start: int, stop: int, like: Segment) -> Segment:
        nodes = self.graph.nodes
        images = like.images if not like.band_rows or is_split(self.graph, start, stop, self.axis) else 0
        return replace(like, first=nodes[start].name, last=nodes[stop - 1].name, images=images)

    def _turn(self, start: int, stop: int, last: bool, like: Segment) -> Iterator[Segment]:
        """One stretch inside a checkpoint. A ReLU at its end is kept where its output is made again all the
        same: the gradient behind it need not live then while that in front of it is found."""
        if like.policy != "rows" or [(start, stop)] != bandable(self.graph, start, stop, self.axis):
            yield self.segment(start, stop, "checkpoint")
            return
        relu = stop - 1
        apart = not last and start < relu and reads_output(self.graph.nodes[relu])
        if apart and legal_cut(self.graph, relu) and bandable(self.graph, start, relu, self.axis):
            yield self._banded(start, relu, like)
            yield self.segment(relu, stop, "keep")
        else:
            yield self._banded(start, stop, like)


def within(seconds: float) -> float:
    """The clock's reading so many seconds from now, for `Table.add`."""
    return time.monotonic() + seconds


Restriction = Callable[[Option], bool]
