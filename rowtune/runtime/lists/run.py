"""Rows segments run from lists: what a run calls is written down once, and from then on only called."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rowtune.runtime.blank import answers_for
from rowtune.runtime.gradients import Gradients
from rowtune.runtime.lists.kinds import Begin, Kind, Life, Traced, layout_of, named, read, written
from rowtune.runtime.recording import View
from rowtune.runtime.stores.shelf import Shelf
from rowtune.torch_private import below_autograd

NO_SHELVES: Mapping[str, Shelf] = {}
MOST_KINDS = 8
"""Kinds of runs of one segment that are written down; the others are traced each time."""


class Lists:
    """All that was written down for one module.

    Args:
        after: runs of a kind that are traced before it is written down. To write takes longer than to trace,
            and what runs once (a verification, an odd batch) need not be written.
    """

    def __init__(self, after: int = 1) -> None:
        self.after = after
        self.kinds: dict[Hashable, dict[Hashable, Kind]] = {}
        self._seen: Counter[Hashable] = Counter()

    def run(
        self,
        segment: Hashable,
        key: Hashable,
        tensors: dict[str, Tensor],
        begin: Begin,
        shelves: Mapping[str, Shelf] = NO_SHELVES,
    ) -> Traced:
        """A run of a segment; `key` is what its calls depend on beside its tensors, of which some are on
        `shelves` after forward."""
        devices = {t.device for t in tensors.values()}
        if len(devices) > 1 or not all(type(t) in (Tensor, nn.Parameter) for t in tensors.values()):
            return begin.run(tensors, True)
        (device,) = devices
        kinds = self.kinds.setdefault(segment, {})
        key = (key, begin.lives, *shelves, device, layout_of(tensors))
        if key not in kinds and len(kinds) < MOST_KINDS and self._often(hash((segment, key))):
            kinds[key] = written(answers_for(device).call, tensors, shelves, begin)
        kind = kinds.get(key)
        return begin.run(tensors, True) if kind is None or kind.why_not else Run(kind, tensors, begin)

    def _often(self, kind: int) -> bool:
        """Whether a kind has come often enough to be written down."""
        self._seen[kind] += 1
        return self._seen[kind] > self.after

    def why_not(self) -> set[str]:
        """Why some runs are traced each time."""
        return {why for segment in self.kinds for why in self.why_traced(segment)}

    def why_traced(self, segment: Hashable) -> set[str]:
        """Why some runs of one segment are."""
        return {kind.why_not for kind in self.kinds.get(segment, {}).values() if kind.why_not}


class Run:
    """One run of what was written down; between its sections it keeps what they read of each other."""

    def __init__(self, kind: Kind, tensors: Mapping[str, Tensor | Shelf], begin: Begin) -> None:
        self.kind, self.tensors, self.begin = kind, tensors, begin
        self.life: Life = ()
        self.state: dict[View, Tensor] = {}

    def recall(self, tensors: Mapping[str, Tensor | Shelf]) -> None:
        self.tensors = tensors

    def forget(self) -> None:
        self.tensors = {}

    def forward(self) -> dict[str, Tensor]:
        made = self._section("forward", {})
        assert made is not None, "a run begins as it was written down"
        return made["out"]

    def single_sweep(self, scale: Tensor | float) -> tuple[dict[str, Tensor], Gradients]:
        made = self._section("sweep", {"scale": scale} if isinstance(scale, Tensor) else {})
        assert made is not None, "a run begins as it was written down"
        return made["out"], Gradients(made["input"], made["weight"])

    def again(self) -> dict[str, Tensor]:
        made = self._section("again", {})
        return self.begin.run(self.tensors, False).forward() if made is None else made["out"]

    def backward(self, grads: Mapping[str, Tensor]) -> Gradients:
        place = ((*self.life, "backward"), layout_of(grads))
        if place not in self.kind.steps:
            self.kind.learn(place, self.begin, grads)
        made = self._section("backward", grads)
        if made is None:  # traced, from the inputs on; no buffer changes a second time
            run = self.begin.run(self.tensors, False)
            run.forward()
            return run.backward(grads)
        return Gradients(made["input"], made["weight"])

    def _section(self, name: str, more: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
        """The results by kind; None where this run cannot go on as it was written down."""
        if self.life and layout_of(whole(self.tensors)) != self.kind.layout:
            return None
        life = self.life if name in self.life else (*self.life, name)
        step = self.kind.steps.get((life, layout_of(more) if name == "backward" else None))
        if step is None or not all(view in self.state for view in step.state):
            return None
        self.life = life
        given = {**read(self.tensors), **named(name, more)}
        tensors = [*(given[key] for key in step.given), *(self.state[view] for view in step.state)]
        del given
        if name == "backward":
            self.state, self.tensors = {}, {}  # what is left over from forward goes as it is used
        for renew in step.renew:
            renew()
        made = _called(step.function, tensors)
        self.state |= zip(step.leaves, made[len(step.results) :], strict=True)
        found: dict[str, dict[str, Tensor]] = {"out": {}, "input": {}, "weight": {}}
        for (kind, key), t in zip(step.results, made, strict=False):
            found[kind][key] = t
        return found


def whole(tensors: Mapping[str, Tensor | Shelf]) -> dict[str, Tensor]:
    """Those that are on no shelf."""
    return {n: t for n, t in tensors.items() if isinstance(t, Tensor)}


def _called(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Casts are among the calls already, and gradients are made by calls."""
    kind = tensors[0].device.type if tensors else "cpu"
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    without = torch.autocast(kind, enabled=False) if casts else contextlib.nullcontext()
    with without, below_autograd():
        made: tuple[Tensor, ...] = function(tensors)
    return made
