"""Which plans there may be: every rule, in four tables.

A rule says why not, or nothing. Those of the first table look at a plan as a whole, those of the second at a
segment by itself, those of the third at a segment in its plan, those of the fourth at where it stands in a
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, get_args

from rowtune.plan.choices import LOSSY, OF_A_PLAN, OF_A_SEGMENT

if TYPE_CHECKING:
    from rowtune.plan.plan import Plan, Segment


class Place(Protocol):
    """Where a segment stands."""

    @property
    def not_banded(self) -> str:
        """Why its nodes have no bands of rows; empty: they have."""

    @property
    def barriers(self) -> int:
        """How many lie inside it, along the axis that it has bands along."""

    @property
    def mixes_images(self) -> bool:
        """Whether some of its images cannot be computed without the others."""

    @property
    def inside(self) -> bool:
        """Whether it is a part of a checkpoint."""


def legal(plan: Plan) -> str:
    """Why no file could hold this plan; empty: one could."""
    return _first(rule(plan) for rule in PLAN) or _first(
        alone(segment) or _first(rule(segment, plan) for rule in IN_PLAN) for segment in plan.segments
    )


def alone(segment: Segment) -> str:
    """Why there is no such segment, whatever the graph; empty: there may be."""
    return _first(map(alone, segment.inside)) or _first(rule(segment) for rule in SEGMENT)


def there(segment: Segment, place: Place) -> str:
    """Why the segment cannot be at this place of a graph; empty: it can."""
    return _first(rule(segment, place) for rule in PLACE)


def _first(found: Iterable[str]) -> str:
    return next((why for why in found if why), "")


def _span(segment: Segment) -> str:
    return f"segment {segment.first}..{segment.last}"


def _choices(made: Any, choices: dict[str, Any]) -> str:
    for key, kind in choices.items():
        if getattr(made, key) not in get_args(kind):
            return f"{key} is one of {', '.join(get_args(kind))}, not {getattr(made, key)!r}"
    return ""


# -- of a plan -------------------------------------------------------------------------------------------


def _plan_choices(plan: Plan) -> str:
    return _choices(plan, OF_A_PLAN)


def _axis(plan: Plan) -> str:
    there_is = type(plan.axis) is int and plan.axis >= 2
    return "" if there_is else f"axis is a spatial dimension of the inputs (2 or more), not {plan.axis!r}"


def _in_backward(plan: Plan) -> str:
    if type(plan.step_in_backward) is not bool:
        return f"step_in_backward is true or false, not {plan.step_in_backward!r}"
    if plan.step_in_backward and plan.dtype == "fp16":
        return (
            "step_in_backward does not go with dtype fp16: loss scaling looks at all gradients before the "
            "first is used; take dtype bf16, or leave step_in_backward out"
        )
    return ""


def _state_by_parameter(plan: Plan) -> str:
    if plan.optimizer_state == "host" and plan.dtype == "fp16":
        return (
            "optimizer_state host does not go with dtype fp16: loss scaling steps all parameters at once; "
            "take dtype bf16, or optimizer_state device"
        )
    return ""


def _error(plan: Plan) -> str:
    error = plan.max_grad_error
    if type(error) not in (int, float) or not 0 <= error < math.inf:
        return f"max_grad_error is a number of at least 0, not {error!r}"
    return ""


def not_captured(plan: Plan) -> str:
    """Why no CUDA graph can hold this plan's steps; empty: one may."""
    if plan.step_in_backward:
        return "with step_in_backward the optimizer uses gradients as they come"
    if plan.waiting_gradients == "host" or any(s.store == "host" for s in plan.segments):
        return (
            "what it keeps goes to the host's memory (store or waiting_gradients host), by the host's copies"
        )
    return ""


def _captured(plan: Plan) -> str:
    why = not_captured(plan) if plan.capture == "on" else ""
    return f"capture on: {why}, which is nothing that a CUDA graph repeats; take capture off" if why else ""


PLAN: tuple[Callable[[Plan], str], ...] = (
    _plan_choices, _axis, _in_backward, _state_by_parameter, _error, _captured,
)  # fmt: skip


# -- of a segment by itself ------------------------------------------------------------------------------


def _segment_choices(segment: Segment) -> str:
    return _choices(segment, OF_A_SEGMENT)


def _whole_numbers(segment: Segment) -> str:
    for key in ("band_rows", "images", "band_cols"):
        value = getattr(segment, key)
        if type(value) is not int or value < 0:
            return f"{key} is a whole number of at least 0, not {value!r}"
    return ""


def _bands_have_a_size(segment: Segment) -> str:
    if segment.policy == "rows" and segment.band_rows < 1 and segment.images < 1:
        return f"{_span(segment)}: rows needs band_rows or images of at least 1"
    return ""


def _cheap_is_left_out_of_keep(segment: Segment) -> str:
    if segment.cheap == "recompute" and segment.policy != "keep":
        return (
            f"{_span(segment)}: cheap recompute leaves out what a keep segment need not "
            f"keep; policy {segment.policy} recomputes by itself: take cheap store"
        )
    return ""


def _only_checkpoints_have_parts(segment: Segment) -> str:
    if segment.inside and segment.policy != "checkpoint":
        return f"{_span(segment)}: only a checkpoint has segments inside"
    return ""


def _parts_keep_everything(segment: Segment) -> str:
    lean = [s for s in segment.parts if s.cheap == "recompute"]
    if lean:
        return (
            f"{_span(lean[0])} lies inside a checkpoint, which keeps "
            "everything while it is recomputed: take cheap store"
        )
    return ""


def _parts_keep_nothing_between(segment: Segment) -> str:
    stored = [s for s in segment.parts if s.store != "device"]
    if stored:
        return (
            f"{_span(stored[0])} lies inside a checkpoint and keeps nothing from "
            f"forward to backward; give store {stored[0].store} to {segment.first}..{segment.last}"
        )
    return ""


def _images_are_the_parts(segment: Segment) -> str:
    return (
        f"{_span(segment)}: give images to the segments inside" if segment.inside and segment.images else ""
    )


def _one_axis(segment: Segment) -> str:
    return (
        "band_cols (a second band axis) is reserved; this version bands one axis" if segment.band_cols else ""
    )


def _names(segment: Segment) -> str:
    named = isinstance(segment.first, str) and isinstance(segment.last, str)
    return "" if named else "a segment's first and last are node names"


SEGMENT: tuple[Callable[[Segment], str], ...] = (
    _segment_choices, _whole_numbers, _bands_have_a_size, _cheap_is_left_out_of_keep,
    _only_checkpoints_have_parts, _parts_keep_everything, _parts_keep_nothing_between, _images_are_the_parts,
    _one_axis, _names,
)  # fmt: skip


# -- of a segment in its plan ----------------------------------------------------------------------------


def _rounds_where_it_may(segment: Segment, plan: Plan) -> str:
    if segment.store in LOSSY and not plan.max_grad_error:
        return (
            f"{_span(segment)}: store {segment.store} rounds what it keeps, and "
            "the plan allows no error of gradients; give it max_grad_error, or take store host"
        )
    return ""


IN_PLAN: tuple[Callable[[Segment, Plan], str], ...] = (_rounds_where_it_may,)


# -- of a segment at its place ---------------------------------------------------------------------------


def _rows_can_be_banded(segment: Segment, place: Place) -> str:
    why = place.not_banded if segment.policy == "rows" else ""
    return f"{_span(segment)} cannot be banded: {why}" if why else ""


def _stashes_are_not_made_again(segment: Segment, place: Place) -> str:
    if segment.policy != "rows" or segment.halo != "cache":
        return ""
    kept = f"{_span(segment)}: halo cache keeps rows from forward to backward; "
    if place.inside:
        return f"{kept}inside a checkpoint rows take halo sweep or recompute"
    if segment.barriers != "store" and place.barriers:
        return f"{kept}barriers {segment.barriers} takes halo sweep or recompute"
    return ""


def _checkpointed_images_are_apart(segment: Segment, place: Place) -> str:
    if segment.policy == "checkpoint" and segment.images and place.mixes_images:
        return f"{_span(segment)} mixes images; checkpoint it whole"
    return ""


def _keep_has_no_images(segment: Segment, _: Place) -> str:
    return f"{_span(segment)}: keep takes no images" if segment.policy == "keep" and segment.images else ""


PLACE: tuple[Callable[[Segment, Place], str], ...] = (
    _rows_can_be_banded, _stashes_are_not_made_again, _checkpointed_images_are_apart,
    _keep_has_no_images,
)  # fmt: skip
