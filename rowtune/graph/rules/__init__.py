"""The table of row rules: what each operator does to a band of rows.

To add an operator, write its rule next to its kin and name it here. An operator that is not in the table is
pointwise where PyTorch says so, and opaque otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from rowtune.graph.rules.contract import CONTRACTIONS
from rowtune.graph.rules.patches import PATCHES
from rowtune.graph.rules.pointwise import (
    batch_norm,
    dropout,
    elementwise,
    is_pointwise,
    layer_norm,
    like,
    linear,
    loss_sums,
    one_axis,
    per_image,
    pooled_axes,
    prelu,
    random,
)
from rowtune.graph.rules.reduce import (
    adaptive_avg,
    extremes,
    largest,
    mean_or_sum,
    moments,
    normalise,
    spread_of,
    take,
)
from rowtune.graph.rules.resample import RESAMPLES
from rowtune.graph.rules.rule import Opaque, Question, Read, RowRule, Slab, as_is
from rowtune.graph.rules.select import SELECTIONS
from rowtune.graph.rules.shape import SHAPES, WHOLE_RUNS
from rowtune.graph.rules.window import WINDOWS

RULES: dict[str, Callable[[Question], RowRule | Opaque]] = {
    **WINDOWS,
    **PATCHES,
    **RESAMPLES,
    **SHAPES,
    **SELECTIONS,
    **CONTRACTIONS,
    # Only other axes are mixed.
    "linear": linear,
    "softmax": one_axis(1, -1),
    "log_softmax": one_axis(1, -1),
    "glu": one_axis(1, -1),
    "cumsum": one_axis(1, 0),
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "batch_norm": batch_norm,
    "prelu": prelu,
    "amax": pooled_axes,
    "amin": pooled_axes,
    "var": pooled_axes,
    "std": pooled_axes,
    "argmax": pooled_axes,
    # Whole images are needed, but any number of them.
    "group_norm": per_image,
    "instance_norm": per_image,
    "adaptive_max_pool1d": per_image,
    "adaptive_max_pool2d": per_image,
    "adaptive_max_pool3d": per_image,
    # Copies and conversions that PyTorch does not mark as pointwise.
    **dict.fromkeys(
        ("contiguous", "clone", "to", "_to_copy", "detach", "alias", "zeros_like", "ones_like"),
        like,
    ),
    # Pointwise ones that some PyTorch releases do not mark.
    **dict.fromkeys(
        (
            *("hardswish", "rsub", "log_sigmoid", "relu6", "elu", "celu", "selu", "where"),
            *("leaky_relu", "__and__", "__or__", "__xor__"),
        ),
        elementwise,
    ),
    # Reductions, and what reads them.
    "moments": moments,
    "normalise": normalise,
    "mean": mean_or_sum,
    "sum": mean_or_sum,
    **dict.fromkeys((f"adaptive_avg_pool{n}d" for n in (1, 2, 3)), adaptive_avg),
    "largest": largest,
    "extremes": extremes,
    "spread_of": spread_of,
    "take": take,
    # Random masks; losses.
    "dropout": dropout,
    "loss_sums": loss_sums,
}

__all__ = ["RULES", "Opaque", "Question", "Read", "RowRule", "Slab", "rule_for"]


def rule_for(q: Question) -> RowRule | Opaque:
    """The rule of one node. A node that reads nothing banded is computed whole, once for all bands."""
    if q.node.effect and any(dim is not None for dim in q.dims.values()):
        return Opaque(f"{q.node.op} changes the buffer {q.node.effect}")
    if q.node.random and q.node.op != "dropout":
        return random(q)
    if all(dim is None for dim in q.dims.values()):
        return RowRule(None, {name: Read() for name in q.node.inputs}, WHOLE_RUNS.get(q.node.op, as_is))
    found = RULES.get(q.node.op)
    if found is None:
        if not is_pointwise(q.node.target):
            return Opaque(f"{q.node.op} has no row rule")
        found = elementwise
    return found(q)
