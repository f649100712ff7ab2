"""Run one segment on the environment of a step: keep and checkpoint as PyTorch does, rows in bands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rowtune.graph.graph import Node
from rowtune.plan.choices import LOSSY
from rowtune.plan.program import Banded, Checkpoint, Passes, SegmentProgram, Whole
from rowtune.runtime.evaluate import run_whole
from rowtune.runtime.rows_call import run_rows
from rowtune.runtime.step_run import Env, StepRun
from rowtune.runtime.stores.keeping import Keeping, saving
from rowtune.runtime.stores.remade import Remaking
from rowtune.runtime.stores.shelf import Shelf, banded_inputs
from rowtune.runtime.stores.wanted import not_kept


def run_segment(step: StepRun, segment: SegmentProgram, env: Env) -> None:
    """Add the segment's outputs to `env`."""
    if step.skips is None or not (segment.leaves or segment.returns) or not torch.is_grad_enabled():
        _run_segment(step, segment, env)
        return
    read = {n: env[n] for n in segment.leaves}
    env |= step.skips.leaving(segment, env)
    _run_segment(step, segment, env)
    env |= read
    env |= step.skips.coming(segment, env)


def _run_segment(step: StepRun, segment: SegmentProgram, env: Env) -> None:
    keeping = step.keeping(segment)
    match segment.how:
        case Banded() | Passes():
            run_rows(step, segment, env, keeping)
        case Checkpoint() as run if torch.is_grad_enabled():
            with saving(keeping):
                _run_checkpoint(step, segment, run, env, _first_shelves(step, segment, run, env, keeping))
        case Checkpoint() as run:
            env |= _run_parts(step, segment, run, env)
        case Whole() as run:
            _run_kept(step, segment, run, env, keeping)
    if keeping is not None:
        step.host.settle()


def _run_kept(step: StepRun, segment: SegmentProgram, run: Whole, env: Env, keeping: Keeping | None) -> None:
    """Every node in order, values dropped after their last reader."""
    first_time = id(segment) not in step.earlier
    step.earlier[id(segment)] = None
    made: Env = {}

    def lookup(name: str) -> Any:
        return made[name] if name in made else env[name]

    hooks: Keeping | Remaking | None = keeping
    run_node: Callable[[Node, Callable[[str], Any]], Any]
    run_node = partial(run_whole, seed=step.seed, first_time=first_time)
    if segment.decision.cheap == "recompute" and torch.is_grad_enabled():
        spared = not_kept(segment, env)
        hooks = remaking = Remaking(spared, step.seed, keeping, segment.decision.store in LOSSY)
        run_node = remaking.run
    with saving(hooks):
        for node, drops in zip(segment.part.nodes, run.drops, strict=True):
            made[node.name] = run_node(node, lookup)
            for name in drops:
                made.pop(name, None)
    env |= {o: made[o] for o in segment.part.outputs}


def _run_parts(step: StepRun, segment: SegmentProgram, run: Checkpoint, env: Env) -> Env:
    """The outputs of the parts, one after another."""
    made = {n: env[n] for n in (*segment.part.inputs, *segment.part.weights) if n in env}
    for part, dead in zip(run.parts, run.dead, strict=True):
        run_segment(step, part, made)
        for name in dead:
            made.pop(name, None)
    return {o: made[o] for o in segment.part.outputs}


def _first_shelves(
    step: StepRun, segment: SegmentProgram, how: Checkpoint, env: Env, keeping: Keeping | None
) -> dict[str, Shelf]:
    """Of a checkpoint's inputs in a store those that only its first part reads, a band of rows at a time."""
    first, *others = how.parts
    if keeping is None or not isinstance(first.how, Banded):
        return {}
    elsewhere = {n for part in others for n in part.part.inputs}.union(segment.part.outputs)
    found = {}
    for name, place in banded_inputs(step.program.graph, first).items():
        if name in segment.part.inputs and name not in elsewhere:
            if (shelf := keeping.shelved(env[name], place)) is not None:
                found[name] = shelf
    return found


def _run_checkpoint(
    step: StepRun, segment: SegmentProgram, how: Checkpoint, env: Env, shelves: Mapping[str, Shelf]
) -> None:
    """PyTorch's own checkpoint; buffers (running statistics) change only the first time. What is on shelves
    is there as a tensor the first time only, and has a stand-in without memory from then on."""
    weights = {n: env[n] for n in segment.part.weights}
    weights |= {n: env[n] for n in segment.part.inputs if not isinstance(env[n], Tensor)}
    names = [n for n in segment.part.inputs if n not in weights and n not in shelves]
    step = replace(step, twice=True, shelves=shelves)
    once = {n: env[n] for n in shelves}
    wanted = {n: t.requires_grad for n, t in once.items()}

    def run(*tensors: Tensor) -> tuple[Any, ...]:
        given = {n: once.pop(n) if n in once else s.stand_in(wanted[n]) for n, s in shelves.items()}
        given |= weights | dict(zip(names, tensors, strict=True))
        made = _run_parts(step, segment, how, given)
        return tuple(made[o] for o in segment.part.outputs)

    inputs = [env[n] for n in names]
    outputs = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    env |= dict(zip(segment.part.outputs, outputs, strict=True))
