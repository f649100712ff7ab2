"""Plans of every kind for tests: knobs, drawn at random or set by hand, and the plan that follows from them.

The network is divided at two cuts into three zones; each zone has a policy and a band height, and a few knobs
hold for all. The tuple of knobs and their choices depend on the graph alone, so they are the same in every
trial of a study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from rowtune.graph.bands import banding
from rowtune.graph.cuts import is_local, legal_cut, why_not
from rowtune.graph.graph import Graph
from rowtune.graph.places import bandable, candidate_cuts, has_barriers, is_split
from rowtune.graph.replay import reads_output
from rowtune.plan.plan import Plan, Segment

Setting = dict[str, str | int]

ZONES = ("front", "middle", "back")
_SEGMENT = Segment("", "", "rows")
ROWS = {
    "rows/sweep": _SEGMENT,
    "rows/cache": replace(_SEGMENT, halo="cache"),
    "rows/recompute": replace(_SEGMENT, halo="recompute"),
}
"""Policies of a zone that take rows, and their segments but for names and numbers."""
BARRIERS = {
    "rows/again": replace(_SEGMENT, halo="recompute", barriers="recompute"),
    "rows/narrow": replace(_SEGMENT, halo="recompute", barriers="narrow"),
    "rows/passes": replace(_SEGMENT, barriers="passes"),
}
"""For networks with barriers: the tensors there made again, or never, or the wide ones never. From one
barrier to the next the halo is small."""
ROWS |= BARRIERS
BANDS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
ALL_ROWS = 1 << 30
CUTS = 20
REGIONS = (1, 2, 3, 4)
"""Stretches between cuts that are recomputed together."""
TURNS = ("no", "yes")
"""Whether these stretches are recomputed once more, each on its own, when its turn in backward comes."""


@dataclass(frozen=True)
class Knob:
    name: str
    choices: tuple[str | int, ...]


@dataclass(frozen=True)
class _Regions:
    every: int
    turns: bool


@dataclass(frozen=True)
class PlanSpace:
    graph: Graph
    axis: int
    cuts: tuple[int, ...]
    knobs: tuple[Knob, ...]

    def plan(self, values: Mapping[str, str | int]) -> Plan:
        """The plan of one setting. Zones may be empty; neighbours alike in every respect are one segment."""
        n = len(self.graph.nodes)
        first, second = sorted((int(values["cut1"]), int(values["cut2"])))
        segments: list[Segment] = []
        for zone, start, stop in zip(ZONES, (0, first, second), (first, second, n), strict=True):
            if start < stop:
                segments += self._zone(values, zone, start, stop)
        return Plan(tuple(self._merged(segments)), self.axis)

    def _zone(self, values: Mapping[str, str | int], zone: str, start: int, stop: int) -> list[Segment]:
        policy, images = str(values[zone]), int(values.get("images", 0))
        regions = _Regions(int(values["regions"]), values["turns"] == "yes")
        if policy == "keep":
            return [self._segment(start, stop, "keep")]
        if policy == "checkpoint":
            return self._recomputed(start, stop, regions, lambda a, b: self._checkpoint(a, b, images))
        if policy == "images":  # micro-batches: bands of images alone
            rows = Segment("", "", "rows", 0, "sweep", images or 1, "whole")
            return self._rows(start, stop, 0, rows, regions)
        rows = replace(
            ROWS[policy],
            band_rows=int(values[f"{zone}_band"]),
            images=images,
            tapes=values.get("tapes", "split"),  # type: ignore[arg-type]
        )
        return self._rows(start, stop, self.axis, rows, regions)

    def _rows(self, start: int, stop: int, axis: int, rows: Segment, regions: _Regions) -> list[Segment]:
        """`rows` on every stretch that can be banded, in regions where its barriers are not stored."""

        def like(lo: int, hi: int) -> Segment:
            if why_not(self.graph, lo, hi, axis):  # a region of the loss alone, say
                return self._segment(lo, hi, "keep")
            split = 0 if axis and not is_split(self.graph, lo, hi, axis) else rows.images
            return replace(rows, first=self._name(lo), last=self._name(hi - 1), images=split)

        made: list[Segment] = []
        at = start
        for a, b in bandable(self.graph, start, stop, axis):
            if a > at:
                made.append(self._segment(at, a, "keep"))
            made += [like(a, b)] if rows.barriers == "store" else self._recomputed(a, b, regions, like)
            at = b
        if at < stop:
            made.append(self._segment(at, stop, "keep"))
        return made

    def _recomputed(
        self, start: int, stop: int, regions: _Regions, like: Callable[[int, int], Segment]
    ) -> list[Segment]:
        """Segments `like` these, in regions; in turns, each region is a checkpoint made of its stretches."""
        made = []
        for lo, hi in self._regions(start, stop, regions.every):
            parts = self._regions(lo, hi, 1) if regions.turns else [(lo, hi)]
            inside = [s for a, b in parts for s in self._turn(a, b, b == hi, like)]
            whole = replace(self._segment(lo, hi, "checkpoint"), inside=tuple(inside))
            made.append(whole if len(parts) > 1 else inside[0])
        return made

    def _turn(self, start: int, stop: int, last: bool, like: Callable[[int, int], Segment]) -> list[Segment]:
        """One stretch of a region. A ReLU at its end is kept where its output is made again all the same: the
        gradient behind it need not live then while that in front of it is found."""
        relu = stop - 1
        rows = not last and start < relu and reads_output(self.graph.nodes[relu])
        if rows and legal_cut(self.graph, relu) and like(start, relu).policy == "rows":
            return [like(start, relu), self._segment(relu, stop, "keep")]
        return [like(start, stop)]

    def _checkpoint(self, start: int, stop: int, images: int) -> Segment:
        """Recomputed for some images at a time, where the segment does not mix images."""
        made = self._segment(start, stop, "checkpoint")
        return replace(made, images=images) if images and is_local(self.graph, start, stop, 0) else made

    def _segment(self, start: int, stop: int, policy: str) -> Segment:
        return Segment(self._name(start), self._name(stop - 1), policy)  # type: ignore[arg-type]

    def _name(self, position: int) -> str:
        return self.graph.nodes[position].name

    def _regions(self, start: int, stop: int, every: int) -> list[tuple[int, int]]:
        """Parts of a zone that are recomputed each on its own: from every so many cuts to the next."""
        inside = [c for c in self.cuts if start < c < stop]
        return list(pairwise([start, *inside[every - 1 :: every], stop]))

    def _merged(self, segments: list[Segment]) -> list[Segment]:
        """Two keep or equal rows segments in a row are one, where the union can be banded."""
        out: list[Segment] = []
        for segment in segments:
            if out and self._same(out[-1], segment):
                last = out.pop()
                segment = replace(segment, first=last.first)
            out.append(segment)
        return out

    def _same(self, a: Segment, b: Segment) -> bool:
        if replace(a, first="", last="") != replace(b, first="", last=""):
            return False
        if a.policy == "checkpoint" or (a.policy == "rows" and a.barriers != "store"):
            return False
        start, stop = self.graph.index[a.first], self.graph.index[b.last] + 1
        return a.policy == "keep" or not why_not(self.graph, start, stop, self.axis if a.band_rows else 0)

    # -- warm starts -----------------------------------------------------------------------------------------

    def guesses(self) -> list[Setting]:
        """Good plans to try first: plain, checkpoint, one sweep over everything that can be banded, and rows
        on the memory-heavy front with each halo, the rest kept or checkpointed."""
        n = len(self.graph.nodes)
        found = [self._guess(0, 0, "keep", "keep", "keep"), self._guess(0, 0, "keep", "keep", "checkpoint")]
        found.append(found[-1] | {"regions": 4, "turns": "yes"})
        for band, tapes in ((32, "replay"), (8, "split"), (16, "late"), (128, "replay"), (32, "late")):
            found.append(self._guess(0, 0, "keep", "keep", "rows/sweep", band) | {"tapes": tapes})
        again, narrow, passes = BARRIERS
        if again in self._choices["back"]:
            for band, tapes in ((16, "split"), (32, "late")):
                for policy in (again, narrow, passes):
                    found.append(self._guess(0, 0, "keep", "keep", policy, band) | {"tapes": tapes})
            half, most = self._front(0.5), self._front(0.2)
            found.append(self._guess(half, most, passes, again, "checkpoint", 16))
            for rest in ("keep", "checkpoint"):
                found.append(self._guess(half, most, narrow, again, rest, 32) | {"regions": 2})
            for every in (2, 3):
                turns: Setting = {"regions": every, "turns": "yes"}
                early, late = self._front(0.4), self._front(0.1)
                found.append(self._guess(early, late, again, "checkpoint", "keep", ALL_ROWS) | turns)
            found.append(self._guess(half, half, again, "keep", "checkpoint", 16))
            found.append(self._guess(half, half, "rows/sweep", "keep", "checkpoint", 16))
        if "images" in self._choices["back"]:
            found.append(self._guess(0, 0, "keep", "keep", "images"))
        heavy = self._front(0.2)
        for halo in ("rows/sweep", "rows/cache", "rows/recompute"):
            found.append(self._guess(heavy, n, halo, "keep", "keep", 16))
            found.append(self._guess(self._front(0.4), heavy, halo, halo, "checkpoint", 16))
        for band in (8, 32):
            found.append(self._guess(self._front(0.5), heavy, "rows/sweep", "rows/sweep", "keep", band))
        found.append(self._guess(self._front(0.6), n, "rows/sweep", "checkpoint", "keep", 8))
        unique: list[Setting] = []
        for setting in found:
            if setting not in unique:
                unique.append(setting)
        return unique

    def _front(self, rest: float) -> int:
        """The first cut after which at most `rest` of all activation bytes are made."""
        sizes = [self.graph.values[node.name].bytes for node in self.graph.nodes]
        total, after = sum(sizes), sum(sizes)
        at = 0
        for cut in self.cuts:
            after -= sum(sizes[at:cut])
            at = cut
            if after <= rest * total:
                return cut
        return len(sizes)

    def _guess(self, cut1: int, cut2: int, front: str, middle: str, back: str, band: int = 16) -> Setting:
        made: Setting = {knob.name: knob.choices[0] for knob in self.knobs}
        made |= {"cut1": cut1, "cut2": cut2, "front": front, "middle": middle, "back": back}
        for zone in ZONES:
            choices = [int(c) for c in self._choices[f"{zone}_band"]]
            made[f"{zone}_band"] = min(choices, key=lambda c: abs(c - band))
        return made

    @cached_property
    def _choices(self) -> dict[str, tuple[str | int, ...]]:
        return {knob.name: knob.choices for knob in self.knobs}


def space(graph: Graph, axis: int = 2) -> PlanSpace:
    """The knobs for a training graph (with its loss)."""
    cuts = candidate_cuts(graph, CUTS)
    bands = banding(graph, axis)
    heights = [bands.height(graph.values[n.name]) for n in graph.nodes]
    tallest = max([*heights, 2])
    band_choices: tuple[str | int, ...] = (*(b for b in BANDS if b < tallest), tallest)
    batch = max((graph.values[i].shape[0] for i in graph.inputs if graph.values[i].shape), default=1)
    images: tuple[str | int, ...] = tuple(k for k in (0, 1, 2, 4, 8, 16) if k < batch)
    places: tuple[str | int, ...] = (0, *cuts, len(graph.nodes))
    knobs = [Knob("cut1", places), Knob("cut2", places)]
    barriers = has_barriers(graph, axis)
    policies = [
        "keep",
        "checkpoint",
        *(name for name, rows in ROWS.items() if barriers or rows.barriers == "store"),
    ]
    if len(images) > 1:
        policies.append("images")
    knobs += [Knob(zone, tuple(policies)) for zone in ZONES]
    knobs += [Knob(f"{zone}_band", band_choices) for zone in ZONES]
    knobs += [Knob("tapes", ("split", "late", "whole", "replay")), Knob("regions", REGIONS)]
    knobs.append(Knob("turns", TURNS))
    if len(images) > 1:
        knobs.append(Knob("images", images))
    return PlanSpace(graph, axis, cuts, tuple(knobs))
