"""The sizes of a rows segment: its steps, over line buffers of sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rowtune.cost.finish import finish
from rowtune.cost.heap import Heap
from rowtune.cost.left_out import Images, LeftOut
from rowtune.cost.lines import LineSizes
from rowtune.cost.post import PostSizes
from rowtune.cost.profile import Profiles
from rowtune.cost.tape import TapeSizes, backward, forward, widened
from rowtune.graph.graph import Graph, Node
from rowtune.plan.groups import Group
from rowtune.plan.homes import homes_of, read_inside, wasteful
from rowtune.plan.program import Back, Drop, Piece, Replay, Restore, Run, SegmentProgram, Stash, Step
from rowtune.rows import Rows, need


class BandedSizes:
    """Mirrors runtime.banded.BandedRun, with blocks of a Heap in place of tensors."""

    def __init__(
        self,
        heap: Heap,
        graph: Graph,
        profiles: Profiles,
        segment: SegmentProgram,
        wanted: frozenset[str] | None = None,
    ) -> None:
        assert segment.banded is not None
        self.heap, self.graph, self.profiles, self.segment = heap, graph, profiles, segment
        self.program = segment.banded
        self.bands, self.image_bands = self.program.bands, self.program.images
        self.outside = frozenset(segment.part.inputs)
        self.sums = frozenset(self.program.sums)
        self.done = False
        self.settled: frozenset[str] = frozenset()
        self.weight_grads: dict[str, int] = {}
        self.input_grads: dict[str, int] = {}
        self.held: list[int] = []
        self.outputs: dict[str, int] = {}
        self.stashes: list[dict[int, list[tuple[str, Rows, int]]]] = []
        self.left_out = LeftOut(heap, segment.banded.repeat)
        self.images = Images(heap, self.program.image_ranges, self.program.sketch)
        self.post = PostSizes(heap, graph, profiles, self.program.post)
        self.wanted = graph.needs_grad if wanted is None else wanted
        self.shapes: dict[str, tuple[int, int, bool]] = {}
        self.fraction = 1.0
        self.stash: dict[int, list[tuple[str, Rows, int]]] = {}
        self.outer: dict[str, int] = {}
        self.late = {node.name for node in self.program.post}

    # -- the two passes --------------------------------------------------------------------------------------

    def forward(self, env: dict[str, int]) -> None:
        """Adds the segment's outputs to `env`."""
        single = self.program.single_sweep
        for name in self.program.sums:
            self.outputs[name] = self.heap.new(self.graph.values[name].bytes, name)
        for i, images in enumerate(self.images.ranges):
            self.images.start()
            self._images(images)
            self.stashes.append(self.stash)
            self._steps(self.program.backward if single else self.program.forward, collect=True)
            self.lines.clear()
            self.images.forward_done(i)
        self.done = single
        if single:
            finish(self.heap, self.graph, self.segment, self.input_grads)
        self.outputs |= self.post.forward()
        for name, block in self.outputs.items():
            if name in self.segment.part.outputs:
                env[name] = block
            else:
                self.heap.drop(block)
        self.outputs = {}

    def again(self, env: dict[str, int]) -> None:
        """The outputs once more, for a backward: reductions are finished."""
        self.settled = self.sums
        self.forward(env)

    def hold(self, env: Mapping[str, int]) -> None:
        """Inputs live on until backward."""
        self.held = [self.heap.ref(env[n]) for n in self.segment.part.inputs if n in env]

    def release(self) -> None:
        for block in self.held:
            self.heap.drop(block)
        self.held = []

    def backward(self, outer: Mapping[str, int]) -> None:
        self.outer = dict(outer)
        self.post.backward(outer, self.weight_grads)
        for i, images in enumerate(self.images.ranges):
            self._images(images)
            self.stash = self.stashes[i] if self.stashes else {}
            self._steps(self.program.backward, collect=False)
            self.lines.clear()
            self.images.backward_done(i)
        finish(self.heap, self.graph, self.segment, self.input_grads)

    def _images(self, images: Rows) -> None:
        total = self.program.image_ranges[-1].hi
        self.fraction = images.size / total
        self.lines = LineSizes(self.heap, self._bytes, self.bands.dims)
        self.tapes: dict[int, tuple[TapeSizes, dict[str, int]]] = {}
        self.shares: dict[tuple[int, str], list[tuple[Rows, int]]] = {}
        self.stash = {}

    def _steps(self, steps: tuple[Step, ...], collect: bool) -> None:
        for step in steps:
            if type(step) is Run:
                self._run(step, collect)
            elif type(step) is Replay:
                self._replay(step.piece)
            elif type(step) is Back:
                self._back(step.piece)
            elif type(step) is Drop:
                self.lines.drop_below(step.value, step.below)
            elif type(step) is Stash:
                self.stash[step.band] = [
                    (n, rows, self.heap.ref(b))
                    for n in step.values
                    for rows, b in self.lines.chunks.get(n, ())
                ]
                self.left_out.stashed(step.band)
            elif type(step) is Restore:
                self.lines.clear()
                self.left_out.restored(step.band)
                for name, rows, block in self.stash.pop(step.band, ()):
                    self.lines.put(name, rows, block)

    # -- sizes -----------------------------------------------------------------------------------------------

    def _bytes(self, name: str, rows: Rows) -> int:
        size, height, split = self._shape(name)
        if height:
            size = size * rows.size // height
        return int(size * self.fraction) if split else size

    def _shape(self, name: str) -> tuple[int, int, bool]:
        """Bytes of a whole value, its rows (0 where it is used whole), whether it is split over images."""
        found = self.shapes.get(name)
        if found is None:
            value, dim, at = self.graph.values[name], self.bands.dims[name], self.image_bands.dims[name]
            height = 0 if dim is None else max(value.shape[dim], 1)
            found = self.shapes[name] = value.bytes, height, at is not None and at != dim
        return found

    def _share(self, piece: Piece) -> Callable[[Node], float]:
        def share(node: Node) -> float:
            rows = piece.ranges.get(node.name)
            if rows is None:
                return 0.0
            return self.fraction * rows.size / self.bands.full_height(self.graph.values[node.name])

        return share

    def _size(self, piece: Piece) -> Callable[[str], int]:
        return lambda name: self._bytes(name, piece.ranges.get(name, Rows(0, 0)))

    def _made(self, piece: Piece) -> Callable[[str], int]:
        """Bytes a node computes for its rows, those that it drops again included."""

        def made(name: str) -> int:
            rule, rows = self.bands.rule(name), piece.ranges[name]
            if rule.makes is None or not rows.size:
                return self._bytes(name, rows)
            window = next(r.window for r in rule.reads.values() if r.window is not None)
            return self._bytes(name, Rows(0, rule.makes(rows, need(window, *rows))))

        return made

    def _over(self, piece: Piece, group: Group, standing_in: frozenset[str]) -> dict[str, str]:
        """Nodes that run in place: not over a stand-in, or a part of something larger."""
        return {
            node: name
            for node, name in group.in_place.items()
            if node not in standing_in
            and name not in standing_in
            and name in piece.ranges
            and self._made(piece)(name) == self._bytes(name, piece.ranges[name])
        }

    def _read(self, piece: Piece) -> Callable[[Node, str], int]:
        """Bytes of an input that a node reads; another node of the piece may read more of it."""

        def read(node: Node, name: str) -> int:
            window = self.bands.rule(node.name).reads[name].window
            rows = piece.ranges[name]
            return self._bytes(name, rows if window is None else need(window, *piece.ranges[node.name]))

        return read

    # -- steps -----------------------------------------------------------------------------------------------

    def _run(self, step: Run, collect: bool) -> None:
        piece = self.program.pieces[step.piece]
        group = self.program.groups[piece.group]
        if not collect and self.program.left_out(group, step.tape):
            if step.tape:
                self.tapes[step.piece] = (TapeSizes(), {})
            return
        blocks: dict[str, int] = {}
        joined: set[str] = set()
        for name in group.reads:
            rows = piece.ranges.get(name)
            if rows is None or name in self.outside or not rows.size:
                continue
            blocks[name], fresh = self.lines.window(name, rows)
            if fresh:
                joined.add(name)
        grad = (lambda n: n in self.wanted) if step.tape else (lambda n: False)
        spared = self.settled if collect else self.program.spared
        unread = frozenset() if collect or not step.tape else self.program.unread
        active = [
            (n, d)
            for n, d in zip(group.nodes, group.last_use, strict=True)
            if n.name in piece.ranges and n.name not in spared
        ]
        made = self._made(piece)
        tape = forward(
            self.heap, self.graph, self.profiles, [n for n, _ in active], [d for _, d in active], blocks,
            lambda name: 0 if name in unread else made(name), self._share(piece), grad, frozenset(joined),
            self._over(piece, group, unread),
        )  # fmt: skip
        if step.tape:
            self.tapes[step.piece] = (tape, {})
        self._deliver(piece, group, blocks, collect)

    def _replay(self, number: int) -> None:
        piece = self.program.pieces[number]
        group = self.program.groups[piece.group]
        replay = group.replay
        assert replay is not None
        if not any(o in self.wanted for o in group.outputs):
            self.tapes[number] = (TapeSizes(), {})
            return
        read = [
            n for n in group.reads if n in piece.ranges and n not in self.outside and piece.ranges[n].size
        ]
        blocks = {n: self.lines.window(n, piece.ranges[n])[0] for n in read if n not in replay.blank}
        blocks |= {n: self.heap.new(0) for n in read if n in replay.blank}
        known = [self.lines.window(n, piece.ranges[n])[0] for n in replay.known]
        made = self._made(piece)
        active = [(n, d) for n, d in zip(group.nodes, group.last_use, strict=True) if n.name in piece.ranges]
        tape = forward(
            self.heap, self.graph, self.profiles, [n for n, _ in active], [d for _, d in active], blocks,
            lambda name: 0 if name in replay.unread else made(name), self._share(piece),
            lambda n: n in self.wanted, over=self._over(piece, group, replay.unread | replay.known),
        )  # fmt: skip
        for block in (*known, *blocks.values()):
            self.heap.drop(block)
        self.tapes[number] = (tape, {})

    def _deliver(self, piece: Piece, group: Group, blocks: dict[str, int], collect: bool) -> None:
        for name, rows in piece.outputs:
            if name not in blocks:  # left out
                continue
            block = blocks.pop(name)
            if collect and name in self.segment.part.outputs and name not in self.sums:
                if self._bytes(name, rows) == self.graph.values[name].bytes:
                    self.outputs[name] = self.heap.ref(block)
                elif name not in self.outputs:
                    self.outputs[name] = self.heap.new(self.graph.values[name].bytes, name)
            if read_inside(self.program, name):
                self.lines.put(name, rows, block)
            else:
                self.heap.drop(block)
        for block in blocks.values():
            self.heap.drop(block)

    # -- tapes -----------------------------------------------------------------------------------------------

    def _back(self, number: int) -> None:
        piece = self.program.pieces[number]
        tape, grads = self.tapes.pop(number)
        for name, rows in piece.outputs:
            seed = self._seed(number, name, rows)
            if seed is not None:
                grads[name] = seed
        seeds = [self.heap.ref(block) for block in grads.values()]  # held by the call until the tape has run
        for name, rows in piece.outputs:
            if name in grads and self._bytes(name, rows) < self._bytes(name, piece.ranges[name]):
                grads[name] = widened(self.heap, grads[name], self._bytes(name, piece.ranges[name]))

        backward(
            self.heap, self.graph, self.profiles, tape, grads, self._size(piece), self._share(piece),
            lambda n: n in self.wanted, self._weight, self._made(piece), self._read(piece),
        )  # fmt: skip
        for block in seeds:
            self.heap.drop(block)
        for name, block in grads.items():
            self._scatter(name, piece.ranges[name], block)
        self.lines.drop(piece.outputs)

    def _weight(self, name: str) -> None:
        """The first gradient of a weight becomes its sum; later ones live for a moment."""
        size = self.graph.values[name].bytes
        if name in self.weight_grads:
            self.heap.mark(size)
        else:
            self.weight_grads[name] = self.heap.new(size, state=True)

    def _seed(self, number: int, name: str, rows: Rows) -> int | None:
        if name in self.sums:
            return self.heap.new(0)
        shares = self.shares.pop((number, name), [])
        if not shares:
            given = name in self.outer and name not in self.late
            return self.heap.ref(self.outer[name]) if given else None
        full = [b for r, b in shares if r == rows]
        base = self.heap.ref(full[0]) if full else self.heap.new(self._bytes(name, rows))
        for _, block in shares:
            self.heap.drop(block)
        return base

    def _scatter(self, name: str, rows: Rows, block: int) -> None:
        if name in self.outside:
            whole = self.graph.values[name].bytes
            own = block not in self.outer.values()
            if name not in self.input_grads and own and self._bytes(name, rows) == whole:
                self.input_grads[name] = self.heap.ref(block)
            elif name not in self.input_grads:
                self.input_grads[name] = self.heap.new(whole, f"the gradient of {name}")
            self.heap.drop(block)
            return
        for home, piece in homes_of(self.program)[name].overlapping(rows, self.bands.dims[name] is None):
            shared = Rows(max(home.lo, rows.lo), min(home.hi, rows.hi))
            used = self._bytes(name, shared)
            whole = self.bands.dims[name] is None
            copied = not whole and wasteful(used, self.heap.size[block])
            share = self.heap.new(used) if copied else self.heap.ref(block)
            self.shares.setdefault((piece, name), []).append((home if whole else shared, share))
        self.heap.drop(block)
