"""Which options the programme may choose from: first a coarse set, then those around what it chose.

All pairs of cuts, band heights, schedules, tapes and barriers together are too many to record. So the table
grows where the programme looks, as in column generation: neighbours in every one of these directions of the
options on its fastest paths, until they bring nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rowtune.cost.programme import Path
from rowtune.cost.table import Key, Option, Table
from rowtune.graph.bands import banding
from rowtune.graph.places import has_barriers
from rowtune.plan.choices import Store
from rowtune.plan.plan import Segment

HEIGHTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
ALL_ROWS = 1 << 30
COARSE = (32, 128, 8)
"""Band heights of the first options."""
TOGETHER = 4
"""Stretches between cuts that the first options recompute together, at most."""

ROUNDING: tuple[Store, ...] = ("fp16", "int8")
"""Stores that round and are tried."""

ROWS = Segment("", "", "rows", 32, "sweep", tapes="replay")
SPLIT = replace(ROWS, tapes="split")
LATE = replace(ROWS, tapes="late")
AGAIN = replace(ROWS, halo="recompute", tapes="split", barriers="recompute")
NARROW = replace(AGAIN, barriers="narrow")
PASSES = replace(SPLIT, barriers="passes")


def heights(table: Table) -> list[int]:
    """Band heights that differ on this graph."""
    bands = banding(table.graph, table.axis)
    tallest = max([bands.height(table.graph.values[n.name]) for n in table.graph.nodes] + [2])
    return [h for h in HEIGHTS if h < tallest]


def levels(table: Table) -> list[int]:
    """Cuts behind which the height of what is made changes, with the first and the last."""
    bands, nodes, last = banding(table.graph, table.axis), table.graph.nodes, len(table.cuts) - 1
    tall = [bands.height(table.graph.values[nodes[cut - 1].name]) for cut in table.cuts[1:]]
    return [0, *(k for k in range(1, last) if tall[k - 1] != tall[k]), last]


def batch(table: Table) -> int:
    """Images in a batch."""
    values, inputs = table.graph.values, table.graph.inputs
    return max((values[i].shape[0] for i in inputs if values[i].shape), default=1)


def first(table: Table) -> Iterator[Key]:
    """The coarse set, what matters most first."""
    last = len(table.cuts) - 1
    fit = [h for h in COARSE if h in heights(table)]
    barriers = has_barriers(table.graph, table.axis)
    for k in range(last):
        yield table.keep(k, k + 1)
    yield table.keep(0, last, cheap="recompute")
    for k in range(last):
        yield table.keep(k, k + 1, cheap="recompute")
    for k in range(last):
        yield table.checkpoint(k, k + 1)
    kinds = (ROWS, SPLIT, AGAIN, NARROW) if barriers else (ROWS, SPLIT, LATE)
    for height in fit:
        for kind in kinds[: 2 if barriers else 3]:
            yield from _rows(table, 0, last, replace(kind, band_rows=height))
    for length in range(2, TOGETHER + 1):
        for k in range(last - length + 1):
            yield table.keep(k, k + length, cheap="recompute")
            yield table.checkpoint(k, k + length)
            yield table.turns(k, k + length, Segment("", "", "checkpoint"))
    if barriers:
        yield from _between_barriers(table, fit)
    for height in fit[:2]:
        for k in range(1, last):
            for start, stop in ((0, k), (k, last)):
                yield from _rows(table, start, stop, replace(ROWS, band_rows=height))
    if batch(table) > 1:
        for images in (1, batch(table) // 2):
            whole = Segment("", "", "rows", 0, "sweep", images, "whole")
            yield from _rows(table, 0, last, whole)


def offloaded(table: Table) -> Iterator[Key]:
    """What is kept from cut to cut, and what checkpoints keep, on the host meanwhile."""
    last = len(table.cuts) - 1
    for k in range(last):
        yield table.keep(k, k + 1, "host")
        yield table.keep(k, k + 1, "host", "recompute")
    for length in range(1, TOGETHER + 1):
        for k in range(last - length + 1):
            yield table.checkpoint(k, k + length, 0, "host")


def shelved(table: Table) -> Iterator[Key]:
    """Rows segments whose inputs wait on the host, and come back a band at a time: stretches between places
    where the height changes, one or two, so that high ones with few weights stand apart from those below."""
    ends, fit = levels(table), [h for h in COARSE if h in heights(table)]
    for many in (1, 2):
        for start, stop in zip(ends, ends[many:], strict=False):
            for height in fit[:2]:
                yield from _rows(table, start, stop, replace(ROWS, band_rows=height, store="host"))


def rounded(table: Table) -> Iterator[Key]:
    """What is kept from cut to cut, rounded meanwhile."""
    for store in ROUNDING:
        for k in range(len(table.cuts) - 1):
            yield table.keep(k, k + 1, store, "recompute")


def _between_barriers(table: Table, fit: Sequence[int]) -> Iterator[Key]:
    """Short stretches whose barriers are made again, banded or in turns, and one by one with stored ones."""
    last = len(table.cuts) - 1
    for length in (1, 2, 3):
        for k in range(last - length + 1):
            for height in fit[:2]:
                yield from _rows(table, k, k + length, replace(NARROW, band_rows=height))
                if length == 1:
                    yield from _rows(table, k, k + 1, replace(ROWS, band_rows=height))
            if length > 1:
                yield table.turns(k, k + length, replace(AGAIN, band_rows=ALL_ROWS))


def _rows(table: Table, start: int, stop: int, like: Segment) -> Iterator[Key]:
    found = table.rows(start, stop, like)
    if found is not None:
        yield found


def around(table: Table, paths: Iterable[Path]) -> Iterator[Key]:
    """Neighbours of the options of some paths."""
    seen: set[Option] = set()
    for path in paths:
        for at, option in enumerate(path.options):
            if option in seen:
                continue
            seen.add(option)
            yield from _variants(table, option)
            yield from _moved(table, option)
            if at + 1 < len(path.options):
                yield from _joined(table, option, path.options[at + 1])


def _variants(table: Table, option: Option) -> Iterator[Key]:
    """The same stretch, another way."""
    main, start, stop = option.main, option.start, option.stop
    if main.policy == "checkpoint":
        yield from _less(table, start, stop)
    if main.policy != "rows" or not main.band_rows:
        yield from _rows(table, start, stop, ROWS)
        return
    if main.store != "device":
        yield from _rows(table, start, stop, replace(main, store="device"))
    fit = heights(table)
    near = [h for h in fit if main.band_rows // 2 <= h <= 2 * main.band_rows or h in (fit[-1],)]
    for height in near:
        yield from _rows(table, start, stop, replace(main, band_rows=height))
    if main.halo == "sweep":
        for tapes in ("replay", "split", "late", "whole"):
            yield from _rows(table, start, stop, replace(main, tapes=tapes))
    for halo in ("sweep", "recompute", "cache"):
        if halo != "cache" or main.barriers == "store":
            yield from _rows(table, start, stop, replace(main, halo=halo, tapes="split"))
    if has_barriers(table.graph, table.axis):
        for barriers in ("store", "recompute", "narrow"):
            yield from _rows(table, start, stop, replace(main, barriers=barriers))
    many = batch(table)
    for images in {1, 2, many // 2} if many > 1 else ():
        if images:
            yield from _rows(table, start, stop, replace(main, images=images))


def _less(table: Table, start: int, stop: int) -> Iterator[Key]:
    """What takes less than a checkpoint."""
    if stop - start > 1:
        yield table.turns(start, stop, Segment("", "", "checkpoint"))
        yield table.turns(start, stop, replace(AGAIN, band_rows=ALL_ROWS))
    kinds = (NARROW, AGAIN, PASSES) if has_barriers(table.graph, table.axis) else (ROWS,)
    for kind in kinds:
        yield from _rows(table, start, stop, kind)


def _moved(table: Table, option: Option) -> Iterator[Key]:
    """The same way, ending or beginning at the next cut."""
    last, main = len(table.cuts) - 1, option.main
    for start, stop in (
        (option.start, option.stop + 1), (option.start, option.stop - 1),
        (option.start + 1, option.stop), (option.start - 1, option.stop),
    ):  # fmt: skip
        if not 0 <= start < stop <= last:
            continue
        if main.policy == "rows":
            yield from _rows(table, start, stop, main)
        elif main.policy == "checkpoint" and not main.inside:
            yield table.checkpoint(start, stop, main.images, main.store)
        elif main.cheap == "recompute":
            yield table.keep(start, stop, main.store, main.cheap)


def _joined(table: Table, one: Option, other: Option) -> Iterator[Key]:
    """Two neighbours as one, each in the other's way."""
    for main in (one.main, other.main):
        if main.policy == "rows":
            yield from _rows(table, one.start, other.stop, main)
        elif main.policy == "checkpoint":
            yield table.checkpoint(one.start, other.stop, 0, main.store)
            yield table.turns(one.start, other.stop, Segment("", "", "checkpoint"))
        elif main.cheap == "recompute":
            yield table.keep(one.start, other.stop, main.store, main.cheap)
