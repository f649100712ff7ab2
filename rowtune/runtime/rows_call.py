"""A rows segment (its bands, or passes over them) as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rowtune.errors import RowtuneError
from rowtune.graph.graph import carried
from rowtune.plan.program import Banded, Passes, SegmentProgram
from rowtune.runtime.banded import BandedRun
from rowtune.runtime.dropout import as_tensor, draws
from rowtune.runtime.gradients import Gradients, blank_like
from rowtune.runtime.lists.kinds import Begin, Life, Traced
from rowtune.runtime.passes import PassesRun
from rowtune.runtime.precision import as_it_was, autocast_key
from rowtune.runtime.step_run import Env, StepRun
from rowtune.runtime.stores.keeping import Keeping, saving
from rowtune.runtime.stores.shelf import Shelf, banded_inputs
from rowtune.runtime.stores.store import Lay, lay_of
from rowtune.runtime.sums import changed_buffers
from rowtune.torch_private import storage_of


def run_rows(step: StepRun, segment: SegmentProgram, env: Env, keeping: Keeping | None) -> None:
    """Add the outputs of the rows segment to `env`; what it reads goes through `keeping`."""
    changed = {n: env[n] for n in changed_buffers(segment.part)}
    names = [n for n in (*segment.part.inputs, *segment.part.weights) if n not in changed]
    tensors = [env[n] for n in names]
    call = _Call(step, segment, names, changed, tensors[0].device, keeping)
    if torch.is_grad_enabled() and not segment.single_sweep:
        with saving(keeping):
            call.save(tensors)
    outputs = _BandedSegment.apply(call, *tensors)  # type: ignore[no-untyped-call]
    env |= dict(zip(segment.part.outputs, outputs, strict=True))


class _Inputs(torch.autograd.Function):
    """Saves tensors before the segment runs. A checkpoint around it that is run again only for what was
    saved ends here then, and does not run the segment in vain."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise AssertionError("nothing depends on this")


class _Call:
    """What one call of a rows segment carries from forward to backward."""

    def __init__(
        self,
        step: StepRun,
        segment: SegmentProgram,
        names: list[str],
        changed: Env,
        device: torch.device,
        keeping: Keeping | None,
    ) -> None:
        self.keeping = keeping
        self.step, self.segment, self.names, self.changed = step, segment, names, changed
        self.earlier = step.earlier
        drawn = step.lists is not None and any(map(draws, segment.part.nodes))
        self.seed = as_tensor(step.seed, device) if drawn else None
        self.autocast = autocast_key()
        self.grad_enabled = torch.is_grad_enabled()
        self.stored: Gradients | None = None
        self.run: Traced | None = None
        self.token = torch.empty(0, requires_grad=True)
        self.saved: Tensor | None = None
        self.shelves: dict[str, Shelf] = {}

    def forward(self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...]) -> dict[str, Tensor]:
        """`changed` are the buffers that effects write: no inputs of autograd's node, which would find them
        changed since."""
        given, key = self.detached(tensors), id(self.segment)
        run = self.earlier.get(key)
        if run is not None:
            run.recall(given | self.shelves)
            outputs = run.again()
        else:
            run = self.begun(given, needs)
            if self.segment.single_sweep and any(needs):
                outputs, self.stored = run.single_sweep(self.step.scale)
                self.complete(self.stored, given, needs)
                return outputs
            outputs = run.forward()
            self.run = self.earlier[key] = run
        run.forget()
        # The run keeps its statistics, and autograd writes into what it is handed where that comes from.
        return {n: t.detach() for n, t in outputs.items()}

    def complete(self, stored: Gradients, given: Mapping[str, Tensor], needs: tuple[bool, ...]) -> None:
        """Zeros for what the loss depends on, though no row of it reads any: windows that lie in padding."""
        reached = _reached(self, [self.segment.part.nodes[-1].name]) - _finished(self)
        for name in self.wanted(needs) & reached - stored.inputs.keys() - stored.weights.keys():
            stored.weights[name] = torch.zeros_like(given[name])

    def begun(self, given: dict[str, Tensor], needs: tuple[bool, ...]) -> Traced:
        """A run of the segment's schedule, or of the calls that an earlier run of it made."""
        wanted, step, segment = self.wanted(needs), self.step, self.segment
        graph, seed = step.program.graph, step.seed  # not the step: it knows its runs
        keeping, outside = self.keeping, self.outside(given)

        def run(tensors: Mapping[str, Tensor | Shelf], first_time: bool) -> Traced:
            own = tensors[SEED] if SEED in tensors else seed
            assert not isinstance(own, Shelf)
            if isinstance(segment.how, Passes):
                return PassesRun(graph, segment, tensors, wanted, own, first_time=first_time)
            memory = {storage_of(t) for n, t in tensors.items() if n in outside and isinstance(t, Tensor)}
            stashing = None if keeping is None else keeping.over(memory)
            return BandedRun(graph, segment, tensors, wanted, own, first_time=first_time, keeping=stashing)

        nodes = segment.part.nodes
        if step.lists is None or any(n.random and n.op != "dropout" for n in nodes):
            return run(given, True)
        casts = any(n.region is not None and n.region.autocast for n in nodes)
        begin = Begin(run, self.lives(any(needs)), self.carried(wanted), step.scale, step.host, casts)
        scale = None if isinstance(step.scale, Tensor) else step.scale
        key = (wanted, scale, torch.are_deterministic_algorithms_enabled(), outside, *self.autocast)
        return step.lists.run(id(segment), key, given, begin, self.shelves)

    def outside(self, given: Mapping[str, Any]) -> frozenset[str]:
        """Of what the segment reads, the names of what lies in memory that lives anyway."""
        memory = () if self.keeping is None else self.keeping.outside
        return frozenset(n for n, t in given.items() if isinstance(t, Tensor) and storage_of(t) in memory)

    def lives(self, needs: bool) -> tuple[Life, ...]:
        """What a run may do."""
        if not needs:
            return (("forward",),)
        if self.segment.single_sweep:
            return (("sweep",),)
        once = ("forward", "backward")
        return (once, ("forward", "again", "backward")) if self.step.twice else (once,)

    def carried(self, wanted: frozenset[str]) -> frozenset[str]:
        """What may have a gradient: not outputs whose gradients others finish."""
        found = carried(self.segment.part.nodes, wanted)
        return found - self.segment.how.spared if isinstance(self.segment.how, Banded) else found

    def wanted(self, needs: tuple[bool, ...]) -> frozenset[str]:
        """What needs a gradient, of all that the segment reads."""
        return frozenset(n for n, need in zip(self.names, needs, strict=True) if need)

    def save(self, tensors: Iterable[Tensor]) -> None:
        """What backward reads: band by band, where a store takes it."""
        places = banded_inputs(self.step.program.graph, self.segment) if self.keeping is not None else {}
        rest = []
        for name, t in zip(self.names, tensors, strict=True):
            shelf = self.step.shelves.get(name)
            if shelf is None and self.keeping is not None and name in places:
                shelf = self.keeping.shelved(t, places[name])
            if shelf is None:
                rest.append(t.detach())
            else:
                self.shelves[name] = shelf
        self.saved = _Inputs.apply(self.token, *rest)  # type: ignore[no-untyped-call]

    def recalled(self) -> tuple[Tensor | Shelf, ...]:
        """What the segment read; raises if that was changed in place since forward."""
        assert self.saved is not None and self.saved.grad_fn is not None
        rest = iter(self.saved.grad_fn.saved_tensors)  # type: ignore[attr-defined]
        return tuple(self.shelves[n] if n in self.shelves else next(rest) for n in self.names)

    def done(self) -> None:
        self.run = self.saved = None
        self.shelves = {}
        self.earlier.pop(id(self.segment), None)

    def detached(self, tensors: Iterable[Tensor | Shelf]) -> dict[str, Any]:
        """What the segment reads by name, and the buffers that it changes."""
        given = zip(self.names, tensors, strict=True)
        found = {n: t if isinstance(t, Shelf) else t.detach() for n, t in given} | self.changed
        return found if self.seed is None else {**found, SEED: self.seed}


SEED = "seed of this step"
"""A tensor beside those that a segment reads, where it draws masks and runs from lists."""


class _BandedSegment(torch.autograd.Function):
    """One node of autograd's graph for a whole rows segment. Weights are inputs of the node, so that hooks
    on their gradients (DistributedDataParallel, FSDP) run as for any other operator."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        needs = tuple(ctx.needs_input_grad[1:]) if call.grad_enabled else (False,) * len(tensors)
        with as_it_was(call.autocast):
            outputs = call.forward(tensors, needs)
        ctx.call, ctx.needs = call, needs
        ctx.set_materialize_grads(False)
        names = call.segment.part.outputs
        if call.stored is not None:
            loss = call.segment.part.nodes[-1].name
            ctx.mark_non_differentiable(*(outputs[n] for n in names if n != loss))
        else:
            found = carried(call.segment.part.nodes, call.wanted(needs))
            ctx.mark_non_differentiable(
                *(outputs[n] for n in names if n not in found or not outputs[n].is_floating_point())
            )
        return tuple(outputs[n] for n in names)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RowtuneError(
                "second derivatives through a rows segment are not supported; use a plan of keep segments "
                "where create_graph=True is needed"
            )
        call: _Call = ctx.call
        if call.stored is not None:
            found = _scaled(call, next(g for g in grads if g is not None))
        else:
            found = _replay(ctx, call, grads)
        return (None, *found)


def _replay(ctx: Any, call: _Call, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    if (run := call.run) is None:
        raise RowtuneError("backward through a rows segment runs once, also with retain_graph=True")
    tensors = call.recalled()
    given = {n: g for n, g in zip(call.segment.part.outputs, grads, strict=True) if g is not None}
    run.recall(call.detached(tensors))
    like = tuple([_lay(t) for t in tensors])
    del tensors  # what is on shelves, or comes from a store, goes with its last use
    call.shelves = {}
    with as_it_was(call.autocast):
        made = run.backward(given)
    call.done()
    return _in_order(call, made, like, ctx.needs, _reached(call, given) - _finished(call))


def _lay(t: Tensor | Shelf) -> Tensor | Lay:
    if isinstance(t, Shelf):
        return t.lay
    return lay_of(t) if type(t) is Tensor else t


def _reached(call: _Call, given: Iterable[str]) -> set[str]:
    """Values that outputs with a gradient depend on. The others have no gradient, as opposed to a zero one:
    an optimizer leaves them alone."""
    found = set(given)
    for node in reversed(call.segment.part.nodes):
        if node.name in found and node.differentiable:
            found |= set(node.inputs)
    return found


def _finished(call: _Call) -> set[str]:
    """Statistics whose gradient went on to the tensor that they are of."""
    return {finish.total for finish in call.segment.finishes}


def _in_order(
    call: _Call,
    made: Gradients,
    tensors: tuple[Tensor | Lay, ...],
    needs: tuple[bool, ...],
    reached: set[str],
) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for name, tensor, need in zip(call.names, tensors, needs, strict=True):
        g = made.inputs.pop(name, None) if name in made.inputs else made.weights.pop(name, None)
        if not need or name not in reached:
            found.append(None)
        elif g is None:
            found.append(blank_like(tensor, tensor.dtype).zero_())
        else:
            found.append(g.to(tensor.dtype))
    return found


def _scaled(call: _Call, incoming: Tensor) -> list[Tensor | None]:
    """The stored gradients are for `scale` times the loss; autograd's own factor may differ."""
    made, call.stored = call.stored, None
    if made is None:
        raise RowtuneError("backward through a single sweep runs once; its gradients were handed on already")
    factor = incoming / call.step.scale
    found: list[Tensor | None] = []
    for name in call.names:
        g = made.inputs.pop(name, None) if name in made.inputs else made.weights.pop(name, None)
        found.append(None if g is None else g.mul_(factor.to(g.dtype)))
    return found
