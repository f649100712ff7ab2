"""Several passes: a rows segment with barriers inside, whose feature maps never exist in full.

With K barriers in a row, forward streams the segment K+1 times, each time with the reductions of one more
barrier known. Backward streams it K+1 times as well: a pass finds the gradients of one barrier's reductions,
from the outputs down to it, and the last finds those of inputs and weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rowtune.graph.bands import Banding, banding
from rowtune.graph.cuts import Stretch, reduces
from rowtune.graph.graph import Graph, Node
from rowtune.graph.rules import Opaque, RowRule
from rowtune.plan.banded import Scheduler, banded
from rowtune.plan.plan import Segment
from rowtune.plan.program import Passes, SegmentProgram


def passes(graph: Graph, decision: Segment, part: Stretch, axis: int, scheduler: Scheduler) -> Passes:
    """The passes of `part`, each with bands ordered by `scheduler`."""
    return _Divider(graph, decision, part, axis, scheduler).passes()


class _Divider:
    def __init__(
        self, graph: Graph, decision: Segment, part: Stretch, axis: int, scheduler: Scheduler
    ) -> None:
        self.graph, self.decision, self.part, self.scheduler = graph, decision, part, scheduler
        self.bands, self.images = banding(graph, axis), banding(graph, 0)
        self.nodes = {node.name: node for node in part.nodes}
        self.level, self.finished = self._levels()
        self.last = max(self.level.values())

    def _levels(self) -> tuple[dict[str, int], set[str]]:
        """(barriers before each node, the values that are reductions or made from them without rows)."""
        level: dict[str, int] = {}
        finished: set[str] = set()
        for node in self.part.nodes:
            rule = self.bands.rule(node.name)
            rows = rule.dim is not None or reduces(rule)
            level[node.name] = max(
                (level[n] + (rows and n in finished) for n in node.inputs if n in level), default=0
            )
            if reduces(rule) or (not rows and any(n in finished for n in node.inputs)):
                finished.add(node.name)
        return level, finished

    def passes(self) -> Passes:
        forward = [self._forward(at) for at in range(self.last + 1)]
        sums = [n.name for n in self.part.nodes if reduces(self.bands.rules[n.name])]
        twins = {name: f"{name}'" for name in sums}
        values = {t: replace(self.graph.values[n], name=t) for n, t in twins.items()}
        graph = replace(self.graph, values=self.graph.values | values)
        backward = [self._backward(at, twins, graph) for at in range(self.last - 1, -2, -1)]
        levels = tuple(
            tuple(n for n in self.nodes if n in self.finished and self.level[n] == at)
            for at in range(self.last + 1)
        )
        return Passes(tuple(forward), tuple(backward), levels, twins, graph)

    def _forward(self, at: int) -> SegmentProgram:
        """Finishes the reductions behind `at` barriers; after the last, the outputs."""
        known = {n for n in self.finished if self.level[n] < at}
        effects = [n.name for n in self.part.nodes if n.effect and self.level[n.name] == at]
        outputs = [n for n in self.nodes if n in self.finished and self.level[n] == at]
        if at == self.last:  # backward asks for its reductions, read beyond the segment or not
            outputs += [n for n in self.part.outputs if n not in known and n not in outputs]
        wanted = self._ancestors([*outputs, *effects], known)
        nodes = tuple(node for node in self.part.nodes if node.name in wanted)
        return self._program(self.graph, nodes, tuple(outputs), self.bands, self.images)

    def _backward(self, at: int, twins: dict[str, str], graph: Graph) -> SegmentProgram:
        """Finds the gradients of what `at` barriers' reductions became; of inputs and weights for -1."""
        wanted = {n for n in self.finished if self.level[n] == at}
        reached = self._descendants(wanted) if at >= 0 else set(self.nodes)
        later = [n for n in twins if self.level[n] > at and n in reached]
        outputs = [n for n in self.part.outputs if n in reached and n not in self.finished]
        known = self.finished
        sources = [i for n in later for i in self.nodes[n].inputs]
        kept = self._ancestors([*outputs, *sources], known)
        nodes: list[Node] = []
        for node in self.part.nodes:
            if node.name in kept and node.name not in known and not node.effect:
                nodes.append(node)
            if node.name in later:
                nodes.append(replace(node, name=twins[node.name]))
        made = tuple(twins[n] for n in later)
        return self._program(
            graph, tuple(nodes), (*outputs, *made), _twinned(self.bands, twins), _twinned(self.images, twins)
        )

    def _ancestors(self, names: Iterable[str], known: set[str]) -> set[str]:
        found: set[str] = set()
        left = [n for n in names if n in self.nodes]
        while left:
            name = left.pop()
            if name in found or name in known:
                continue
            found.add(name)
            left += [i for i in self.nodes[name].inputs if i in self.nodes]
        return found

    def _descendants(self, names: set[str]) -> set[str]:
        found = set(names)
        for node in self.part.nodes:
            if any(n in found for n in node.inputs):
                found.add(node.name)
        return found

    def _program(
        self, graph: Graph, nodes: tuple[Node, ...], outputs: tuple[str, ...], bands: Banding, images: Banding
    ) -> SegmentProgram:
        inside = {node.name for node in nodes}
        read = dict.fromkeys(n for node in nodes for n in node.inputs if n not in inside)
        fixed = ("parameter", "buffer", "constant")
        part = Stretch(
            self.part.start,
            self.part.stop,
            nodes,
            tuple(n for n in read if graph.values[n].kind not in fixed),
            tuple(n for n in read if graph.values[n].kind in fixed),
            outputs,
        )
        made = banded(graph, self.decision, part, bands, images, self.scheduler)
        return SegmentProgram(self.decision, part, replace(made, single_sweep=False))


def _twinned(bands: Banding, twins: dict[str, str]) -> Banding:
    rules = bands.rules | {t: _local(bands.rules[n]) for n, t in twins.items()}
    dims = bands.dims | {t: bands.dims[n] for n, t in twins.items()}
    return replace(bands, rules=rules, dims=dims)


def _local(rule: RowRule | Opaque) -> RowRule | Opaque:
    """A twin's gradient is that of the finished reduction, which other processes have had their part in."""
    if isinstance(rule, Opaque) or rule.reduces is None:
        return rule
    return replace(rule, reduces=replace(rule.reduces, shared=False))
