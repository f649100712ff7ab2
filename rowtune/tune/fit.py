"""Will it fit, and how large could it be: predicted in seconds, on tensors without data.

Three ways to train are compared: plain PyTorch, the best checkpointing there is (the exact programme over
keep and checkpoint segments, recursive ones included), and every plan of rowtune's that uses the device
alone; a fourth where the host's memory may be used. Peaks grow nearly in proportion to the size, so a few
sizes find the largest one; what is found at one of them is where the search begins at the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import NamedTuple

from rowtune.cost.candidates import first, offloaded, shelved
from rowtune.cost.lean import descend
from rowtune.cost.predict import fixed_bytes, predict
from rowtune.cost.profile import Profile
from rowtune.cost.programme import Path, fastest, plan_of
from rowtune.cost.seen import GIVEN
from rowtune.cost.state import Stateful
from rowtune.cost.table import Key, Option, Table
from rowtune.errors import ModelError, UsageError
from rowtune.graph.training import with_loss
from rowtune.plan.choices import Store
from rowtune.plan.plan import Plan, Segment
from rowtune.problem import TensorSpec
from rowtune.tune.savers import ON_HOST, SAVERS, of_segments
from rowtune.tune.step import Workload, plain_graph

WAYS = ("plain", "checkpointing", "rowtune")
WITH_HOST = "rowtune + host"
"""The fourth way: what plans keep, and gradients that wait, may be in the host's memory."""
AXES = {"N": 0, "H": -2, "W": -1, "D": -3, "L": -1}
"""Letters for the dimensions of an input: batch, height, width, depth, length."""
GRAIN = 32
"""Spatial sizes are multiples of this many (of the size asked for, where that is none)."""
SECONDS, LOOK, PEEK = 10.0, 120.0, 2.0
"""Of the processor, a way: recording plans at the size asked for, and at all others; for peaks alone."""
TRIES, LARGEST = 8, 1 << 20
"""Sizes tried for one way; no size is larger than that many times."""
FAR, GLIMPSE = 2.0, 0.125
"""At a size so many times longer than any that was looked at, which share of the seconds that are left is
spent: halos were more of a band, and the next guess will be elsewhere."""
WORTH = 1.1
"""To know that a plan takes a size so many times longer it is recorded once more, even if time is up."""
SHARED = 1 << 16
"""Bytes that lists of calls may take on top of what is predicted: small tensors that bands share."""
MAY = {
    "checkpointing": frozenset({"checkpoint", "turns"}),
    "rowtune": frozenset(SAVERS) - ON_HOST,
    WITH_HOST: frozenset(SAVERS),
}
"""The savers of each way."""


class Found(NamedTuple):
    """The plan that takes least at a size, the fastest within the limit (None: none is), and the options that
    make up the one that takes least: where to begin at another size."""

    peak_bytes: int
    plan: Plan | None
    seconds: float | None
    least: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Fit:
    """What one way takes at the size asked for, and the largest size within the limit: the number of
    elements along each scaled dimension (None: not even the smallest), and what it takes there."""

    way: str
    here: Found
    largest: tuple[int, ...] | None
    there: Found | None


def fit(
    work: Workload,
    limit: int,
    over: str,
    profile: Profile | None = None,
    watch: Callable[[str], None] = lambda _: None,
    seconds: float = LOOK,
    host_bytes: int = 0,
) -> list[Fit]:
    """Each way at the workload's own size, and how large it could be.

    Args:
        limit: bytes that a step may take.
        over: dimensions that are scaled together, as in "H,W" or "N".
        profile: of the device that times are for.
        seconds: of the processor that each way may be looked for at sizes other than its own, about.
        host_bytes: that plans may keep on the host; if any, a fourth way does.

    Raises:
        UsageError: the inputs have no such dimensions.
    """
    found: dict[str, Fit] = {}
    for way in (*WAYS, *((WITH_HOST,) if host_bytes else ())):
        found[way] = fit_way(work, limit, over, way, profile, watch, seconds, host_bytes)
    for way, other in zip(list(found)[2:], list(found)[1:], strict=False):
        found[way] = _at_least(found[way], found[other])
    return list(found.values())


def fit_way(
    work: Workload,
    limit: int,
    over: str,
    way: str,
    profile: Profile | None = None,
    watch: Callable[[str], None] = lambda _: None,
    seconds: float = LOOK,
    host_bytes: int = 0,
) -> Fit:
    """One way by itself; see `fit`."""
    sizes = _Sizes(work, over)
    search = _Search(work, sizes, way, limit, profile, host_bytes, seconds, watch)
    here = search.at(sizes.own)
    assert here is not None, "the size asked for was traced before"
    return Fit(way, here, *(search.largest(here) or (None, None)))


def _at_least(ours: Fit, other: Fit) -> Fit:
    """Plans of one way are plans of the next as well (checkpoints of rowtune's, say): where the time for
    recording was too short to find anything smaller, they are those."""
    here = min(ours.here, other.here, key=lambda found: found.peak_bytes)
    better = max(ours, other, key=lambda one: math.prod(one.largest or (0,)))
    return Fit(ours.way, here, better.largest, better.there)


def least_peaks(work: Workload, seconds: float = PEEK) -> dict[str, int]:
    """The predicted peak of the smallest plan of each way, in bytes, at the workload's own size. `seconds`
    of the processor are how long plans of one way are recorded, about: in more a smaller one may be found."""
    plain, checkpointing, ours = (
        _found(Table(work.graph), work.optimizer, way, 0, None, seconds).peak_bytes for way in WAYS
    )
    return {"plain": plain, "checkpointing": checkpointing, "rowtune": min(ours, checkpointing)}


def resized(work: Workload, over: str, lengths: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    """The inputs with these lengths along the dimensions `over`."""
    sizes = _Sizes(work, over)
    return sizes.at(lengths[0] // (sizes.grain * sizes.unit[0]))


class _Sizes:
    """Sizes of the inputs as multiples `k` of a step of the scaled dimensions."""

    def __init__(self, work: Workload, over: str) -> None:
        names = [name.strip().upper() for name in over.split(",") if name.strip()]
        shape = work.problem.inputs[0].shape
        for name in names or [over]:
            axis = AXES.get(name)
            if axis is None or (axis < 0 and len(shape) + axis < 2):  # batch and channels come first
                raise UsageError(
                    f"--over names dimensions of the inputs to grow together, such as H,W or N or D; "
                    f"{name!r} is none of an input of shape {'x'.join(map(str, shape))}"
                )
        self.names = names
        self.specs = work.problem.inputs
        self.axes = [AXES[name] for name in names]
        grain = 1 if 0 in self.axes else GRAIN
        lengths = [shape[axis] for axis in self.axes]
        whole = math.gcd(*lengths)
        self.grain = whole if whole % grain else grain
        self.unit = [length // math.gcd(*lengths) for length in lengths]
        self.own = whole // self.grain

    def lengths(self, k: int) -> tuple[int, ...]:
        """Elements along each scaled dimension."""
        return tuple(k * self.grain * unit for unit in self.unit)

    def text(self, k: int) -> str:
        return "x".join(map(str, self.lengths(k)))

    def at(self, k: int) -> tuple[TensorSpec, ...]:
        found = []
        for spec in self.specs:
            shape = list(spec.shape)
            for axis, length in zip(self.axes, self.lengths(k), strict=True):
                if len(shape) >= len(self.specs[0].shape):
                    shape[axis] = length
            found.append(replace(spec, shape=tuple(shape)))
        return tuple(found)


class _Search:
    """For the largest size of one way: what is known of sizes, and the seconds that are left."""

    def __init__(
        self,
        work: Workload,
        sizes: _Sizes,
        way: str,
        limit: int,
        profile: Profile | None,
        host_bytes: int,
        seconds: float,
        watch: Callable[[str], None],
    ) -> None:
        self.work, self.sizes, self.way, self.limit = work, sizes, way, limit
        self.profile, self.host_bytes, self.left, self.watch = profile, host_bytes, seconds, watch

    def at(self, k: int, begin: tuple[Key, ...] = (), share: float = 1.0) -> Found | None:
        """None where the model does not take this size. The options `begin` are looked at first, `share` is
        how much of the time that is left is spent, but for what it takes to record the plan that is found at
        one more size."""
        work, sizes = self.work, self.sizes
        self.watch(f"{self.way}: {sizes.text(k)}")
        own = k == sizes.own
        try:
            graph = work.graph if own else with_loss(plain_graph(work.module, sizes.at(k)), work.loss)
        except ModelError:
            return None
        table = Table(graph)
        if self.way == WITH_HOST:
            table = Table(graph, whole={"waiting_gradients": "host"}, host_bytes=self.host_bytes)
        began = time.process_time()
        seconds = SECONDS if own else share * self.left
        found = _found(table, work.optimizer, self.way, self.limit, self.profile, seconds, begin)
        if not own:
            self.left = max(self.left - (time.process_time() - began), 0.0)
        return found

    def largest(self, here: Found) -> tuple[tuple[int, ...], Found] | None:
        """Up by what takes least for its size, as far as that is known; between a size that is within the
        limit and one that is not by secants; until those meet, or time is up."""
        sizes, limit = self.sizes, self.limit
        known, refused = {sizes.own: here}, LARGEST
        last, glimpsed = sizes.own, set[int]()
        for _ in range(TRIES):
            within = {k: f.peak_bytes for k, f in known.items() if f.peak_bytes <= limit}
            # What was looked at for a moment may well be within the limit after all.
            beyond = {k: f.peak_bytes for k, f in known.items() if k not in {*within, *glimpsed}}
            low, high = max(within, default=0), min(refused, *beyond, LARGEST)
            if within and beyond:
                k = self._between((low, within[low]), (high, beyond.get(high, limit)))
            else:
                k = self._beside(last, known[last].peak_bytes)
            k = min(max(k, low + 1), high - 1)
            late = low == last and not self.left and k < WORTH * low
            if late or k - low < max(low // 32, 1):
                break
            near = min(known, key=lambda n: abs(math.log(n / k)))
            glimpse = k > FAR * near
            made = self.at(k, known[near].least, GLIMPSE if glimpse else 1.0)
            (glimpsed.add if glimpse else glimpsed.discard)(k)
            if made is None:
                refused = min(refused, k)
            else:
                known[k], last = made, k
        low = max((k for k, f in known.items() if f.peak_bytes <= limit), default=0)
        return (sizes.lengths(low), known[low]) if low else None

    def _beside(self, k: int, peak: int) -> int:
        """Where a line through the peak at one size and what is there at any size (parameters and the
        optimizer's state) meets the limit. Upwards it lies above the peaks: rows that bands share are less of
        larger images, and gradients of parameters do not grow."""
        graph, axes = self.work.graph, len(self.sizes.axes)
        batch = sum(v.bytes for v in graph.values.values() if v.kind in GIVEN)
        always = fixed_bytes(graph, self.work.optimizer) - batch
        share = max(self.limit - always, 0) / max(peak - always, 1)
        return max(1, int(k * share ** (1 / axes)))

    def _between(self, low: tuple[int, int], high: tuple[int, int]) -> int:
        """Where a line through the peaks at two sizes meets the limit."""
        axes, ((a, least), (b, most)) = len(self.sizes.axes), (low, high)
        share = (self.limit - least) / max(most - least, 1)
        return max(1, int((a**axes + share * (b**axes - a**axes)) ** (1 / axes)))


def _found(
    table: Table,
    optimizer: Stateful,
    way: str,
    limit: int,
    profile: Profile | None,
    seconds: float,
    begin: tuple[Key, ...] = (),
) -> Found:
    """The plan that takes least, and the fastest within the limit: half the time for each, all of it for the
    first where there are options to begin with."""
    if profile is not None:
        table.price(profile)
    if way == "plain":
        return _plain(table, optimizer, limit, profile)
    stores: tuple[Store, ...] = ("host", "device") if way == WITH_HOST else ("device",)

    def may(segments: Iterable[Segment]) -> bool:
        return of_segments(segments) <= MAY[way]

    def allowed(option: Option) -> bool:
        return may(option.segments)

    # The processor's, so that what is found does not hang on what else the machine does.
    until = time.process_time() + seconds
    leave = 0.0 if begin else seconds / 2
    descend(table, lambda: until - leave - time.process_time(), may, begin, stores, again=1 if begin else 0)
    others = chain(offloaded(table), shelved(table)) if way == WITH_HOST else ()
    coarse = first(table) if not begin or way == "checkpointing" else ()
    for key in takewhile(lambda _: time.process_time() < until, chain(others, coarse)):
        if may(key[2]):
            table.add([key], math.inf)
    leanest = descend(table, lambda: 0.0, may)
    fixed = fixed_bytes(table.graph, optimizer)
    spare = 0 if way == "checkpointing" else SHARED
    path: Path | None = fastest(table, limit - fixed - spare, allowed)
    return Found(
        leanest.peak + fixed,
        None if path is None else plan_of(table, path),
        None if path is None else path.seconds,
        tuple((o.start, o.stop, o.segments) for o in leanest.options),
    )


def _plain(table: Table, optimizer: Stateful, limit: int, profile: Profile | None) -> Found:
    last = len(table.cuts) - 1
    plan = Plan((table.segment(0, table.cuts[last], "keep"),), table.axis)
    cost = predict(table.graph, plan, optimizer, profile)
    fits = cost.peak_bytes <= limit
    return Found(cost.peak_bytes, plan if fits else None, cost.seconds if fits else None)
