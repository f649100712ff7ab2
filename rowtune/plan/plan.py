"""A plan: the few decisions from which everything the runtime does is derived.

A plan is a list of segments that cover the graph's nodes in order; each names its first and last node and
how its interior is computed. It holds no sizes that depend on the device, and no code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rowtune.errors import PlanError

Policy = Literal["keep", "checkpoint", "rows"]
Halo = Literal["recompute", "cache", "sweep"]
Tapes = Literal["split", "whole", "late", "replay"]
Barriers = Literal["store", "recompute", "narrow", "passes"]
Layout = Literal["contiguous", "channels_last"]
Precision = Literal["as given", "bf16", "fp16"]
Cheap = Literal["store", "recompute"]
Home = Literal["device", "host"]
Store = Literal["device", "host", "bf16", "fp16", "int8", "int4"]

LOSSY: frozenset[Store] = frozenset({"bf16", "fp16", "int8", "int4"})
"""Stores that give back something else than they were given."""


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
    optimizer_state
            where it stays between updates. host: each parameter's is brought to the device for its own
            update and put back (rowtune.step_from_host; step_in_backward likewise, a parameter at a time)
    waiting_gradients
            where gradients of what skips over segments are until backward comes to its maker
    max_grad_error
            of gradients, relative, that stores which round may cost; 0: none of them is allowed
    """

    segments: tuple[Segment, ...]
    axis: int = 2
    layout: Layout = "contiguous"
    dtype: Precision = "as given"
    step_in_backward: bool = False
    optimizer_state: Home = "device"
    waiting_gradients: Home = "device"
    max_grad_error: float = 0.0

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
        return tuple(leaf for s in self.segments for leaf in _leaves(s))

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
    _check_choices(plan, WHOLE)
    if type(plan.axis) is not int or plan.axis < 2:
        raise PlanError(f"axis is a spatial dimension of the inputs (2 or more), not {plan.axis!r}")
    if type(plan.step_in_backward) is not bool:
        raise PlanError(f"step_in_backward is true or false, not {plan.step_in_backward!r}")
    if plan.step_in_backward and plan.dtype == "fp16":
        raise PlanError(
            "step_in_backward does not go with dtype fp16: loss scaling looks at all gradients before the "
            "first is used; take dtype bf16, or leave step_in_backward out"
        )
    if plan.optimizer_state == "host" and plan.dtype == "fp16":
        raise PlanError(
            "optimizer_state host does not go with dtype fp16: loss scaling steps all parameters at once; "
            "take dtype bf16, or optimizer_state device"
        )
    error = plan.max_grad_error
    if type(error) not in (int, float) or not 0 <= error < math.inf:
        raise PlanError(f"max_grad_error is a number of at least 0, not {error!r}")
    for segment in plan.segments:
        _check(segment)
        if segment.store in LOSSY and not error:
            raise PlanError(
                f"segment {segment.first}..{segment.last}: store {segment.store} rounds what it keeps, and "
                "the plan allows no error of gradients; give it max_grad_error, or take store host"
            )
    return plan


WHOLE = {"layout": Layout, "dtype": Precision, "optimizer_state": Home, "waiting_gradients": Home}


def _leaves(segment: Segment) -> list[Segment]:
    return [leaf for s in segment.inside for leaf in _leaves(s)] if segment.inside else [segment]


def _segment(data: Any) -> Segment:
    names = {f.name for f in fields(Segment)}
    if not isinstance(data, dict) or not {"first", "last"} <= set(data) <= names:
        raise PlanError(f"a segment has keys {', '.join(sorted(names))}; found {data!r}")
    inside = data.get("inside", [])
    if not isinstance(inside, list):
        raise PlanError(f"inside is a list of segments, not {inside!r}")
    return Segment(**{**data, "inside": tuple(_segment(item) for item in inside)})


def _check_choices(made: Any, choices: dict[str, Any]) -> None:
    for key, kind in choices.items():
        if getattr(made, key) not in get_args(kind):
            raise PlanError(f"{key} is one of {', '.join(get_args(kind))}, not {getattr(made, key)!r}")


def _check(made: Segment) -> None:
    for inner in made.inside:
        _check(inner)
    choices = {"policy": Policy, "halo": Halo, "tapes": Tapes, "barriers": Barriers, "store": Store}
    choices["cheap"] = Cheap
    _check_choices(made, choices)
    for key in ("band_rows", "images", "band_cols"):
        value = getattr(made, key)
        if type(value) is not int or value < 0:
            raise PlanError(f"{key} is a whole number of at least 0, not {value!r}")
    if made.policy == "rows" and made.band_rows < 1 and made.images < 1:
        raise PlanError(f"segment {made.first}..{made.last}: rows needs band_rows or images of at least 1")
    if made.cheap == "recompute" and made.policy != "keep":
        raise PlanError(
            f"segment {made.first}..{made.last}: cheap recompute leaves out what a keep segment need not "
            f"keep; policy {made.policy} recomputes by itself: take cheap store"
        )
    if made.inside and made.policy != "checkpoint":
        raise PlanError(f"segment {made.first}..{made.last}: only a checkpoint has segments inside")
    inside = [s for inner in made.inside for s in (inner, *_leaves(inner))]
    lean = [s for s in inside if s.cheap == "recompute"]
    if lean:
        raise PlanError(
            f"segment {lean[0].first}..{lean[0].last} lies inside a checkpoint, which keeps "
            "everything while it is recomputed: take cheap store"
        )
    stored = [s for s in inside if s.store != "device"]
    if stored:
        raise PlanError(
            f"segment {stored[0].first}..{stored[0].last} lies inside a checkpoint and keeps nothing from "
            f"forward to backward; give store {stored[0].store} to {made.first}..{made.last}"
        )
    if made.inside and made.images:
        raise PlanError(f"segment {made.first}..{made.last}: give images to the segments inside")
    if made.band_cols:
        raise PlanError("band_cols (a second band axis) is reserved; this version bands one axis")
    if not isinstance(made.first, str) or not isinstance(made.last, str):
        raise PlanError("a segment's first and last are node names")
