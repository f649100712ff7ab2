"""Is a plan exact? Loss, gradients and buffers against the plain network, by the measure of docs/sweep.md.

    gradients   max|a-b| / max(max|b|, 1e-3 x the largest gradient of the network)
    loss        max|a-b| / max|b|
    buffers     likewise, but for running means: max|a-b| / max(max|b|, 1e-3 x the largest running deviation)

A running mean may be zero but for rounding (two batch norms in a row), and a ratio of rounding is noise; what
the network sees of it is its size beside the deviation.

A plan under autocast is compared with plain PyTorch under the same autocast, with the tolerance of its
type; one whose stores round may be off by what it allows itself. In float32 and less, two correct orders of
summation differ, and a ReLU at zero may flip: where they disagree by more than their tolerance, the verdict
is float64's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rowtune.errors import RowtuneError
from rowtune.graph.losses import Loss
from rowtune.plan.choices import Precision
from rowtune.runtime.module import RowtuneModule
from rowtune.runtime.precision import DTYPES, autocast
from rowtune.tune.device import full_precision, release
from rowtune.tune.measurement import failure
from rowtune.tune.reference import Place
from rowtune.tune.step import Plain

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
FLOOR = 1e-3
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


SCALE = 1024.0
"""Of the loss where fp16 is compared: of gradients as they are, too many would be zeros."""


def outcome(
    model: nn.Module, runner: nn.Module, inputs: tuple[Tensor, ...], target: Tensor, scale: float = 1.0
) -> Outcome:
    """Run `runner`, which shares `model`'s parameters, forward and backward once, for `scale` times the loss;
    the model's gradients and buffers are put back."""
    saved = {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers()}
    cards = sorted({t.device for t in inputs if t.is_cuda}, key=str)
    model.zero_grad(set_to_none=True)
    try:
        with torch.random.fork_rng(devices=cards), full_precision():
            torch.manual_seed(_SEED)
            _announce(runner, scale)
            loss = runner(*inputs, targets=target)
            (loss * scale).backward()
        grads = {n: p.grad.detach().cpu() for n, p in model.named_parameters() if p.grad is not None}
        gradients = {n: g / scale for n, g in grads.items()} if scale != 1.0 else grads
        buffers = {n: b.detach().to("cpu", copy=True) for n, b in model.named_buffers()}
        return Outcome(loss.detach().cpu(), gradients, buffers)
    finally:
        model.zero_grad(set_to_none=True)
        _announce(runner, 1.0)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


def _announce(runner: nn.Module, scale: float) -> None:
    """A single sweep makes gradients before there is a loss to be scaled."""
    if isinstance(runner, _Under):
        _announce(runner.runner, scale)
    elif isinstance(runner, RowtuneModule):
        runner.loss_scale = scale


def compare(
    expected: Outcome, got: Outcome, dtype: torch.dtype, note: str = "", allowed: float = 0.0
) -> Check:
    """The measure above over everything trainable; a missing or extra gradient is an infinite error."""
    floor = FLOOR * max((float(g.abs().max()) for g in expected.gradients.values() if g.numel()), default=0.0)
    errors = {"loss": _error(expected.loss, got.loss, 0.0)}
    for name in sorted(set(expected.gradients) | set(got.gradients)):
        errors[name] = _error(expected.gradients.get(name), got.gradients.get(name), floor)
    for name in sorted(expected.buffers):
        own = _buffer_floor(name, expected.buffers)
        errors[name] = _error(expected.buffers[name], got.buffers.get(name), own)
    worst = max(errors, key=lambda name: errors[name])
    ok = errors[worst] <= max(TOLERANCE[dtype], allowed)
    return Check(errors[worst], worst, tuple(errors), str(dtype).split(".")[1], ok, note)


def _buffer_floor(name: str, buffers: Mapping[str, Tensor]) -> float:
    """A running mean's scale is the running deviation beside it."""
    variance = buffers.get(name.removesuffix("running_mean") + "running_var")
    if not name.endswith("running_mean") or variance is None or not variance.numel():
        return 0.0
    return FLOOR * float(variance.double().abs().max().sqrt())


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
    """Checks plans of one network; the plain network's outcome is computed once per dtype.

    `planned(model)` is the plan applied; `plain(model)` what it is compared with: the network as PyTorch
    runs it, or where it draws random masks a plan that keeps everything, under the same seed (PyTorch's own
    masks depend on the order of the draws, rowtune's on the position, so those two cannot agree).

    Args:
        places: where the plain network may run, tried in order until one has the memory.
        device: that plans run on. The model is left where it is found.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        places: Iterable[Place],
        plain: Planned | None = None,
        device: str = "cpu",
    ) -> None:
        self._model, self._device = model, device
        self._untried: Iterator[Place] = iter(places)
        self._tried: list[Place] = []
        self._plain = plain or (lambda m: Plain(m, loss))
        self._note = "random nodes: compared with a plan that keeps everything, same seed" if plain else ""
        self._expected: dict[tuple[torch.dtype, Precision], tuple[Place, Outcome]] = {}

    def check(
        self,
        planned: Planned,
        dtype: torch.dtype | None = None,
        precision: Precision = "as given",
        allowed: float = 0.0,
    ) -> Check:
        """In the model's own dtype and the plan's `precision`; in float64, which autocast leaves alone, where
        asked, or where the first does not agree. An error up to `allowed` is none."""
        own = self._dtype()
        result = self._compare(planned, dtype or own, precision, allowed)
        if result.ok or dtype is not None or own == torch.float64:
            return result
        return self._compare(planned, torch.float64, precision, allowed)

    def _dtype(self) -> torch.dtype:
        floating = [p.dtype for p in self._model.parameters() if p.is_floating_point()]
        return floating[0] if floating else torch.float32

    def _compare(self, planned: Planned, dtype: torch.dtype, precision: Precision, allowed: float) -> Check:
        if (dtype, precision) not in self._expected:
            self._expected[dtype, precision] = self._reference(dtype, precision)
        place, expected = self._expected[dtype, precision]
        got = self._run(planned, place.batch, self._device, dtype, precision)
        lower = DTYPES.get(precision, dtype) if dtype != torch.float64 else dtype
        check = compare(expected, got, lower, self._note, allowed)
        return replace(check, inputs=", ".join("x".join(map(str, t.shape)) for t in place.batch[0]))

    def _reference(self, dtype: torch.dtype, precision: Precision) -> tuple[Place, Outcome]:
        """The first place where plain fits, and what it gives there."""

        def plain(model: nn.Module) -> nn.Module:
            return _Under(self._plain(model), precision)

        reason = "plain PyTorch is predicted to fit neither here nor on the host, however narrow the images"
        for place in self._places():
            try:
                return place, self._run(plain, place.batch, place.device, dtype, precision)
            except Exception as error:
                failed = failure(error)
                if failed.status != "oom":
                    raise
                reason = f"plain PyTorch runs out of memory everywhere: {failed.reason}"
        raise RowtuneError(f"no plan can be verified, for there is nothing to compare it with: {reason}")

    def _places(self) -> Iterator[Place]:
        yield from list(self._tried)
        for place in self._untried:
            self._tried.append(place)
            yield place

    def _run(self, planned: Planned, batch: tuple[tuple[Tensor, ...], Tensor], device: str,
             dtype: torch.dtype, precision: Precision) -> Outcome:  # fmt: skip
        inputs, target = batch
        with self._as(dtype, device) as model:
            given = tuple(_cast(t, dtype).to(device) for t in inputs)
            scale = SCALE if precision == "fp16" else 1.0
            return outcome(model, planned(model), given, _cast(target, dtype).to(device), scale)

    @contextlib.contextmanager
    def _as(self, dtype: torch.dtype, device: str) -> Iterator[nn.Module]:
        """The model itself, or a copy of another type or on another device that lives for one run only."""
        here = next((str(p.device) for p in self._model.parameters()), device)
        if dtype == self._dtype() and here == device:
            yield self._model
            return
        self._model.zero_grad(set_to_none=True)
        try:
            yield copy.deepcopy(self._model).to(device, dtype)
        finally:
            release(device)


class _Under(nn.Module):
    """Forward in a plan's precision."""

    def __init__(self, runner: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.runner, self.precision = runner, precision

    def forward(self, *inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.precision, targets.device.type):
            return self.runner(*inputs, targets=targets)  # type: ignore[no-any-return]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
