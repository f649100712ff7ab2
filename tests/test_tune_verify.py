"""The verifier finds every kind of wrong, and calls nothing wrong that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowtune.errors import RowtuneError
from rowtune.graph.losses import parse
from rowtune.graph.training import with_loss
from rowtune.importers.source import parse_source
from rowtune.importers.trace import trace
from rowtune.plan.uniform import uniform_plan
from rowtune.runtime.lists import run as lists_run
from rowtune.runtime.module import apply
from rowtune.tune import measure
from rowtune.tune.measure import Bench
from rowtune.tune.optimizers import parse_optimizer
from rowtune.tune.reference import Place, places, plain_peak
from rowtune.tune.step import Plain, define
from rowtune.tune.verify import Verifier, compare, outcome

LOSS = parse("mse")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
    )


def batch() -> tuple[tuple[Tensor, ...], Tensor]:
    made = torch.Generator().manual_seed(1)
    return (torch.randn(2, 3, 8, 8, generator=made),), torch.randn(2, 2, 8, 8, generator=made)


def here() -> list[Place]:
    return [Place(batch(), "cpu")]


class Altered(Plain):
    """The plain network with something done to its gradients after backward has reached them."""

    def __init__(self, module: nn.Module, change: Callable[[nn.Module], None]) -> None:
        super().__init__(module, LOSS)
        self.change = change

    def forward(self, *inputs: Tensor, targets: Tensor) -> Tensor:
        self.change(self.module)
        return super().forward(*inputs, targets=targets)


def hooked(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    def planned(model: nn.Module) -> nn.Module:
        def attach(module: nn.Module) -> None:
            handle = module.get_parameter(name).register_hook(lambda g: (handle.remove(), change(g))[1])

        return Altered(model, attach)

    return planned


def test_the_plain_network_is_exact() -> None:
    check = Verifier(network(), LOSS, here()).check(lambda m: Plain(m, LOSS))
    assert check.ok and check.max_relative_error == 0.0
    parameters = {f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")}
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(check.checked) == {"loss"} | parameters | buffers
    assert check.inputs == "2x3x8x8"


def test_one_wrong_element_is_found_and_named() -> None:
    def change(g: Tensor) -> Tensor:
        g = g.clone()
        g.view(-1)[5] += 0.01 * g.abs().max()
        return g

    check = Verifier(network(), LOSS, here()).check(hooked("3.weight", change))
    assert not check.ok and check.worst == "3.weight"
    assert check.dtype == "float64" and check.max_relative_error == pytest.approx(0.01, rel=1e-3)


def test_summation_noise_is_not_wrong_but_the_same_in_float64_is() -> None:
    noise: Callable[[Tensor], Tensor] = lambda g: g * (1 + 1e-5)  # noqa: E731
    verifier = Verifier(network(), LOSS, here())
    assert verifier.check(hooked("0.weight", noise)).ok
    assert not verifier.check(hooked("0.weight", noise), torch.float64).ok


def test_a_float32_disagreement_that_float64_does_not_share_is_no_error() -> None:
    flip: Callable[[Tensor], Tensor] = lambda g: g * 1.01 if g.dtype == torch.float32 else g  # noqa: E731
    check = Verifier(network(), LOSS, here()).check(hooked("0.weight", flip))
    assert check.ok and check.dtype == "float64"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_wrong(value: float) -> None:
    check = Verifier(network(), LOSS, here()).check(hooked("0.weight", lambda g: g * value))
    assert not check.ok and check.max_relative_error == float("inf")


def test_a_missing_gradient_and_a_running_statistic_updated_twice_are_wrong() -> None:
    model = network()
    expected = outcome(model, Plain(model, LOSS), *batch())
    fewer = {k: v for k, v in expected.gradients.items() if k != "0.bias"}
    lost = compare(expected, type(expected)(expected.loss, fewer, expected.buffers), torch.float32)
    assert not lost.ok and lost.worst == "0.bias"

    class Twice(Plain):
        def forward(self, *inputs: Tensor, targets: Tensor) -> Tensor:
            super().forward(*inputs, targets=targets)
            return super().forward(*inputs, targets=targets)

    check = Verifier(network(), LOSS, here()).check(lambda m: Twice(m, LOSS))
    assert not check.ok and check.worst in ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def test_a_bias_before_a_batch_norm_is_measured_by_the_largest_gradient() -> None:
    """Its true gradient is zero; what is left is noise, and a plain ratio of noise is noise."""
    model = network()
    expected = outcome(model, Plain(model, LOSS), *batch())
    bias = expected.gradients["0.bias"]
    assert bias.abs().max() < 1e-6
    got = type(expected)(expected.loss, {**expected.gradients, "0.bias": -bias}, expected.buffers)
    assert compare(expected, got, torch.float32).ok


def test_checking_leaves_the_model_as_it_was() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    Verifier(model, LOSS, here()).check(lambda m: Plain(m, LOSS), torch.float64)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_have_no_gradient_in_either() -> None:
    model = network()
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    check = Verifier(model, LOSS, here()).check(lambda m: Plain(m, LOSS))
    assert check.ok and "0.weight" not in check.checked


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("sgd", 0),
        ("sgd:momentum=0.9", 1),
        ("adam", 2),
        ("adamw:amsgrad=true", 3),
        ("rmsprop:momentum=0.5", 2),
    ],
)
def test_optimizer_slots_are_what_the_optimizer_keeps(text: str, slots: int) -> None:
    spec = parse_optimizer(text)
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = spec.make([weight])
    weight.grad = torch.ones(1000)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert sum(t.numel() == 1000 for t in kept) == spec.slots == slots
    assert parse_optimizer(str(spec)) == spec


def test_where_plain_does_not_fit_plans_are_verified_on_narrower_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = define(parse_source("zoo:unet", ["base=4", "depth=1"]), ["1x3x16x512"])
    room = [10**9]
    monkeypatch.setattr("rowtune.tune.reference.free_bytes", lambda device: room[0])
    first = next(iter(places(work)))
    assert first.batch[0][0].shape == (1, 3, 16, 512) and first.device == "cpu"
    room[0] = plain_peak(work) * 2 // 3
    inputs, target = next(iter(places(work))).batch
    assert inputs[0].shape == (1, 3, 16, 128) and target.shape == (1, 16, 128)
    plan = uniform_plan(work.graph, "rows", 4)
    check = Verifier(work.module, work.loss, places(work)).check(lambda m: apply(m, plan, work.loss))
    assert check.ok and check.inputs == "1x3x16x128"


def test_with_no_width_to_halve_there_are_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    work = define(parse_source("zoo:unet", ["base=4", "depth=1"]), ["8x3x16x32"])
    monkeypatch.setattr("rowtune.tune.reference.free_bytes", lambda device: plain_peak(work) * 3 // 2)
    assert next(iter(places(work))).batch[0][0].shape == (4, 3, 16, 32)


def test_a_place_without_the_memory_is_followed_by_the_next() -> None:
    """Plain PyTorch runs out of memory in the first place that was predicted to do: no plan is called oom."""
    tried: list[int] = []

    class Greedy(Plain):
        def forward(self, *inputs: Tensor, targets: Tensor) -> Tensor:
            tried.append(inputs[0].shape[-1])
            if inputs[0].shape[-1] > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(*inputs, targets=targets)

    (x,), y = batch()
    narrow = Place(((x[..., :4],), y[..., :4]), "cpu")
    verifier = Verifier(network(), LOSS, [*here(), narrow], lambda m: Greedy(m, LOSS))
    for _ in range(2):
        check = verifier.check(lambda m: Plain(m, LOSS))
        assert check.ok and check.inputs == "2x3x8x4"
    assert tried == [8, 4]
    with pytest.raises(RowtuneError, match=r"nothing to compare it with.*CUDA out of memory"):
        Verifier(network(), LOSS, here(), lambda m: Greedy(m, LOSS)).check(lambda m: Plain(m, LOSS))


class TwoNorms(nn.Sequential):
    """The second norm's running mean is zero but for rounding."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )


def test_a_running_mean_of_rounding_is_measured_by_the_running_deviation() -> None:
    model = TwoNorms()
    plan = uniform_plan(with_loss(trace(model, batch()[0]), LOSS), "rows", 2)
    loss = Place((batch()[0], torch.zeros(2, 4, 8, 8)), "cpu")
    check = Verifier(model, LOSS, [loss]).check(lambda m: apply(m, plan, LOSS), torch.float64)
    assert check.ok, check
    expected = outcome(model, Plain(model, LOSS), *loss.batch)
    off = {**expected.buffers, "3.running_mean": expected.buffers["3.running_mean"] + 1e-3}
    wrong = compare(expected, replace(expected, buffers=off), torch.float64)
    assert not wrong.ok and wrong.worst == "3.running_mean"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bias_before_a_batch_norm_is_not_wrong_in_half_precision(dtype: torch.dtype) -> None:
    """Its true gradient is zero, and in half precision the noise of it is not small beside the others."""
    model = network().to(dtype)
    place = Place(((batch()[0][0].to(dtype),), batch()[1].to(dtype)), "cpu")
    noisy = hooked("0.bias", lambda g: g + 0.5 if g.dtype == dtype else g)
    check = Verifier(model, LOSS, [place]).check(noisy)
    assert check.ok and check.dtype == "float64"
    wrong = Verifier(model, LOSS, [place]).check(hooked("3.weight", lambda g: g * 1.5))
    assert not wrong.ok and wrong.worst == "3.weight"


def test_float32_is_verified_as_float32_whatever_the_user_has_set() -> None:
    seen: list[str] = []

    class Watched(Plain):
        def forward(self, *inputs: Tensor, targets: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return super().forward(*inputs, targets=targets)

    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    assert torch.backends.cudnn.allow_tf32
    Verifier(network(), LOSS, here()).check(lambda m: Watched(m, LOSS))
    assert set(seen) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before  # type: ignore[attr-defined]
    assert torch.backends.cudnn.allow_tf32


def test_dropout_is_compared_with_a_plan_that_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dropping.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(0.5), nn.Conv2d(3, 2, 1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    bench = Bench(define(parse_source("dropping:net"), ["1x2x16x8"]).problem)
    plan = uniform_plan(bench.work.graph, "rows", 4)
    check = bench.check(plan)
    assert check.ok and "random" in check.note


def test_lists_are_written_before_a_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first warm step, which decides whether a plan is slow, would be the one that writes them."""
    bench = Bench(define(parse_source("zoo:unet_bn", ["base=2", "depth=2"]), ["1x3x32x8"]).problem)
    told: list[str] = []
    write, timed = lists_run.written, measure.time_step

    def written(*args: Any) -> Any:
        told.append("written")
        return write(*args)

    def time_step(step: Callable[[], None], device: str, clock: Callable[[], float]) -> Any:
        told.append("timed")
        return timed(step, device, clock)

    monkeypatch.setattr(lists_run, "written", written)
    monkeypatch.setattr(measure, "time_step", time_step)
    for barriers in ("store", "recompute"):
        told.clear()
        plan = uniform_plan(bench.work.graph, "rows", 8, barriers=barriers)  # type: ignore[arg-type]
        assert bench.measure(plan).status == "ok"
        assert {"written", "timed"} == {*told}
        assert "written" not in told[told.index("timed") :]
