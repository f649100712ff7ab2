"""Groups: the nodes that one step runs together, and the rows that flow through them.

A step per operator would drown in launches, so a convolution takes the pointwise operators after it (and a
pool without overlap) along. Inside a group nothing is kept between bands: its nodes run on the rows that the
group's output rows need, halo included. LR-CNN's independent bands (halo=recompute) are the case of one
group for the whole segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from rowtune.graph.bands import Banding
from rowtune.graph.cuts import Stretch
from rowtune.graph.graph import Graph, Node
from rowtune.graph.in_place import overwritten
from rowtune.graph.replay import reads_no_values, reads_output
from rowtune.rows import Affine, Rows, need


@dataclass(frozen=True)
class Replay:
    """How a group's backward graph is made again from line buffers: nodes whose values nobody needs, values
    read of which only the shape matters, and the nodes that start from their own output's rows."""

    unread: frozenset[str]
    blank: frozenset[str]
    known: frozenset[str]


@dataclass(frozen=True)
class Group:
    """`outputs` are read outside the group; `reads` maps each value made outside it to its height (1 where it
    is used whole); parameters are not listed. `last_use[i]` names what node i is the last to read. `in_place`
    names the inputs that nodes write over."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    heights: Mapping[str, int]
    reads: tuple[str, ...]
    last_use: tuple[tuple[str, ...], ...]
    whole: bool
    bands: Banding
    in_place: Mapping[str, str]
    replay: Replay | None = None

    @cached_property
    def grain(self) -> int:
        """Rows of the output that are made together: more than one behind a pixel shuffle, say. (Pointwise
        operators may follow it.)"""
        for node in reversed(self.nodes):
            windows = [r.window for r in self.bands.rule(node.name).reads.values() if r.window is not None]
            if not windows or not all(isinstance(w, Affine) for w in windows):
                return 1
            grain = min(w.grain for w in windows if isinstance(w, Affine))
            if grain > 1 or not all(isinstance(w, Affine) and w.pointwise for w in windows):
                return grain
        return 1

    def ranges(self, wanted: Mapping[str, Rows]) -> dict[str, Rows]:
        """Rows of every value in the group, and of what it reads, for these rows of its outputs."""
        found: dict[str, Rows] = {n: r for n, r in wanted.items() if r.size}
        for node in reversed(self.nodes):
            rows = found.get(node.name)
            if rows is None:
                continue
            for name, read in self.bands.rule(node.name).reads.items():
                if name not in self.heights:
                    continue
                if read.window is None or self.bands.dims[name] is None:
                    got = Rows(0, self.heights[name])
                else:
                    got = need(read.window, *rows)
                old = found.get(name)
                found[name] = got if old is None else _union(old, got)
        return found

    def hi(self, ends: Mapping[str, int]) -> dict[str, int]:
        """For each value read: one past the last row that output rows below `ends` need."""
        found = dict(ends)
        for node in reversed(self.nodes):
            end = found.get(node.name, 0)
            for name, read in self.bands.rule(node.name).reads.items():
                if name in self.heights:
                    whole = read.window is None or self.bands.dims[name] is None
                    got = self.heights[name] * (end > 0) if whole else read.window.hi(end)  # type: ignore[union-attr]
                    found[name] = max(found.get(name, 0), got)
        return {name: found.get(name, 0) for name in self.reads}

    def lo(self, starts: Mapping[str, int]) -> dict[str, int]:
        """For each value read: the first row that output rows from `starts` on need (its height if none)."""
        found = dict(starts)
        for node in reversed(self.nodes):
            start = found.get(node.name, self.heights[node.name])
            for name, read in self.bands.rule(node.name).reads.items():
                if name in self.heights:
                    height = self.heights[name]
                    done = start >= self.heights[node.name]
                    if done:
                        got = height
                    elif read.window is None or self.bands.dims[name] is None:
                        got = 0
                    else:
                        got = read.window.lo(start)
                    found[name] = min(found.get(name, height), got)
        return {name: found.get(name, self.heights[name]) for name in self.reads}


def _union(a: Rows, b: Rows) -> Rows:
    if not a.size:
        return b
    if not b.size:
        return a
    return Rows(min(a.lo, b.lo), max(a.hi, b.hi))


def make_group(graph: Graph, bands: Banding, nodes: tuple[Node, ...], outputs: tuple[str, ...]) -> Group:
    made = {node.name for node in nodes}
    fixed = ("parameter", "buffer", "constant", "norms")
    names = dict.fromkeys(n for node in nodes for n in node.inputs if graph.values[n].kind not in fixed)
    heights = {n: bands.height(graph.values[n]) for n in [*names, *made]}
    last: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in node.inputs:
            last[name] = i
    drops = tuple(
        tuple(n for n, at in last.items() if at == i and n not in outputs) for i in range(len(nodes))
    )
    reads = tuple(n for n in names if n not in made)
    whole = all(bands.dims[n.name] is None and not bands.rule(n.name).reduces for n in nodes)
    return Group(nodes, outputs, heights, reads, drops, whole, bands, overwritten(graph, nodes, outputs))


May = Callable[[Node, list[Node]], bool]


def any_joins(node: Node, group: list[Node]) -> bool:
    return True


def replay_joins(node: Node, group: list[Node]) -> bool:
    """Whether the group's backward graph can be made again without its values (rowtune/graph/replay.py)."""
    return not reads_output(group[-1]) and (reads_no_values(node) or reads_output(node))


def replayed(group: Group) -> Group:
    """The group, with what its backward graph needs."""
    known = {n.name for n in group.nodes if reads_output(n) and n.name in group.outputs}
    needed: set[str] = set()  # values that some backward reads, or that such a value is made from
    for node in reversed(group.nodes):
        if node.name not in known and (node.name in needed or not reads_no_values(node)):
            needed |= set(node.inputs)
    unread = {
        n.name for n in group.nodes if n.name not in needed and group.bands.rule(n.name).unvalued is not None
    }
    blank = frozenset(group.reads) - needed
    return replace(group, replay=Replay(frozenset(unread), blank, frozenset(known)))


def fuse(graph: Graph, bands: Banding, part: Stretch, halos: int = 0, may: May = any_joins) -> list[Group]:
    """Groups of a sweep: each node starts one, or joins the step that makes its only banded input.

    Args:
        halos: how many overlapping windows may join a step; their halo rows are computed twice.
        may: whether a node may join these nodes.
    """
    inside = {node.name for node in part.nodes}
    readers: dict[str, set[str]] = {}
    for node in part.nodes:
        for name in node.inputs:
            readers.setdefault(name, set()).add(node.name)
    free = {n for n in inside if len(readers.get(n, ())) == 1 and n not in part.outputs}
    home: dict[str, int] = {}
    members: list[list[Node]] = []
    spent: list[int] = []
    for node in part.nodes:
        joined = _joins(bands, node, inside, free, home, members)
        if joined is not None and not joined.disjoint and spent[joined.group] >= halos:
            joined = None
        if joined is not None and not may(node, members[joined.group]):
            joined = None
        if joined is None:
            home[node.name] = len(members)
            members.append([node])
            spent.append(0)
        else:
            home[node.name] = joined.group
            members[joined.group].append(node)
            spent[joined.group] += not joined.disjoint
    ordered = _topological(members, home, inside)
    groups = []
    for nodes in ordered:
        own = {n.name for n in nodes}
        outputs = tuple(n.name for n in nodes if n.name in part.outputs or readers.get(n.name, set()) - own)
        groups.append(make_group(graph, bands, tuple(nodes), outputs))
    return groups


class _Joined(NamedTuple):
    group: int
    disjoint: bool


def _joins(
    bands: Banding,
    node: Node,
    inside: set[str],
    free: set[str],
    home: dict[str, int],
    members: list[list[Node]],
) -> _Joined | None:
    """The group that `node` may join: that of its latest producer, if only this node reads it (`free`), and
    whether it reads every row of it once. All other inputs must be made by earlier groups."""
    rule = bands.rule(node.name)
    banded = [n for n in node.inputs if n in inside and bands.dims[n] is not None]
    if not banded or (rule.dim is None and not rule.reduces):
        return None
    latest = max(banded, key=lambda n: home[n])
    target = home[latest]
    if members[target][-1].name != latest or latest not in free:
        return None
    if any(home[n] > target for n in node.inputs if n in inside):
        return None
    window = rule.reads[latest].window
    return _Joined(target, isinstance(window, Affine) and window.disjoint)


def _topological(members: list[list[Node]], home: dict[str, int], inside: set[str]) -> list[list[Node]]:
    """Groups are made in the order of their first nodes; a joined node's other inputs come from earlier
    groups, so that this order is topological already."""
    for i, nodes in enumerate(members):
        assert all(home[n] <= i for node in nodes for n in node.inputs if n in inside)
    return members
