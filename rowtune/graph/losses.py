"""Losses as reductions: sums over rows, a normaliser known beforehand, and a final combine.

A loss is `combine(terms(output, target), norms(target, output_shape))`, where `terms` returns a short vector
of sums that may be taken over any rows and added up. Where `combine` is linear in the sums, the gradient of
the sums is known before the first row is seen: backward can start in the same sweep as forward (the single
sweep of docs/sweep.md). Dice is not linear, so it takes a second sweep; both are exact.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowtune.errors import ModelError, UsageError, meant
from rowtune.kernels.constants import Copies

_OWN = "for one of your own give module:function, or in Python the function itself or a torch.nn loss"
"""What those can do who type a command, and those who call apply()."""

Terms = Callable[[Tensor, Tensor], Tensor]
Norms = Callable[[Tensor, tuple[int, ...]], Tensor]
Combine = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """`target_rank_drop` is how many dimensions the target lacks (1 where it holds class indices).

    `row_local` is False for a loss that needs its whole input; it then never lies in a rows segment.
    """

    name: str
    terms: Terms
    norms: Norms
    combine: Combine
    linear: bool = True
    row_local: bool = True
    class_target: bool = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss on whole tensors: a scalar."""
        return self.combine(self.terms(output, target), self.norms(target, tuple(output.shape)))


def _sum_dtype(t: Tensor) -> torch.dtype:
    """Sums over many rows are kept in at least float32."""
    return t.dtype if t.dtype == torch.float64 else torch.float32


def _count(target: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full((1,), float(math.prod(shape)), device=target.device)


def _one(target: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(1, device=target.device)


def _divide(sums: Tensor, norms: Tensor) -> Tensor:
    return (sums / norms.to(sums.dtype)).sum()


def _norms(reduction: str) -> Norms:
    if reduction not in ("mean", "sum"):
        raise UsageError(f"a loss's reduction is mean or sum, not {reduction!r}")
    return _count if reduction == "mean" else _one


def _elementwise(name: str, function: Callable[..., Tensor], reduction: str, **options: Any) -> Loss:
    def terms(output: Tensor, target: Tensor) -> Tensor:
        return function(output, target, reduction="none", **options).sum(dtype=_sum_dtype(output)).reshape(1)

    return Loss(name, terms, _norms(reduction), _divide)


def mse(reduction: str = "mean") -> Loss:
    """Mean or sum of squared differences; target as the output."""
    return _elementwise("mse", F.mse_loss, reduction)


def l1(reduction: str = "mean") -> Loss:
    """Mean or sum of absolute differences; target as the output."""
    return _elementwise("l1", F.l1_loss, reduction)


def smooth_l1(reduction: str = "mean", beta: float = 1.0) -> Loss:
    """Quadratic below `beta`, linear above; target as the output."""
    return _elementwise("smooth_l1", F.smooth_l1_loss, reduction, beta=beta)


def bce_with_logits(reduction: str = "mean") -> Loss:
    """Binary cross-entropy of logits; target as the output, in [0, 1]."""
    return _elementwise("bce_with_logits", F.binary_cross_entropy_with_logits, reduction)


def cross_entropy(
    reduction: str = "mean",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Loss:
    """Cross-entropy over channels: output N x C x ..., target class indices N x ... (int64).

    The mean is over the weights of the pixels that count, as torch has it.
    """
    if label_smoothing:
        raise UsageError(f"cross_entropy in rowtune has no label smoothing; {_OWN}")

    weights = None if weight is None else Copies(weight)

    def terms(output: Tensor, target: Tensor) -> Tensor:
        w = None if weights is None else weights.like(output, output.dtype)
        total = F.cross_entropy(output, target, weight=w, ignore_index=ignore_index, reduction="sum")
        return total.to(_sum_dtype(output)).reshape(1)

    def norms(target: Tensor, shape: tuple[int, ...]) -> Tensor:
        if reduction == "sum":
            return _one(target, shape)
        valid = target != ignore_index
        if weights is None:
            return valid.sum().double().reshape(1)
        picked = weights.like(target, weights.original.dtype)[target.where(valid, torch.zeros_like(target))]
        return torch.where(valid, picked, torch.zeros_like(picked)).double().sum().reshape(1)

    _norms(reduction)
    return Loss("cross_entropy", terms, norms, _divide, class_target=True)


def dice_ce(ignore_index: int = -100, smooth: float = 1.0) -> Loss:
    """Soft dice over classes plus mean cross-entropy; output N x C x ..., target class indices N x ...

    The sums are [cross-entropy, intersection per class, cardinality per class] over the whole batch.
    """

    def terms(output: Tensor, target: Tensor) -> Tensor:
        valid = target != ignore_index
        classes = output.shape[1]
        mask = valid.unsqueeze(1).to(output.dtype)
        numbers = torch.arange(classes, device=output.device).view(1, -1, *[1] * (output.dim() - 2))
        hot = (target.unsqueeze(1) == numbers).to(output.dtype) * mask
        p = output.softmax(1) * mask
        dims = [d for d in range(output.dim()) if d != 1]
        dtype = _sum_dtype(output)
        ce = F.cross_entropy(output, target, ignore_index=ignore_index, reduction="sum").to(dtype).reshape(1)
        return torch.cat([ce, (p * hot).sum(dims, dtype=dtype), (p + hot).sum(dims, dtype=dtype)])

    def norms(target: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (target != ignore_index).sum().double().reshape(1)

    def combine(sums: Tensor, count: Tensor) -> Tensor:
        inter, total = sums[1:].chunk(2)
        dice = 1 - ((2 * inter + smooth) / (total + smooth)).mean()
        return sums[0] / count.to(sums.dtype)[0] + dice

    return Loss("dice_ce", terms, norms, combine, linear=False, class_target=True)


def whole(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A user's loss that needs its whole input and returns a scalar: never inside a rows segment."""

    def terms(output: Tensor, target: Tensor) -> Tensor:
        value = function(output, target)
        if value.numel() != 1:
            raise ModelError(
                f"the loss {name} returned shape {tuple(value.shape)}; a loss returns a scalar, or sets "
                "row_local = True on the function and returns a map whose mean is the loss"
            )
        return value.reshape(1)

    return Loss(name, terms, _one, _divide, row_local=False)


def row_local(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A user's loss declared row-local: returns an unreduced map (each row of it from the same rows of output
    and target), and the loss is the map's mean."""

    def terms(output: Tensor, target: Tensor) -> Tensor:
        return function(output, target).sum(dtype=_sum_dtype(output)).reshape(1)

    def norms(target: Tensor, shape: tuple[int, ...]) -> Tensor:
        # One image of two rows tells how many elements of the map one element of output makes.
        probe = (1, *shape[1:2], *(min(s, 2) for s in shape[2:]))
        lean = torch.zeros(probe, device="meta")
        labels = target.dim() == len(shape) - 1
        hint = torch.zeros((1, *probe[2:]) if labels else probe, dtype=target.dtype, device="meta")
        each = function(lean, hint).numel() / math.prod(probe)
        return torch.full((1,), each * math.prod(shape), dtype=torch.float64, device=target.device)

    return Loss(name, terms, norms, _divide)


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "l1": l1,
    "smooth_l1": smooth_l1,
    "bce_with_logits": bce_with_logits,
    "dice_ce": dice_ce,
}


def parse(text: str) -> Loss:
    """A loss from its name, as on the command line: `mse`, `cross_entropy:ignore_index=255,reduction=sum`, or
    `package.module:function` (row-local where the function has `row_local = True`)."""
    name, _, rest = text.partition(":")
    if name in LOSSES:
        options: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            key, eq, value = item.partition("=")
            if not eq:
                raise UsageError(
                    f"the loss {text}: options are key=value, as in mse:reduction=sum, not {item!r}"
                )
            options[key] = _literal(value)
        try:
            made = LOSSES[name](**options)
        except TypeError as error:
            raise UsageError(f"the loss {text}: {error}; {_OWN}") from error
        return Loss(**{**made.__dict__, "name": text})
    if not rest:
        raise UsageError(f"the loss {text!r} is none of {', '.join(LOSSES)}; {_OWN}{meant(name, LOSSES)}")
    try:
        function = getattr(importlib.import_module(name), rest)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the loss {text}: {error}; {_OWN}") from error
    kind = row_local if getattr(function, "row_local", False) else whole
    return kind(text, function)


def _literal(text: str) -> int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text


def default_name(output: tuple[int, ...], inputs: tuple[int, ...]) -> str:
    """Cross-entropy where the output is class scores (N x C, or N x C x H x W with C > 1 and the input's
    size), else MSE."""
    if len(output) == 2 and output[1] > 1:
        return "cross_entropy"
    if len(output) > 2 and output[1] > 1 and output[2:] == inputs[2:] and len(output) == len(inputs):
        return "cross_entropy"
    return "mse"
