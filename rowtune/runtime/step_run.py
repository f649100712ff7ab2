"""One step of a program as it runs: what all of its segments share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rowtune.plan.program import Program, SegmentProgram
from rowtune.runtime.dropout import Seed
from rowtune.runtime.lists.kinds import Traced
from rowtune.runtime.lists.run import Lists
from rowtune.runtime.stores import STORES
from rowtune.runtime.stores.host import HostPool
from rowtune.runtime.stores.keeping import Keeping
from rowtune.runtime.stores.shelf import Shelf
from rowtune.runtime.waiting import Skips

Env = dict[str, Any]
Engine = Literal["listed", "traced"]
"""What runs rows segments: the calls that a run of their schedule made, or the schedule itself."""

Earlier = dict[int, Traced | None]
"""What the first forward of a step left, by segment (its id), for a checkpoint around it to run it again:
None for segments without rows."""


@dataclass(frozen=True)
class StepRun:
    """One forward call of a program, and its backward.

    `seed` is that of its random masks, `scale` multiplies gradients that are made inside forward. Rows
    segments run from `lists`; without, their schedules run. Inside a checkpoint segments run `twice`.
    `outside` is memory that lives anyway, by `storage_of`; stores on the host are in `host`, and what waits
    there of gradients is in `skips`. Inside a checkpoint `shelves` have what its first rows read.
    """

    program: Program
    seed: Seed = 0
    scale: float | Tensor = 1.0
    lists: Lists | None = None
    earlier: Earlier = field(default_factory=dict)
    twice: bool = False
    outside: frozenset[int] = frozenset()
    host: HostPool = field(default_factory=HostPool)
    skips: Skips | None = None
    shelves: Mapping[str, Shelf] = field(default_factory=dict)

    def keeping(self, segment: SegmentProgram) -> Keeping | None:
        """What puts into a store what the segment keeps; None: that stays where it is. Inside a checkpoint
        nothing is kept."""
        store = segment.decision.store
        if store == "device" or self.twice or not torch.is_grad_enabled():
            return None
        return Keeping(STORES[store](self.host), self.outside)
