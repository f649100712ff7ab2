"""Frontiers: how far each group is after each band, forward and backward.

After band r the segment's outputs stand at the band's end; every other group stands where its readers need
it (docs/sweep.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from rowtune.plan.groups import Group
from rowtune.rows import Rows, band_ends


@dataclass(frozen=True)
class Frontiers:
    """`ends[r][g]`: rows of group g made by the end of band r. `ideal[r][g]`: rows of g whose gradient is
    complete then, if all its readers are as far as theirs allow. `value_heights`: rows of each output."""

    ends: tuple[tuple[int, ...], ...]
    ideal: tuple[tuple[int, ...], ...]
    readers: dict[str, tuple[int, ...]]


def height_of(group: Group) -> int:
    return max(group.heights[o] for o in group.outputs)


def frontiers(groups: list[Group], outputs: frozenset[str], band_rows: int) -> Frontiers:
    """Groups with one output each (a sweep or a cache schedule).

    Args:
        groups: in topological order.
        outputs: values that the segment hands on, whole or reduced.
        band_rows: rows of the tallest output in one band.
    """
    readers = readers_of(groups)
    tops = [i for i, g in enumerate(groups) if is_output(g, outputs, readers)]
    tallest = max(height_of(groups[i]) for i in tops)
    bands = -(-tallest // band_rows)
    planned = {i: band_ends(height_of(groups[i]), bands, tallest, band_rows) for i in tops}
    ends: list[tuple[int, ...]] = []
    for r in range(bands):
        made = _forward(groups, {i: planned[i][r] for i in tops}, last=r == bands - 1)
        if [made] != ends[-1:]:  # a tall output can be ahead already, for a low one's sake: no band then
            ends.append(made)
    final = ends[-1]
    ideal = [_backward(groups, readers, reached, final) for reached in ends]
    return Frontiers(tuple(ends), tuple(ideal), readers)


def readers_of(groups: list[Group]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        for name in group.reads:
            found.setdefault(name, []).append(i)
    return {name: tuple(who) for name, who in found.items()}


def is_output(group: Group, outputs: frozenset[str], readers: dict[str, tuple[int, ...]]) -> bool:
    return any(o in outputs for o in group.outputs)


def _forward(groups: list[Group], tops: dict[int, int], last: bool) -> tuple[int, ...]:
    wanted: dict[str, int] = {}
    made = [0] * len(groups)
    for i in range(len(groups) - 1, -1, -1):
        group = groups[i]
        ends = {o: max(wanted.get(o, 0), tops.get(i, 0)) for o in group.outputs}
        made[i] = min(-(-max(ends.values()) // group.grain) * group.grain, height_of(group))
        for name, hi in group.hi(dict.fromkeys(group.outputs, made[i])).items():
            wanted[name] = max(wanted.get(name, 0), hi)
    return tuple(made)


def gradient_end(group: Group, readers: dict[str, tuple[int, ...]], groups: list[Group],
                 done: list[int], final: tuple[int, ...], own_end: int) -> int:  # fmt: skip
    """Rows of the group's outputs whose gradient is complete when each reader's tapes have run up to
    `done`, and that of all rows made with them; an output without readers is bounded by `own_end`."""
    ready = own_end
    for output in group.outputs:
        for c in readers.get(output, ()):
            starts = {o: done[c] if done[c] < final[c] else groups[c].heights[o] for o in groups[c].outputs}
            ready = min(ready, groups[c].lo(starts)[output])
    return ready if ready >= height_of(group) else ready - ready % group.grain


def _backward(groups: list[Group], readers: dict[str, tuple[int, ...]], ends: tuple[int, ...],
              final: tuple[int, ...]) -> tuple[int, ...]:  # fmt: skip
    done = list(ends)
    for i in range(len(groups) - 1, -1, -1):
        done[i] = gradient_end(groups[i], readers, groups, done, final, ends[i])
    return tuple(done)


def keep_from(groups: list[Group], readers: dict[str, tuple[int, ...]], ends: tuple[int, ...],
              final: tuple[int, ...]) -> dict[str, Rows]:  # fmt: skip
    """Rows of each group's output that later bands still read, after all groups stand at `ends`."""
    kept: dict[str, Rows] = {}
    for i, group in enumerate(groups):
        for output in group.outputs:
            lo = ends[i]
            for c in readers.get(output, ()):
                starts = {
                    o: ends[c] if ends[c] < final[c] else groups[c].heights[o] for o in groups[c].outputs
                }
                lo = min(lo, groups[c].lo(starts)[output])
            kept[output] = Rows(min(lo, ends[i]), ends[i])
    return kept
