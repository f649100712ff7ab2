"""Is a plan exact? Loss, gradients and buffers against the plain network, by DESIGN.md's measure.

    gradients          max|a-b| / max(max|b|, 1e-3 x the largest gradient of the network)
    loss and buffers   max|a-b| / max|b|

In float32 two correct orders of summation differ, and a ReLU at zero may flip: where float32 disagrees by
more than its tolerance, the verdict is float64's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rowtune.graph.losses import Loss
from rowtune.tune.step import Plain

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
_SEED = 20240119

Planned = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward leave behind, on the CPU."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True)
class Check:
    """The verdict: the largest error, where it is, and everything that was compared."""

    max_relative_error: float
    worst: str
    checked: tuple[str, ...]
    dtype: str
    ok: bool
    note: str = ""
    inputs: str = ""


def outcome(model: nn.Module, runner: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Outcome:
    """Run `runner`, which shares `model`'s parameters, forward and backward once; the model's gradients
    and buffers are put back."""
    saved = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            loss = runner(*inputs, targets=target)
            loss.backward()
        gradients = {n: p.grad.detach().cpu() for n, p in model.named_parameters() if p.grad is not None}
        buffers = {n: b.detach().to("cpu", copy=True) for n, b in model.named_buffers()}
        return Outcome(loss.detach().cpu(), gradients, buffers)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


def compare(expected: Outcome, got: Outcome, dtype: torch.dtype, note: str = "") -> Check:
    """The measure above over everything trainable; a missing or extra gradient is an infinite error."""
    floor = 1e-3 * max((float(g.abs().max()) for g in expected.gradients.values() if g.numel()), default=0.0)
    errors = {"loss": _error(expected.loss, got.loss, 0.0)}
    for name in sorted(set(expected.gradients) | set(got.gradients)):
        errors[name] = _error(expected.gradients.get(name), got.gradients.get(name), floor)
    for name in sorted(expected.buffers):
        errors[name] = _error(expected.buffers[name], got.buffers.get(name), 0.0)
    worst = max(errors, key=lambda name: errors[name])
    ok = errors[worst] <= TOLERANCE[dtype]
    return Check(errors[worst], worst, tuple(errors), str(dtype).split(".")[1], ok, note)


def _error(expected: Tensor | None, got: Tensor | None, floor: float) -> float:
    if expected is None or got is None or expected.shape != got.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = got.double(), expected.double()
    scale = max(float(b.abs().max()), floor)
    gap = float((a - b).abs().max())
    if gap != gap or scale == float("inf"):  # nan or inf: equal only where both are the same
        return 0.0 if torch.equal(a.nan_to_num(1.5, 2.5, 3.5), b.nan_to_num(1.5, 2.5, 3.5)) else float("inf")
    return gap / scale if scale else (0.0 if gap == 0 else float("inf"))


class Verifier:
    """Checks plans of one network on one batch; the plain network's outcome is computed once per dtype.

    `planned(model)` is the plan applied; `plain(model)` what it is compared with: the network as PyTorch
    runs it, or where it draws random masks a plan that keeps everything, under the same seed (PyTorch's own
    masks depend on the order of the draws, rowtune's on the position, so those two cannot agree).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: tuple[tuple[Tensor, ...], Tensor],
        plain: Planned | None = None,
    ) -> None:
        self._model, self._batch = model, batch
        self._plain = plain or (lambda m: Plain(m, loss))
        self._note = "random nodes: compared with a plan that keeps everything, same seed" if plain else ""
        self._expected: dict[torch.dtype, Outcome] = {}
        self._double: nn.Module | None = None

    def check(self, planned: Planned, dtype: torch.dtype | None = None) -> Check:
        """In the model's own dtype; in float64 where asked, or where the first does not agree."""
        own = self._dtype()
        result = self._compare(planned, dtype or own)
        if result.ok or dtype is not None or own != torch.float32:
            return result
        return self._compare(planned, torch.float64)

    def _dtype(self) -> torch.dtype:
        floating = [p.dtype for p in self._model.parameters() if p.is_floating_point()]
        return floating[0] if floating else torch.float32

    def _compare(self, planned: Planned, dtype: torch.dtype) -> Check:
        model, inputs, target = self._in(dtype)
        if dtype not in self._expected:
            self._expected[dtype] = outcome(model, self._plain(model), inputs, target)
        got = outcome(model, planned(model), inputs, target)
        check = compare(self._expected[dtype], got, dtype, self._note)
        return replace(check, inputs=", ".join("x".join(map(str, t.shape)) for t in inputs))

    def _in(self, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
        inputs, target = self._batch
        if dtype == self._dtype():
            return self._model, inputs, target
        if self._double is None:
            self._double = copy.deepcopy(self._model).to(dtype)
        return self._double, tuple(_cast(t, dtype) for t in inputs), _cast(target, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
