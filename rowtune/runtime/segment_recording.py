"""A recording of one segment, and how it fits to those of its neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rowtune.runtime.blank import Signature
from rowtune.runtime.recording import Buffer, Recording, Use

Work = tuple[tuple[Signature, int], ...]
"""Calls by what they do, and how often each is called."""


def work_of(uses: Iterable[Use]) -> Work:
    """All that calls do, and how often."""
    often: dict[int, int] = {}  # by object: a signature's hash takes longer than all else here
    which: dict[int, Signature] = {}
    for use in uses:
        if use.does is not None:
            at = id(use.does)
            which[at] = use.does
            often[at] = often.get(at, 0) + use.times
    found: dict[Signature, int] = {}
    for at, signature in which.items():
        found[signature] = found.get(signature, 0) + often[at]
    return tuple(found.items())


class Crossing(NamedTuple):
    """A tensor that goes into a segment or comes out of it: a value, or a gradient of one. It lies in memory
    of `bytes` bytes; crossings with one number `memory` share it. `wanted`: gradients flow through it."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    bytes: int
    memory: int
    wanted: bool = False


@dataclass(frozen=True)
class SegmentRecording:
    """The first `forward` calls are the segment's forward, the others, up to `calls`, its backward. (The
    recording lists none where only the lives of buffers were asked for.)

    By the names of values, the buffers of what it reads, of the model's own tensors, of the gradients that it
    is handed (of its outputs, and of inputs that later segments read as well) and of those that it adds to
    the model's. What it makes and the gradients that it hands on are crossings whose memory is the number of
    a buffer; of a parameter that an earlier segment reads too, it hands the gradient on as of an input.
    `left_out` are buffers that no call here makes: those of bands that are like others and were not run.
    Forward leaves `host_bytes` on the host. `uses` are what its calls do and look at, `work` the calls of all
    bands by what they do, and `host` is how many there are, views included; all three are left empty by a
    recorder that does not count. `used` are gradients of the model's that the optimizer uses in backward.
    """

    recording: Recording
    forward: int
    calls: int
    inputs: dict[str, int]
    weights: dict[str, int]
    outputs: tuple[Crossing, ...]
    outer: dict[str, int]
    gradients: tuple[Crossing, ...]
    weight_gradients: dict[str, int]
    left_out: tuple[Buffer, ...] = ()
    host_bytes: int = 0
    uses: tuple[Use, ...] = ()
    work: Work = ()
    host: int = 0
    used: frozenset[int] = frozenset()

    @property
    def kept(self) -> tuple[int, ...]:
        """The buffers that forward leaves for backward."""
        model = {*self.weights.values()}
        return tuple(
            n
            for n, b in enumerate(self.recording.buffers)
            if n not in model and b.born < self.forward and (b.died is None or b.died >= self.forward)
        )
