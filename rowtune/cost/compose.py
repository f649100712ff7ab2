"""A step's memory from those of its segments: forward one after another, then backward in reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rowtune.cost.footprint import Footprint, Side


class Linked(NamedTuple):
    """A segment in a step: `blocks` tells which memory of the step each of its shared buffers is (not those
    of the model's own tensors), `names` what its values are called in the step, `title` what it is called;
    `drops` are the values that no later segment reads, `policy` is the segment's."""

    footprint: Footprint
    blocks: Mapping[int, int]
    names: Mapping[str, str]
    title: str
    drops: Sequence[str]
    policy: str


class Mark(NamedTuple):
    """Bytes alive before a segment's forward (or backward), at most while it runs, and after it."""

    before: int
    peak: int
    after: int


class Peak(NamedTuple):
    """`forward` and `backward` have a mark for each segment, in the order of the plan."""

    total: int
    activations: int
    at: str
    forward: tuple[Mark, ...]
    backward: tuple[Mark, ...]


def compose(
    step: Sequence[Linked],
    outer: Mapping[int, int],
    batch: Iterable[int],
    fixed: int,
    names: Mapping[int, str],
    copies: Mapping[str, tuple[int, int]],
    held: frozenset[int] = frozenset(),
) -> Peak:
    """The most that is alive at any time.

    Args:
        outer: blocks, with their bytes, that backward begins with.
        batch: bytes of what the caller holds.
        fixed: bytes of parameters, buffers and the optimizer's state.
        names: of blocks, for people.
        copies: of inputs, that a step begins with: block and bytes, by the input's name.
        held: blocks that somebody else holds on to from their birth.
    """
    walk = _Walk(sum(batch), fixed, names, held)
    for name, (block, size) in copies.items():
        walk.begin(block, size)
        walk.values[name] = block
    forward = [walk.marked(walk.forward, linked) for linked in step]
    for block, size in outer.items():
        walk.begin(block, size)
    backward = [walk.marked(walk.backward, linked) for linked in reversed(step)]
    return Peak(walk.peak, walk.activations, walk.where, tuple(forward), tuple(reversed(backward)))


class _Walk:
    """`own` and `state`: what segments keep, and the gradients of parameters; `live`: what they share."""

    def __init__(self, batch: int, fixed: int, names: Mapping[int, str], held: frozenset[int]) -> None:
        self.fixed, self.names, self.by_others = fixed, names, held
        self.own, self.total, self.live = batch, batch + fixed, 0
        self.held: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self.values: dict[str, int] = {}
        self.gradients: dict[str, int] = {}
        self.peak = self.activations = self.top = 0
        self.where = ""

    def marked(self, way: Callable[[Linked], None], linked: Linked) -> Mark:
        """Run a segment one way, and say how much was alive."""
        before = self.top = self.total + self.live
        way(linked)
        return Mark(before, self.top, self.total + self.live)

    def hold(self, block: int) -> None:
        if block in self.held:
            self.held[block] += 1

    def begin(self, block: int, size: int) -> None:
        self.held[block] = 2 if block in self.by_others else 1
        self.size[block] = size
        self.live += size

    def let_go(self, block: int | None) -> None:
        if block is None or block not in self.held:
            return
        self.held[block] -= 1
        if not self.held[block]:
            del self.held[block]
            self.live -= self.size[block]

    def forward(self, linked: Linked) -> None:
        made, blocks = linked.footprint, linked.blocks
        fresh = self._through(linked, made.forward, "forward")
        for crossing in made.outputs:
            block = blocks.get(crossing.memory)
            if block is not None:
                self.values[linked.names[crossing.name]] = block
                self.hold(block)
        for n in made.kept - fresh:
            self.hold(blocks[n])
        for n in fresh - made.kept:
            self.let_go(blocks[n])
        for name in linked.drops:
            self.let_go(self.values.pop(name, None))
        self.own += made.forward.activations
        self.total += made.forward.total

    def backward(self, linked: Linked) -> None:
        made, blocks = linked.footprint, linked.blocks
        self.own -= made.forward.activations
        self.total -= made.forward.total
        held = {*made.kept}
        for name, n in made.outer.items():
            block = self.gradients.pop(linked.names[name], None)
            if n in held:  # two gradients in one memory
                self.let_go(block)
            held.add(n)
        held |= self._through(linked, made.backward, "backward", held)
        for crossing in made.gradients:
            block = blocks.get(crossing.memory)
            if block is not None:
                self.gradients[linked.names[crossing.name]] = block
                self.hold(block)
        for n in held:
            self.let_go(blocks.get(n))
        self.own += made.backward.activations
        self.total += made.backward.total

    def _through(self, linked: Linked, side: Side, way: str, held: set[int] | None = None) -> set[int]:
        """The buffers that begin; of those held, what ends is let go of."""
        blocks, shared = linked.blocks, linked.footprint.shared
        fresh: set[int] = set()
        for span in side.spans:
            for n in span.ends:
                if held is not None and n in held:
                    held.discard(n)
                    self.let_go(blocks.get(n))
                elif n in fresh:
                    fresh.discard(n)
                    self.let_go(blocks.get(n))
            for n in span.begins:
                self.begin(blocks[n], shared[n])
                fresh.add(n)
            activations = self.own + self.live + span.activations
            self.activations = max(self.activations, activations)
            total = self.total + self.live + span.total
            self.top = max(self.top, total)
            if total > self.peak:
                self.peak = total
                self.where = f"{self._largest(span.largest)}{way} of {linked.title}"
        return fresh

    def _largest(self, own: tuple[int, str]) -> str:
        shared = max(((self.size[b], self.names.get(b, "")) for b in self.held), default=(0, ""))
        name = max(own, shared)[1]
        return f"{name}, " if name else ""
