"""Will it fit, and how large could it be: predicted in seconds, on tensors without data.

Three ways to train are compared: plain PyTorch, the best checkpointing there is (the exact programme over
keep and checkpoint segments, recursive ones included), and every plan of rowtune's. Peaks grow nearly in
proportion to the size, so a few sizes find the largest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from rowtune.cost.candidates import HEIGHTS, LATE, NARROW, ROWS, first
from rowtune.cost.predict import fixed_bytes, predict
from rowtune.cost.profile import Profile
from rowtune.cost.programme import Path, fastest, plan_of, smallest
from rowtune.cost.state import Stateful
from rowtune.cost.table import Key, Option, Table, within
from rowtune.errors import ModelError, UsageError
from rowtune.graph.places import has_barriers
from rowtune.graph.training import with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.problem import TensorSpec
from rowtune.tune.savers import of_segments
from rowtune.tune.step import Workload, plain_graph

WAYS = ("plain", "checkpointing", "rowtune")
AXES = {"N": 0, "H": -2, "W": -1, "D": -3, "L": -1}
"""Letters for the dimensions of an input: batch, height, width, depth, length."""
GRAIN = 32
"""Spatial sizes are multiples of this many (of the size asked for, where that is none)."""
SECONDS, LATER, PEEK, TRIES, LARGEST = 10.0, 4.0, 2.0, 6, 1 << 20
"""Of recording plans at the size asked for, at another, and for peaks alone; sizes tried for one way; no size
is larger than that many times."""


SHARED = 1 << 16
"""Bytes that lists of calls may take on top of what is predicted: small tensors that bands share."""
CHECKPOINTING = frozenset({"checkpoint", "turns"})
"""Savers of what is called checkpointing here."""


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
) -> list[Fit]:
    """Each way at the workload's own size, and how large it could be.

    Args:
        limit: bytes that a step may take.
        over: dimensions that are scaled together, as in "H,W" or "N".
        profile: of the device that times are for.

    Raises:
        UsageError: the inputs have no such dimensions.
    """
    sizes = _Sizes(work, over)
    found = []
    for way in WAYS:
        watch(f"{way}: {sizes.text(sizes.own)}")
        here = _at(work, sizes.own, sizes, way, limit, profile)
        assert here is not None, "the size asked for was traced before"
        largest = _largest(work, sizes, way, limit, here, profile, watch)
        found.append(Fit(way, here, *(largest or (None, None))))
    plain, checkpointing, ours = found
    return [plain, checkpointing, _at_least(ours, checkpointing)]


def _at_least(ours: Fit, checkpointing: Fit) -> Fit:
    """Rowtune's plans may be checkpoints alone: where the time for recording was too short to find anything
    smaller, they are those."""
    here = min(ours.here, checkpointing.here, key=lambda found: found.peak_bytes)
    better = max(ours, checkpointing, key=lambda one: math.prod(one.largest or (0,)))
    return Fit(ours.way, here, better.largest, better.there)


def least_peaks(work: Workload, seconds: float = PEEK) -> dict[str, int]:
    """The predicted peak of the smallest plan of each way, in bytes, at the workload's own size. `seconds`
    are how long plans of one way are recorded, at most: with more of them a smaller one may be found."""
    optimizer = work.optimizer
    plain, checkpointing, ours = (
        _found(Table(work.graph), optimizer, way, 0, None, seconds).peak_bytes for way in WAYS
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


def _at(
    work: Workload,
    k: int,
    sizes: _Sizes,
    way: str,
    limit: int,
    profile: Profile | None,
    begin: tuple[Key, ...] = (),
) -> Found | None:
    """None where the model does not take this size. The options `begin` are looked at first."""
    try:
        graph = work.graph if k == sizes.own else with_loss(plain_graph(work.module, sizes.at(k)), work.loss)
    except ModelError:
        return None
    seconds = SECONDS if k == sizes.own else LATER
    return _found(Table(graph), work.optimizer, way, limit, profile, seconds, begin)


def _found(
    table: Table,
    optimizer: Stateful,
    way: str,
    limit: int,
    profile: Profile | None,
    seconds: float,
    begin: tuple[Key, ...] = (),
) -> Found:
    graph = table.graph
    if profile is not None:
        table.price(profile)
    if way == "plain":
        last = len(table.cuts) - 1
        plan = Plan((table.segment(0, table.cuts[last], "keep"),), table.axis)
        cost = predict(graph, plan, optimizer, profile)
        fits = cost.peak_bytes <= limit
        return Found(cost.peak_bytes, plan if fits else None, cost.seconds if fits else None)
    fixed = fixed_bytes(graph, optimizer)

    def may(segments: Iterable[Segment]) -> bool:
        return way == "rowtune" or of_segments(segments) <= CHECKPOINTING

    def allowed(option: Option) -> bool:
        return may(option.segments)

    keys = (key for key in _options(table) if may(key[2]))
    table.add([table.keep(k, k + 1) for k in range(len(table.cuts) - 1)], math.inf)
    table.add(begin, math.inf)
    table.add(keys, within(seconds))
    least = smallest(table, allowed)
    assert least is not None, "to keep everything is always an option"
    leanest = fastest(table, least, allowed)
    spare = SHARED if way == "rowtune" else 0
    path: Path | None = fastest(table, limit - fixed - spare, allowed)
    return Found(
        least + fixed,
        None if path is None else plan_of(table, path),
        None if path is None else path.seconds,
        tuple((o.start, o.stop, o.segments) for o in leanest.options) if leanest else (),
    )


def _options(table: Table) -> Iterator[Key]:
    """What takes least first: it decides how large an input may be."""
    last = len(table.cuts) - 1
    for k in range(last):
        yield table.checkpoint(k, k + 1)
    barriers = has_barriers(table.graph, table.axis)
    for height in HEIGHTS[2:4]:
        for kind in (LATE, ROWS) if not barriers else (ROWS,):
            if (key := table.rows(0, last, replace(kind, band_rows=height))) is not None:
                yield key
    for k in range(last if barriers else 0):
        for length in (1, 2):
            if k + length <= last:
                key = table.rows(k, k + length, replace(NARROW, band_rows=16))
                if key is not None:
                    yield key
    yield from first(table)


def _largest(
    work: Workload,
    sizes: _Sizes,
    way: str,
    limit: int,
    here: Found,
    profile: Profile | None,
    watch: Callable[[str], None],
) -> tuple[tuple[int, ...], Found] | None:
    """By secants of the peak over the size's volume, then step by step where those do not meet the limit."""
    known: dict[int, Found | None] = {sizes.own: here}
    low, high, k = 0, LARGEST, sizes.own
    for _ in range(TRIES):
        if k not in known:
            watch(f"{way}: {sizes.text(k)}")
            near = min((f for f in known.values() if f is not None), key=lambda f: f.peak_bytes)
            known[k] = _at(work, k, sizes, way, limit, profile, near.least)
        found = known[k]
        if found is not None and found.peak_bytes <= limit:
            low = max(low, k)
        else:
            high = min(high, k)
        if high - low <= max(low // 32, 1):
            break
        peaks = {n: f.peak_bytes for n, f in known.items() if f is not None}
        k = min(max(_guess(peaks, limit, len(sizes.axes)), low + 1), high - 1)
    best = known.get(low)
    return (sizes.lengths(low), best) if low and best is not None else None


def _guess(peaks: dict[int, int], limit: int, axes: int) -> int:
    """Where a line through the two peaks next to the limit, over k to the power of `axes`, meets it."""
    nearest = sorted(peaks, key=lambda n: abs(math.log(peaks[n] / limit)))[:2]
    if len(nearest) == 1:
        k = nearest[0]
        return max(1, int(k * (limit / peaks[k]) ** (1 / axes)))
    (a, b) = nearest
    rise = (peaks[b] - peaks[a]) / (b**axes - a**axes)
    if rise <= 0:
        return max(a, b) * 2
    volume = a**axes + (limit - peaks[a]) / rise
    return max(1, int(max(volume, 1.0) ** (1 / axes)))
