"""What a Python user hands over as a loss -> a Loss: a name, one of torch.nn's modules, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from rowtune.errors import UsageError
from rowtune.graph import losses
from rowtune.graph.losses import LOSSES, Loss


def as_loss(given: Any) -> Loss | None:
    """None stays None.

    torch.nn's usual losses become rowtune's own, which can be banded; any other function takes whole outputs
    (or rows, where it has `row_local = True`: see losses.row_local).

    Raises:
        UsageError: it is none of these.
    """
    if given is None or isinstance(given, Loss):
        return given
    if isinstance(given, str):
        return losses.parse(given)
    if isinstance(given, type) or not callable(given):
        raise UsageError(
            f"loss is a name ({', '.join(LOSSES)} or module:function), a torch.nn loss such as "
            f"nn.CrossEntropyLoss(), or a function (output, target) -> scalar, not {given!r}"
        )
    name = getattr(given, "__name__", type(given).__name__)
    if type(given) in _MODULES and (own := _MODULES[type(given)](given)) is not None:
        return replace(own, name=name)
    return (losses.row_local if getattr(given, "row_local", False) else losses.whole)(name, given)


def _elementwise(made: Callable[..., Loss], *options: str) -> Callable[[Any], Loss | None]:
    return lambda m: made(m.reduction, **{key: getattr(m, key) for key in options})


def _bce_with_logits(m: nn.BCEWithLogitsLoss) -> Loss | None:
    weighted = m.weight is not None or m.pos_weight is not None  # along any axis, rows among them
    return None if weighted else losses.bce_with_logits(m.reduction)


def _cross_entropy(m: nn.CrossEntropyLoss) -> Loss | None:
    return None if m.label_smoothing else losses.cross_entropy(m.reduction, m.ignore_index, m.weight)


_MODULES: Mapping[type, Callable[[Any], Loss | None]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _elementwise(losses.mse),
    nn.L1Loss: _elementwise(losses.l1),
    nn.SmoothL1Loss: _elementwise(losses.smooth_l1, "beta"),
    nn.BCEWithLogitsLoss: _bce_with_logits,
}
"""None for options that rowtune's own loss lacks: the module is then taken whole."""
