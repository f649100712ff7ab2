"""Execute a rows segment: the steps of its program, over line buffers, forward and backward.

No backward rule is written here. A step with a tape runs its operators on detached slices with gradients on;
running the tape asks autograd for the gradients of the slices and the parameters, which go to the pieces
that made the rows, to the segment's inputs and to the weight accumulators.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rowtune.graph.graph import Graph, carried
from rowtune.graph.training import NORMS
from rowtune.kernels.constants import TRACING
from rowtune.plan.groups import Group
from rowtune.plan.homes import homes_of, read_inside
from rowtune.plan.program import Back, Banded, Drop, Piece, Replay, Restore, Run, SegmentProgram, Stash, Step
from rowtune.rows import Rows
from rowtune.runtime.dropout import Seed
from rowtune.runtime.evaluate import ALL_IMAGES, Evaluator, empty_in_order, grad_dtype
from rowtune.runtime.gradients import Gradients, InputGradients, add, apart, finish
from rowtune.runtime.layout import differs
from rowtune.runtime.lines import Lines, PieceGradients
from rowtune.runtime.stores.keeping import Keeping, Kept
from rowtune.runtime.stores.shelf import Shelf, Shelves
from rowtune.runtime.sums import Sums
from rowtune.runtime.tapes import Tape, tape_of
from rowtune.runtime.weights import WeightSums, cast_once, last_channels
from rowtune.runtime.windows import Windows
from rowtune.torch_private import storage_of


class BandedRun:
    """One forward call of a rows segment, and its backward.

    Args:
        segment: what to run.
        tensors: segment inputs and weights by name, detached; in backward inputs may be on shelves.
        wanted: which of them need a gradient.
        seed: of this step's random masks.
        keeping: where stashes are kept; None: where they are.
    """

    def __init__(
        self,
        graph: Graph,
        segment: SegmentProgram,
        tensors: Mapping[str, Tensor | Shelf],
        wanted: frozenset[str],
        seed: Seed,
        *,
        first_time: bool = True,
        totals: Mapping[str, Tensor] | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        assert isinstance(segment.how, Banded)
        self.keeping = keeping
        self.graph, self.segment, self.program = graph, segment, segment.how
        self.wanted, self.first_time = wanted, first_time
        self.settled: frozenset[str] = frozenset()
        device = next(iter(tensors.values())).device
        self.evaluator = Evaluator(graph, self.program.bands, self.program.images, seed, device)
        self.token = torch.zeros((), requires_grad=True)
        self.dims = self.program.bands.dims
        self.outputs: dict[str, Tensor] = {}
        self.sums = Sums(graph, self.program, {}, seed, totals)
        self.recall(tensors)
        self.carriers: frozenset[str] = frozenset()
        self.stash: dict[int, list[tuple[str, Rows, Tensor | Kept]]] = {}
        self.stashes: list[dict[int, list[tuple[str, Rows, Tensor | Kept]]]] = []

    def recall(self, tensors: Mapping[str, Tensor | Shelf]) -> None:
        """Segment inputs and weights, for the backward of a call that let go of them."""
        self.tensors = tensors
        here = {n: t for n, t in tensors.items() if isinstance(t, Tensor)}
        self.sums.tensors = here
        weights = self.segment.part.weights
        self.whole = {n: t for n, t in here.items() if n in weights or n == NORMS}
        self.shelved = {n: t for n, t in tensors.items() if isinstance(t, Shelf)}

    def forget(self) -> None:
        """Let go of all tensors but those that forward kept for backward; autograd holds the inputs, or under
        checkpoint does not."""
        self.recall({})
        self.leaves: dict[str, Tensor] = {}
        if self.keeping is not None:
            self.keeping.forget()

    # -- forward -------------------------------------------------------------------------------------------

    def forward(self) -> dict[str, Tensor]:
        """Segment outputs by name; backward needs only what a cache schedule stashes."""
        self._begin({}, collect=True)
        self.carriers = frozenset()
        for images in self.program.image_ranges:
            self._images(images)
            self.stashes.append(self.stash)
            self._steps(self.program.forward)
        return self._finish()

    def again(self) -> dict[str, Tensor]:
        """The same for a backward: no buffer changes this time, and reductions are finished."""
        self.first_time, self.settled = False, self.sums.names
        return self.forward()

    def single_sweep(self, scale: Tensor | float) -> tuple[dict[str, Tensor], Gradients]:
        """Loss, outputs and gradients for `scale` times the loss, in one pass."""
        self.sums.unit(self.segment.part.nodes[-1].name, scale)
        self._begin({}, collect=True)
        for images in self.program.image_ranges:
            self._images(images)
            self._backward_of_images()
        self._complete()
        return self._finish(), self.gradients

    def _finish(self) -> dict[str, Tensor]:
        self.lines.clear()
        self.sums.finish()
        made = {**self.outputs, **self.sums.made(self.first_time)}
        self.outputs = {}  # backward does not need them
        return {o: made[o] for o in self.segment.part.outputs}

    # -- backward ------------------------------------------------------------------------------------------

    def backward(self, grads: Mapping[str, Tensor]) -> Gradients:
        """Gradients of inputs and weights for these gradients of the segment's outputs."""
        beyond = self.sums.backward(grads, self.wanted)
        self._begin(grads, collect=False)
        for i, images in enumerate(self.program.image_ranges):
            self._images(images)
            if self.stashes:
                self.stash = self.stashes[i]
                self.stashes[i] = {}
            self._backward_of_images()
        self._complete(beyond)
        return self.gradients

    def _complete(self, beyond: Mapping[str, Tensor] | None = None) -> None:
        """All tapes have run."""
        self.arriving.finish(self.dims)
        alone = apart(beyond or {}, (*self.outer.values(), *self.sums.gradients.values()))
        for name, g in alone.items():
            add(self.gradients.weights if name in self.whole else self.gradients.inputs, name, g)
        finish(self.graph, self.segment, self.tensors, self.gradients, self.wanted)

    def _backward_of_images(self) -> None:
        self._steps(self.program.backward)
        self.summing.flush()
        self.arriving.images_done(self.dims, self._part)

    # -- steps ---------------------------------------------------------------------------------------------

    def _begin(self, grads: Mapping[str, Tensor], collect: bool) -> None:
        self.outer, self.collect = grads, collect
        self.late = {node.name for node in self.program.post}  # bands may make them as well, for themselves
        self.gradients = Gradients({}, {})
        self.arriving = InputGradients(self.gradients.inputs)
        self.carriers = self._carriers()
        self.evaluator.totals = self.sums.totals
        self.leaves = {
            n: t.detach().requires_grad_(n in self.wanted) if t.dtype.is_floating_point else t
            for n, t in self._weights().items()
        }
        self.summing = WeightSums(self.gradients.weights, self.segment.part.nodes)
        for name, leaf in self.leaves.items():
            if leaf.requires_grad:
                leaf.register_hook(self.summing.hook(name))  # type: ignore[no-untyped-call]
        self._images(ALL_IMAGES)

    def _weights(self) -> dict[str, Tensor]:
        """What is used whole, as convolutions use it."""
        nodes = [node for group in self.program.groups for node in group.nodes]
        found = cast_once(self.whole, nodes)
        lie_so = any(_differs(self.tensors[n]) for n in self.segment.part.inputs if n in self.tensors)
        return last_channels(found, nodes) if lie_so else found

    def _images(self, images: Rows) -> None:
        total = images.lo == 0 and len(self.program.image_ranges) == 1
        self.images = ALL_IMAGES if total else images
        some = None if self.images == ALL_IMAGES else self.images
        self.lines = Lines(self.dims, Shelves(self.shelved, self.dims, self.program.images.dims, some))
        self.tapes: dict[int, Tape] = {}
        self.shares = PieceGradients(self.dims, homes_of(self.program))
        self.stash = {}

    def _carriers(self) -> frozenset[str]:
        """Values through which a gradient flows in this call."""
        return carried((node for group in self.program.groups for node in group.nodes), self.wanted)

    def _steps(self, steps: tuple[Step, ...]) -> None:
        if (tracing := TRACING.get()) is not None:
            tracing.steps(self, steps)
            return
        for step in steps:
            self.step(step)

    def step(self, step: Step) -> None:
        """One step of the program."""
        if type(step) is Run:
            self.summing.flush()  # a band of a sweep begins
            self._run(step)
        elif type(step) is Replay:
            self._replay(step.piece)
        elif type(step) is Back:
            self._back(step.piece)
        elif type(step) is Drop:
            self.lines.drop_below(step.value, step.below)
        elif type(step) is Stash:
            self._stash(step)
        elif type(step) is Restore:
            self._restore(step)

    def _stash(self, step: Stash) -> None:
        pack = self.keeping.pack if self.keeping else _itself
        chunks = [(n, rows, t) for n in step.values for rows, t in self.lines.chunks[n]]
        self.stash[step.band] = [(n, rows, pack(t)) for n, rows, t in chunks]

    def _restore(self, step: Restore) -> None:
        self.lines.clear()
        for name, rows, kept in self.stash.pop(step.band, ()):
            self.lines.put(name, rows, kept.get() if isinstance(kept, Kept) else kept)

    def _run(self, step: Run) -> None:
        piece = self.program.pieces[step.piece]
        group = self.program.groups[piece.group]
        if not self.collect and self.program.spares(group, step.tape):
            return
        if step.tape and any(o in self.carriers for o in group.outputs):
            outputs = self._run_tape(step.piece, piece, group)
        else:
            slabs = {n: self._slab(n, piece.ranges[n])[0] for n in group.reads if n in piece.ranges}
            with torch.no_grad():
                outputs = self.evaluator.run(
                    group, piece.outputs, piece.ranges, slabs, self.leaves, self.images, self.settled
                )
        for name, rows in piece.outputs:
            if name in outputs:
                self._deliver(step.piece, name, rows, outputs[name])

    def _deliver(self, piece: int, name: str, rows: Rows, tensor: Tensor) -> None:
        if name in self.sums.names:
            if self.collect:
                self.sums.add(name, tensor, self.images, piece)
            return
        if self.collect and name in self.segment.part.outputs:
            self._write(name, rows, tensor.detach())
        if read_inside(self.program, name):
            self.lines.put(name, rows, tensor.detach())

    def _write(self, name: str, rows: Rows, tensor: Tensor) -> None:
        """Rows of a segment output into the whole tensor."""
        if tensor.shape == self.graph.values[name].shape:
            self.outputs[name] = tensor
            return
        if name not in self.outputs:
            self.outputs[name] = empty_in_order(tensor, self.graph.values[name].shape)
        self._part(name, self.outputs[name], rows).copy_(tensor)

    def _run_tape(self, number: int, piece: Piece, group: Group) -> dict[str, Tensor]:
        slabs: dict[str, Tensor] = {}
        edges: list[tuple[str, Rows, GradientEdge]] = []
        windows = Windows(self.lines, self.token)
        for name in group.reads:
            if name not in piece.ranges:
                continue
            rows = piece.ranges[name]
            tensor, fresh = self._slab(name, rows)
            if name in self.carriers and tensor.dtype.is_floating_point:
                tensor = windows.placed(tensor) if fresh else tensor.detach().requires_grad_()
                edges.append((name, rows, get_gradient_edge(tensor)))
            if fresh:
                windows.add(name, rows, tensor)
            slabs[name] = tensor
            del tensor
        spared, unread = self._needless()
        with torch.enable_grad(), windows.saved_by_name():
            outputs = self.evaluator.run(
                group, piece.outputs, piece.ranges, slabs, self.leaves, self.images, spared, unread
            )
        self.tapes[number] = tape_of(group, edges, outputs, self.wanted & self.whole.keys())
        return outputs

    def _replay(self, number: int) -> None:
        """The tape of rows that were made before, about to run."""
        piece = self.program.pieces[number]
        group = self.program.groups[piece.group]
        left_out = not self.collect and self.program.spares(group, tape=True)
        if left_out or not any(o in self.carriers for o in group.outputs):
            return
        assert group.replay is not None
        slabs: dict[str, Tensor] = {}
        edges: list[tuple[str, Rows, GradientEdge]] = []
        windows = Windows(self.lines, self.token)
        for name in (n for n in group.reads if n in piece.ranges):
            rows = piece.ranges[name]
            blank = name in group.replay.blank
            tensor = self.evaluator.blank(name, rows, self.images) if blank else self._slab(name, rows)[0]
            if name in self.carriers and tensor.dtype.is_floating_point:
                tensor = windows.placed(tensor.detach())
                edges.append((name, rows, get_gradient_edge(tensor)))
            slabs[name] = tensor
        known = {n: self._slab(n, piece.ranges[n])[0] for n in group.replay.known}
        spared, unread = self._needless()
        with torch.enable_grad():
            outputs = self.evaluator.run(
                group, piece.outputs, piece.ranges, slabs, self.leaves, self.images,
                spared, unread | group.replay.unread, known,
            )  # fmt: skip
        self.tapes[number] = tape_of(group, edges, outputs, self.wanted & self.whole.keys())

    def _needless(self) -> tuple[frozenset[str], frozenset[str]]:
        """What backward leaves out: nodes, and values of nodes."""
        nothing: frozenset[str] = frozenset()
        return (nothing, nothing) if self.collect else (self.program.spared, self.program.unread)

    def _slab(self, name: str, rows: Rows) -> tuple[Tensor, bool]:
        """(rows of a value, whether they are fresh memory)."""
        there = self.tensors.get(name)
        if isinstance(there, Tensor):
            return self._part(name, there, rows), False
        if not rows.size:  # a window that lies in padding altogether
            return self.evaluator.empty(name, self.images), False
        return self.lines.get(name, rows)

    # -- tapes ---------------------------------------------------------------------------------------------

    def _back(self, number: int) -> None:
        piece = self.program.pieces[number]
        tape = self.tapes.pop(number, None)
        if tape is not None:
            self._run_back(number, piece, tape)
        for name, rows in piece.outputs:
            self.lines.drop(name, rows)

    def _run_back(self, number: int, piece: Piece, tape: Tape) -> None:
        seeds: dict[str, Tensor] = {}
        for name, rows in piece.outputs:
            seed = self._seed(number, name, rows) if name in tape.outputs else None
            if seed is not None:
                seeds[name] = seed
        given = {storage_of(s) for s in seeds.values()}
        seed = None
        self._scatter(tape, tape.backward(seeds, self.leaves), given)

    def _seed(self, number: int, name: str, rows: Rows) -> Tensor | None:
        if name in self.sums.names:
            return self.sums.gradient(name, self.images)
        outer = self.outer.get(name) if name not in self.late else None
        if outer is not None:
            outer = self._part(name, outer, rows)
        return self.shares.take(number, name, rows, outer)

    def _scatter(self, tape: Tape, found: list[Tensor | None], given: set[int]) -> None:
        """Gradients of slices to the pieces that made them, or to the segment's inputs; each is let go of
        before the next."""
        where = [storage_of(g) for g in found if g is not None]
        for name, rows, _ in tape.slabs:
            g = found.pop(0)
            if g is None:
                continue
            at = storage_of(g)
            owned = at not in given and where.count(at) == 1 and 0 not in g.stride()
            if name in self.tensors:
                self._add_input(name, rows, g, owned)
            else:
                self.shares.add(name, rows, g, owned)

    def _add_input(self, name: str, rows: Rows, g: Tensor, owned: bool) -> None:
        full = self.tensors[name]
        if owned and g.shape == full.shape and g.dtype == grad_dtype(g.dtype):
            self.arriving.whole(name, g, self.dims[name])
        else:
            split = self.images != ALL_IMAGES and self._image_dim(name) is not None
            self.arriving.add(name, full, self.dims[name], rows, g, partial(self._part, name), split)

    def _part(self, name: str, full: Tensor, rows: Rows) -> Tensor:
        """The rows and images at work, of a whole tensor."""
        dim = self.dims[name]
        if dim is not None and rows.size != full.shape[dim]:
            full = full.narrow(dim, rows.lo, rows.size)
        at = self._image_dim(name)
        if at is not None and self.images != ALL_IMAGES:
            full = full.narrow(at, self.images.lo, self.images.size)
        return full

    def _image_dim(self, name: str) -> int | None:
        """Where a value's images lie, if that is another dimension than that of its rows."""
        at = self.program.images.dims[name]
        return at if at != self.dims[name] else None


def _differs(t: Tensor | Shelf) -> bool:
    return differs(t) if isinstance(t, Tensor) else t.differs


def _itself(t: Tensor) -> Tensor:
    return t
