"""A plan: the few decisions from which everything the runtime does is derived.

A plan is a list of segments that cover the graph's nodes in order; each names its first and last node and
how its interior is computed. It holds no sizes that depend on the device, and no code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rowtune.errors import PlanError
from rowtune.plan.choices import (
    LOSSY,
    Barriers,
    Capture,
    Cheap,
    Halo,
    Home,
    Layout,
    Policy,
    Precision,
    Store,
    Tapes,
)
from rowtune.plan.legal import legal


@dataclass(frozen=True, slots=True)
class Segment:
    """Nodes `first` to `last` (inclusive, topological order) and how they are computed.

    policy      keep: as PyTorch; checkpoint: recomputed from its inputs; rows: a band of rows at a time
    band_rows   rows of the segment's tallest output in one band; 0: bands of images alone (micro-batches)
    halo        recompute: every band on its own (LR-CNN's OverL); cache: boundary rows kept (2PS);
                sweep: one pass of line buffers, forward ahead and backward a receptive field behind
    images      batch entries computed at a time, 0 for the whole batch
    tapes       split: made with the forward, ending where gradients arrive; whole: one tape a band (fewer
                steps, more memory); replay: made when the gradient of some rows is there, from line buffers
                and without running convolutions again; late: likewise, for pairs of layers with a halo, the
                first of which is run again (least memory)
    barriers    where all rows must have passed (a train-mode norm, a global pool) inside a rows segment:
                store: keep the tensor there; recompute: make it again in backward, from the segment's inputs;
                passes: never make it, stream the segment once more for each barrier;
                narrow: recompute, but passes for tensors that are wider than what they are made from
    store       where what the segment keeps from forward to backward stays (keep: what autograd saves; the
                others: their inputs, and the rows that halo cache stashes). device: where it is made; host:
                offloaded; bf16, fp16, int8, int4: rounded, for which the plan says how much error it
                may cost
    cheap       what is cheap to make in a keep segment (norms, activations, pools, joins; no convolution).
                store: kept like the rest; recompute: made again in backward, from the least that has to be
                kept for it
    inside      segments that a checkpoint is made of: run one by one when it is recomputed, each as it says
                itself, so that their own recomputations take turns (recursive checkpointing, as in Chen et
                al., "Training deep nets with sublinear memory cost", arXiv 1604.06174)
    band_cols   reserved: rows of a second band axis
    """

    first: str
    last: str
    policy: Policy = "keep"
    band_rows: int = 0
    halo: Halo = "sweep"
    images: int = 0
    tapes: Tapes = "split"
    barriers: Barriers = "store"
    store: Store = "device"
    cheap: Cheap = "store"
    band_cols: int = 0
    inside: tuple[Segment, ...] = ()

    def leaves(self) -> list[Segment]:
        """The segments that it is made of and that are made of no others: itself, where there are none."""
        return [leaf for s in self.inside for leaf in s.leaves()] if self.inside else [self]

    @property
    def parts(self) -> list[Segment]:
        """All that lies inside, however deep."""
        return [each for s in self.inside for each in (s, *s.parts)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; fields at their default are left out."""
        found: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("first", "last", "policy") or value != f.default:
                found[f.name] = [s.to_dict() for s in value] if f.name == "inside" else value
        return found


@dataclass(frozen=True)
class Plan:
    """Segments in order, and what holds for the whole step.

    axis    the band axis of the inputs (2: the first spatial one)
    layout  how feature maps lie in memory: channels_last brings the inputs into it, operators hand it on
    dtype   bf16, fp16: the step runs under autocast; fp16 wants its loss scaled (`RowtuneModule.loss_scale`)
    step_in_backward
            the optimizer uses each gradient as soon as it is complete, and lets go of it
            (rowtune.step_in_backward); not with clipping or accumulation, which look at all of them
    max_grad_error
            of gradients, relative, that stores which round may cost; 0: none of them is allowed
    optimizer_state
            where it stays between updates. host: each parameter's is brought to the device for its own
            update and put back (rowtune.step_from_host; step_in_backward likewise, a parameter at a time)
    waiting_gradients
            where gradients of what skips over segments are until backward comes to its maker
    capture on: forward and backward are replayed as one CUDA graph (rowtune.capture); on other devices steps
            run as ever
    """

    segments: tuple[Segment, ...]
    axis: int = 2
    layout: Layout = "contiguous"
    dtype: Precision = "as given"
    step_in_backward: bool = False
    max_grad_error: float = 0.0
    optimizer_state: Home = "device"
    waiting_gradients: Home = "device"
    capture: Capture = "off"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; fields at their default are left out."""
        whole = [f for f in fields(self) if f.name in ("axis",) or getattr(self, f.name) != f.default]
        found = {f.name: getattr(self, f.name) for f in whole}
        return {**found, "segments": [s.to_dict() for s in self.segments]}

    @property
    def allowed_error(self) -> float:
        """Of gradients: what stores that round may cost; 0 where none is taken."""
        return self.max_grad_error if any(s.store in LOSSY for s in self.segments) else 0.0

    def leaves(self) -> tuple[Segment, ...]:
        """The segments that are made of no others, in order."""
        return tuple(leaf for s in self.segments for leaf in s.leaves())

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """The inverse, strict: PlanError names the first unknown key or value out of range."""
        if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
            raise PlanError("the plan's decisions have no list of segments")
        unknown = set(data) - {f.name for f in fields(Plan)}
        if unknown:
            raise PlanError(f"the plan's decisions have an unknown key {sorted(unknown)[0]!r}")
        segments = tuple(_segment(item) for item in data["segments"])
        return checked(Plan(**{**data, "segments": segments}))


def checked(plan: Any) -> Plan:
    """The plan, if a file could hold it: PlanError names the first value out of range."""
    if not isinstance(plan, Plan):
        raise PlanError(f"a plan is a rowtune.Plan (uniform_plan makes one), not {plan!r}")
    if why := legal(plan):
        raise PlanError(why)
    return plan


def _segment(data: Any) -> Segment:
    names = {f.name for f in fields(Segment)}
    if not isinstance(data, dict) or not {"first", "last"} <= set(data) <= names:
        raise PlanError(f"a segment has keys {', '.join(sorted(names))}; found {data!r}")
    inside = data.get("inside", [])
    if not isinstance(inside, list):
        raise PlanError(f"inside is a list of segments, not {inside!r}")
    return Segment(**{**data, "inside": tuple(_segment(item) for item in inside)})
