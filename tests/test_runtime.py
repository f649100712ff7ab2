"""The banded module among its surroundings: losses, optimizers, modes, dtypes, and the rest of a model."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import TOLERANCE, error, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rowtune
from rowtune.errors import PlanError, RowtuneError, UsageError
from rowtune.graph.losses import parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.program import Banded

ROWS = ["rows/recompute", "rows/cache", "rows/sweep"]
KINDS = ["keep", "checkpoint", *ROWS]


class Net(nn.Module):
    """Strides, a skip, a pool and an upsampling: (B, 3, H, W) to (B, 4, H, W), H and W even."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.body = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.stem(x))
        y = F.gelu(self.norm(self.down(skip)))
        y = self.up(F.max_pool2d(torch.tanh(self.body(y)), 3, 1, 1))
        return self.head(torch.cat([skip, y], 1))


def net(norm: bool = False, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(3)
    return Net(norm).to(dtype)


def image(batch: int = 2, height: int = 14, width: int = 6, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(batch + height + width)
    x = torch.randn(batch, 3, height, width, dtype=torch.float64, generator=generator)
    return x.requires_grad_(grad)


def planned(
    model: nn.Module, inputs: tuple[Any, ...], kind: str, loss: str | None = None, **options: Any
) -> Any:
    """`model` under one policy everywhere, in bands of three rows unless told otherwise."""
    graph = rowtune.trace(model, inputs)
    if loss is not None:
        graph = with_loss(graph, parse(loss))
    policy, _, halo = kind.partition("/")
    if policy == "rows":
        options.setdefault("band_rows", 3)
        options["halo"] = halo
    return rowtune.apply(model, rowtune.uniform_plan(graph, policy, **options), loss)


def same_step(model: nn.Module, module: nn.Module, *inputs: Tensor) -> None:
    names = {f"input{i}": t for i, t in enumerate(inputs) if t.requires_grad}
    plain = step(model, lambda: model(*inputs), names)
    assert error(step(model, lambda: module(*inputs), names), plain) < TOLERANCE


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    return float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-30)


def uses_rows(module: Any, *inputs: Any, **how: Any) -> bool:
    """Guards a test against a plan that silently has no rows segment."""
    program = module.program(inputs, with_targets=how.get("with_targets", False))
    return any(isinstance(s.how, Banded) for s in program.segments)


# -- losses and optimizers -----------------------------------------------------------------------------------


def outer_losses(y: Tensor) -> Tensor:
    """Not one of rowtune's losses: mixes rows, images and channels."""
    total_variation = (y[:, :, 1:] - y[:, :, :-1]).abs().mean()
    return y.logsumexp((1, 2, 3)).square().sum() + total_variation + F.huber_loss(y, torch.ones_like(y))


@pytest.mark.parametrize("kind", KINDS)
def test_adam_steps_with_a_loss_outside(kind):
    ours, plain, x = net(), net(), image(grad=False)
    module = planned(ours, (x,), kind)
    for model, run in ((ours, module), (plain, plain)):
        optimizer = torch.optim.Adam(run.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            outer_losses(run(x)).backward()
            optimizer.step()
        assert not close(model.stem.weight.detach(), net().stem.weight.detach(), 1e-2)  # it did move
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert close(a.detach(), b.detach(), 1e-9), name


@pytest.mark.parametrize("name", ["cross_entropy", "dice_ce"])  # a single sweep, and two passes
def test_sgd_steps_with_the_loss_inside(name):
    ours, plain, x = net(), net(), image(grad=False)
    module = planned(ours, (x,), "rows/sweep", name)
    (segment,) = module.program((x,), with_targets=True).segments
    assert segment.single_sweep == (name == "cross_entropy")
    loss = parse(name)
    target = synthetic_target(loss, (2, 4, 14, 6), torch.float64, 1)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (ours, plain))
    for _ in range(4):
        losses = []
        runs = (first, lambda: module(x, targets=target)), (second, lambda: loss(plain(x), target))
        for optimizer, run in runs:
            optimizer.zero_grad()
            losses.append(run())
            losses[-1].backward()
            optimizer.step()
        assert close(losses[0].detach(), losses[1].detach())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert close(a.detach(), b.detach(), 1e-9)


# -- what needs a gradient -----------------------------------------------------------------------------------


FROZEN = {
    "first layers": ["stem", "down"],
    "some": ["down", "up"],
    "last": ["head"],
    "weights only": ["stem.weight", "body.weight", "head.weight"],
    "all": ["stem", "down", "body", "up", "head"],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("grad", [True, False])
def test_frozen_parameters(kind, which, grad):
    model, x = net(), image(grad=grad)
    module = planned(model, (x,), kind)
    if which != "last":  # frozen before the first call, or between two
        module(x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(name.startswith(f) for f in FROZEN[which]))
    if which == "all" and not grad:
        assert not module(x).requires_grad
        return
    same_step(model, module, x)
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


@pytest.mark.parametrize("which", ["first layers", "last", "all"])
@pytest.mark.parametrize("grad", [True, False])
def test_frozen_parameters_in_a_single_sweep(which, grad):
    model, x = net(), image(grad=grad)
    module = planned(model, (x,), "rows/sweep", "mse")
    target = torch.ones(2, 4, 14, 6, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(name.startswith(f) for f in FROZEN[which]))
    if which == "all" and not grad:
        assert not module(x, targets=target).requires_grad
        return
    inputs = {"x": x} if grad else {}
    plain = step(model, lambda: F.mse_loss(model(x), target), inputs)
    assert error(step(model, lambda: module(x, targets=target), inputs), plain) < TOLERANCE


def test_an_input_that_is_an_activation_of_something_before():
    """The banded module is in the middle of a graph; its input's gradient flows on."""
    model, before, x = net(), nn.Conv2d(3, 3, 3, padding=1).double(), image(grad=False)
    module = planned(model, (x,), "rows/sweep")
    found = []
    for run in (model, module):
        run.zero_grad()
        before.zero_grad()
        run(before(x)).square().sum().backward()
        found.append(before.weight.grad.clone())
    assert close(found[1], found[0])


@pytest.mark.parametrize("kind", ["rows/recompute", "rows/sweep"])
def test_an_output_that_the_loss_leaves_out(kind):
    """Its parameters get no gradient, None as from PyTorch: zeros would decay them in the optimizer."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model, x = Two().double(), image()
    module = planned(model, (x,), kind)
    assert uses_rows(module, x)
    module(x)[0].sum().backward()
    assert model.a.weight.grad is not None
    assert model.b.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_used_twice(kind):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x))) * self.a.weight.sum()

    model, x = Tied().double(), image()
    module = planned(model, (x,), kind)
    same_step(model, module, x)
    assert module.state_dict().keys() == model.state_dict().keys()


# -- backward, several times ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_over_two_steps(kind):
    model, x, y = net(), image(), image(1, 10, 8)
    module = planned(model, (x,), kind)
    found = []
    for run in (model, module):
        run.zero_grad()
        for t in (x, y):
            t.grad = None
            run(t).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(close(a, b) for a, b in zip(found[1], found[0], strict=True))


@pytest.mark.parametrize("kind", [*ROWS, "single sweep"])
def test_two_forwards_before_backward(kind):
    """Siamese training: one module, two calls, one backward through both, later call first or last."""
    model, x, y = net(), image(grad=False), image(2, 12, 6, grad=False)
    single = kind == "single sweep"
    module = planned(model, (x,), "rows/sweep" if single else kind, "mse" if single else None)

    def run(m: Any, t: Tensor) -> Tensor:
        zero = torch.zeros(2, 4, *t.shape[2:], dtype=t.dtype)
        return m(t, targets=zero) if single and m is module else F.mse_loss(m(t), zero)

    for order in ((0, 1), (1, 0)):
        found = []
        for m in (model, module):
            m.zero_grad()
            losses = run(m, x), run(m, y)
            losses[order[0]].backward()
            (losses[order[1]] * 3).backward()
            found.append([p.grad.clone() for p in model.parameters()])
        assert all(close(a, b) for a, b in zip(found[1], found[0], strict=True))


@pytest.mark.parametrize("kind", [*ROWS, "single sweep"])
def test_backward_a_second_time_is_an_error(kind):
    model, x = net(), image()
    single = kind == "single sweep"
    module = planned(model, (x,), "rows/sweep" if single else kind, "mse" if single else None)

    def run() -> Tensor:
        return module(x, targets=torch.zeros(2, 4, 14, 6).double()) if single else module(x).sum()

    loss = run()
    loss.backward()
    with pytest.raises((RuntimeError, RowtuneError), match=r"second time|once"):
        loss.backward()
    loss = run()
    loss.backward(retain_graph=True)
    with pytest.raises(RowtuneError, match="once"):
        loss.backward()


@pytest.mark.parametrize("kind", [*ROWS, "single sweep"])
def test_second_derivatives_are_an_error(kind):
    model, x = net(), image()
    single = kind == "single sweep"
    module = planned(model, (x,), "rows/sweep" if single else kind, "mse" if single else None)
    loss = module(x, targets=torch.zeros(2, 4, 14, 6).double()) if single else module(x).sum()
    with pytest.raises(RowtuneError, match="second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_second_derivatives_through_keep():
    model, x = net(), image()
    found = []
    for run in (model, planned(model, (x,), "keep")):
        (g,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert close(found[1], found[0])


@pytest.mark.parametrize("kind", ROWS)
def test_a_weight_changed_between_forward_and_backward_is_an_error(kind):
    model, x = net(), image()
    y = planned(model, (x,), kind)(x)
    with torch.no_grad():
        model.body.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [False, True])
def test_a_hook_on_what_is_saved_sees_tensors_with_data(kind, norm):
    """Offloading around the first forward, which traces: it does not see the tracer's tensors."""
    model, x = net(norm), image()
    twin, plan = copy.deepcopy(model), planned(model, (x,), kind).plan
    module, addresses = rowtune.apply(model, plan), []

    def pack(t: Tensor) -> tuple[Tensor, int]:
        addresses.append(t.untyped_storage().data_ptr())
        return t.clone(), t.untyped_storage().data_ptr()

    def ours() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
            return module(x)

    plain = step(twin, lambda: twin(x), {"x": x})
    assert error(step(model, ours, {"x": x}), plain) < TOLERANCE
    assert addresses


def test_only_part_of_the_output_has_a_gradient():
    model, x = net(), image()
    for kind in ROWS:
        module = planned(model, (x,), kind)
        plain = step(model, lambda: model(x)[:, 1:, 5:6], {"x": x})
        assert error(step(model, lambda m=module: m(x)[:, 1:, 5:6], {"x": x}), plain) < TOLERANCE


# -- modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [False, True])
def test_eval_and_no_grad_are_plain_inference(kind, norm):
    model, x = net(norm), image()
    module = planned(model, (x,), kind)
    module(x).sum().backward()  # running statistics move once
    module.eval()
    assert not model.training and not model.norm.training
    assert uses_rows(module, x) == kind.startswith("rows")
    want = model(x)
    with torch.no_grad():
        got = module(x)
        assert not got.requires_grad
        assert close(got, want)
    with torch.inference_mode():
        assert close(module(x), want)
    same_step(model, module, x)  # frozen statistics, gradients all the same


@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_in_train_mode(kind):
    model, x = net(norm=True), image()
    plain = copy.deepcopy(model)
    module = planned(model, (x,), kind)
    with torch.no_grad():
        assert close(module(x), plain(x))
    assert close(model.norm.running_mean, plain.norm.running_mean)
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("kind", KINDS)
def test_train_eval_train_with_batch_norm(kind):
    """Running statistics follow plain training, one update a forward call in spite of recomputation."""
    ours, plain, x = net(norm=True), net(norm=True), image(grad=False)
    module = planned(ours, (x,), kind)
    for mode in (True, False, True, True):
        found = []
        for model, run in ((ours, module), (plain, plain)):
            run.train(mode)
            found.append(step(model, lambda r=run: r(x), {}))
        assert error(*found) < TOLERANCE
    assert ours.norm.num_batches_tracked == plain.norm.num_batches_tracked == 3


class Supervised(nn.Module):
    """Heads at two depths behind a flag, as nnU-Net's networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Conv2d(3, 4, 3, padding=1)
        self.decoder.deep_supervision, self.doubled = True, False

    def forward(self, x: Tensor) -> Any:
        y = self.decoder(x)
        y = y + y if self.doubled else y
        return [y, F.avg_pool2d(y, 2)] if self.decoder.deep_supervision else y


@pytest.mark.parametrize("given", [True, False])
def test_a_flag_of_the_model_is_seen_when_it_changes(given):
    model, x = Supervised().double(), image(grad=False)
    graph = rowtune.trace(model, (x,))
    plan = rowtune.uniform_plan(graph, "rows", band_rows=3)
    module = rowtune.apply(model, plan, graph=graph if given else None)
    for training in (True, False, True):
        module.train(training)
        assert [tuple(y.shape) for y in module(x)] == [(2, 4, 14, 6), (2, 4, 7, 3)]
    module.decoder.deep_supervision = False  # training is by the plan, which was made for all heads
    with pytest.raises(PlanError, match="segment"):
        module(x)
    module.eval()
    with torch.no_grad():
        assert close(module(x), model(x))
        model.doubled = True
        assert close(module(x), model(x))
        module.decoder.deep_supervision = True
        assert all(close(a, b) for a, b in zip(module(x), model(x), strict=True))


@pytest.mark.parametrize("kind", ROWS)
def test_frozen_norm_in_train_mode(kind):
    """Detectors train with norms in eval mode: such a norm is banded like any operator."""
    model, x = net(norm=True), image()
    model.norm.eval()
    module = planned(model, (x,), kind)
    (segment,) = module.program((x,), with_targets=False).segments
    assert isinstance(segment.how, Banded) and "batch_norm" in [n.op for n in segment.part.nodes]
    same_step(model, module, x)
    assert model.norm.num_batches_tracked == 0 and not model.norm.training
    model.norm.train()  # another graph of the same nodes: banded across the barrier
    twin = copy.deepcopy(model)
    want = step(twin, lambda: twin(x), {"x": x})
    assert error(step(model, lambda: module(x), {"x": x}), want) < TOLERANCE
    assert model.norm.num_batches_tracked == 1


def test_loss_in_eval_mode_and_without_gradients():
    model, x = net(norm=True), image()
    module = planned(model, (x,), "rows/sweep", "mse")
    target = torch.ones(2, 4, 14, 6, dtype=torch.float64)
    module.eval()
    want = F.mse_loss(model(x), target).detach()
    with torch.no_grad():
        loss, outputs = module(x, targets=target, outputs=True)
        assert close(loss, want) and close(outputs, model(x))
    assert close(module(x, targets=target).detach(), want)


# -- types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_after_apply(kind):
    model, x = net(norm=True), image()
    module = planned(model, (x,), kind)
    module(x)
    module.to(torch.float32)
    assert model.stem.weight.dtype == torch.float32
    plain = copy.deepcopy(model)
    z = x.detach().float().requires_grad_()
    want = step(plain, lambda: plain(z), {"x": z})
    got = step(model, lambda: module(z), {"x": z})
    assert got.output.dtype == torch.float32
    assert {g.dtype for g in got.gradients.values()} == {torch.float32}
    assert error(got, want) < 1e-4
    model.double()
    plain.load_state_dict(model.state_dict())
    want = step(plain.double(), lambda: plain(x), {"x": x})
    assert error(step(model, lambda: module(x), {"x": x}), want) < TOLERANCE


@pytest.mark.parametrize("kind", [*KINDS, "single sweep"])
@pytest.mark.parametrize("first", [True, False])
def test_autocast_outside(kind, first):
    """Traced under autocast or before it; backward outside the context, as PyTorch recommends."""
    model, x = net(dtype=torch.float32), image().detach().float().requires_grad_()
    single = kind == "single sweep"
    target = torch.zeros(2, 4, 14, 6)
    module = planned(model, (x,), "rows/sweep" if single else kind, "mse" if single else None)

    def ours() -> Tensor:
        return module(x, targets=target) if single else F.mse_loss(module(x), target)

    if not first:
        assert close(ours().detach(), F.mse_loss(model(x), target).detach(), 1e-5)

    def cast(run: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not single:
            assert module(x).dtype == model(x).dtype == torch.bfloat16
    want = step(model, lambda: cast(lambda: F.mse_loss(model(x), target)), {"x": x})
    got = step(model, lambda: cast(ours), {"x": x})
    assert {g.dtype for g in got.gradients.values()} == {torch.float32}
    exact = step(model, lambda: F.mse_loss(model(x), target), {"x": x})
    assert error(got, want) < 0.05
    assert error(got, exact) < max(2 * error(want, exact), 0.02)  # no worse than autocast itself is
    assert error(got, exact) > 1e-4  # it did run in bfloat16
    if not first:
        assert error(step(model, ours, {"x": x}), exact) < 1e-5  # and no longer does outside


class WeightCasts(TorchDispatchMode):
    """Counts casts of tensors of these shapes to another type."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.count += args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("tapes", ["split", "replay", "late"])
def test_autocast_casts_a_weight_once_a_call(kind, tapes):
    """Forward and backward of a segment, however many bands there are; gradients are as near as before."""
    model, x = net(norm=True, dtype=torch.float32), image().float().detach()
    module = planned(model, (x,), kind, tapes=tapes if kind == "rows/sweep" else "split")
    weights = {p.shape for p in model.parameters() if p.dim() > 1}

    def cast(run: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(x).float().square().mean()

    assert uses_rows(module, x)
    with WeightCasts(weights) as casts:
        got = step(model, lambda: cast(module), {})
    assert len(weights) == 5 and casts.count == 2 * len(weights)
    assert {g.dtype for g in got.gradients.values()} == {torch.float32}
    want = step(model, lambda: cast(model), {})
    exact = step(model, lambda: model(x).square().mean(), {})
    want.buffers = got.buffers = exact.buffers = {}
    # How far bfloat16 is off depends on the processor's kernels, and on how many rows they are given.
    assert error(got, exact) < 2 * error(want, exact)


def test_bfloat16_parameters_sum_their_gradients_in_float32():
    """256 bands of one row: summed in bfloat16 the weight gradient would lose its low bits."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)).bfloat16()
    x = torch.randn(1, 3, 256, 8).bfloat16()
    module = planned(model, (x,), "rows/sweep", band_rows=1)
    exact = copy.deepcopy(model).double()
    exact(x.double()).sum().backward()
    module(x).sum().backward()
    for a, b in zip(model.parameters(), exact.parameters(), strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert float((a.grad.double() - b.grad).abs().max()) < 0.02 * float(b.grad.abs().max())


# -- the loss's scale, and outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse", "dice_ce"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("announced", [True, False])
def test_loss_scale(name, scale, announced):
    """The scale may be given beforehand (fp16 needs that); gradients are the scaled ones either way."""
    model, x = net(), image()
    module = planned(model, (x,), "rows/sweep", name)
    loss = parse(name)
    target = synthetic_target(loss, (2, 4, 14, 6), torch.float64, 1)
    if announced:
        module.loss_scale = scale
    plain = step(model, lambda: loss(model(x), target) * scale, {"x": x})
    assert error(step(model, lambda: module(x, targets=target) * scale, {"x": x}), plain) < TOLERANCE
    # The loss itself is not scaled.
    assert close(module(x, targets=target).detach(), loss(model(x), target).detach())


def test_loss_scale_enters_before_the_gradients_underflow():
    """Half precision on the CPU: without the scale the first layer's gradients vanish."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)).half()
    x, target = torch.randn(1, 1, 64, 64).half(), torch.randn(1, 1, 64, 64).half()
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
        model[1].bias.zero_()
    module = planned(model, (x,), "rows/sweep", "mse", band_rows=8)
    found = {}
    for scale in (1.0, 2.0**16):
        model.zero_grad()
        module.loss_scale = scale
        (module(x, targets=target) * scale).backward()
        found[scale] = model[0].weight.grad.double() / scale
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    F.mse_loss(exact(x.double()), target.double()).backward()
    assert close(found[2.0**16], exact[0].weight.grad, 0.05)
    assert not close(found[1.0], exact[0].weight.grad, 0.05)


@pytest.mark.parametrize("name", ["mse", "cross_entropy", "dice_ce"])
def test_outputs_for_metrics(name):
    model, x = net(), image()
    module = planned(model, (x,), "rows/sweep", name)
    loss = parse(name)
    target = synthetic_target(loss, (2, 4, 14, 6), torch.float64, 1)
    got, outputs = module(x, targets=target, outputs=True)
    assert not outputs.requires_grad
    assert close(outputs, model(x).detach())
    plain = step(model, lambda: loss(model(x), target), {"x": x})
    assert error(step(model, lambda: module(x, targets=target, outputs=True)[0], {"x": x}), plain) < TOLERANCE
    assert close(got.detach(), plain.output)
    # Without targets the same module returns the model's outputs, with their gradients.
    same_step(model, module, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mse", "dice_ce"])
def test_a_plan_made_without_the_loss(kind, name):
    """The loss joins the last segment where it can: a single sweep, for a loss that allows one."""
    model, x, loss = net(), image(), parse(name)
    module = planned(model, (x,), kind)
    module = rowtune.apply(model, module.plan, name)
    last = module.program((x,), with_targets=True).segments[-1]
    assert isinstance(last.how, Banded) == kind.startswith("rows")
    assert not isinstance(last.how, Banded) or last.single_sweep == (kind == "rows/sweep" and name == "mse")
    target = synthetic_target(loss, (2, 4, 14, 6), torch.float64, 1)
    plain = step(model, lambda: loss(model(x), target), {"x": x})
    assert error(step(model, lambda: module(x, targets=target), {"x": x}), plain) < TOLERANCE
    same_step(model, module, x)


class Rearranged(nn.Module):
    """Rows of the output lie along another axis than those of the input."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.a, self.last = nn.Conv2d(3, 4, 3, padding=1), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.a(x)))


@pytest.mark.parametrize("name", ["mse", "cross_entropy", "dice_ce"])
@pytest.mark.parametrize(
    "last",
    [
        pytest.param(
            lambda y: torch.stack([y, y * y], 1), id="stacked"
        ),  # heads, as MONAI's DynUNet has them
        pytest.param(lambda y: y.transpose(2, 3), id="turned"),
        pytest.param(lambda y: y.movedim(1, -1), id="channels last"),
        pytest.param(lambda y: y[:, 0], id="without channels"),
    ],
)
@pytest.mark.parametrize(("kind", "images"), [*((k, 0) for k in KINDS), *((k, 1) for k in KINDS[1:])])
def test_a_loss_on_rows_along_another_axis(kind, name, last, images):
    torch.manual_seed(0)
    model, x = Rearranged(last).double(), image(width=14)
    module = planned(model, (x,), kind, name, images=images)
    loss = parse(name)
    target = synthetic_target(loss, tuple(model(x).shape), torch.float64, 1)
    plain = step(model, lambda: loss(model(x), target), {"x": x})
    assert error(step(model, lambda: module(x, targets=target), {"x": x}), plain) < TOLERANCE


def test_targets_that_do_not_fit_are_an_error():
    model, x = net(), image()
    with pytest.raises(UsageError, match="loss"):
        planned(model, (x,), "rows/sweep")(x, targets=x)
    with pytest.raises(UsageError, match=r"needs targets of shape \(2, 14, 6\), not \(2, 4, 14, 6\)"):
        planned(model, (x,), "rows/sweep", "cross_entropy")(x, targets=torch.zeros(2, 4, 14, 6))


# -- the module as a module ----------------------------------------------------------------------------------


def test_names_and_state_are_the_models_own():
    model, x = net(norm=True), image()
    module = planned(model, (x,), "rows/sweep")
    assert list(module.state_dict()) == list(model.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(module.parameters(), model.parameters(), strict=True))
    other = {k: v + 1 for k, v in model.state_dict().items()}
    module.load_state_dict(other)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in other.items())
    model.load_state_dict({k: v - 1 for k, v in other.items()})
    assert close(module(x).detach(), copy.deepcopy(model)(x).detach())


def test_a_parameter_put_in_place_of_another_is_used():
    """Parameters are fetched at each call: weight averaging and parametrizations replace them."""
    model, x = net(), image()
    module = planned(model, (x,), "rows/sweep")
    module(x)
    model.stem.weight = nn.Parameter(model.stem.weight.detach() * 2)
    same_step(model, module, x)


@pytest.mark.parametrize("loss", [None, "mse"])
def test_a_copy_is_independent(loss):
    model, x = net(norm=True), image()
    module = planned(model, (x,), "rows/sweep", loss)
    module(x).sum().backward()
    twin = copy.deepcopy(module)
    model.zero_grad()
    assert list(twin.state_dict()) == list(module.state_dict())
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    with torch.no_grad():
        twin.stem.weight.zero_()
    assert model.stem.weight.abs().sum() > 0
    twin.eval()
    assert module.training and model.training and not twin.norm.training


def test_pickle_goes_round(tmp_path):
    model, x = net(norm=True), image()
    module = planned(model, (x,), "rows/cache")
    want = module(x).detach()
    torch.save(module, tmp_path / "module.pt")
    back = torch.load(tmp_path / "module.pt", weights_only=False)
    assert close(back(x).detach(), want)


def test_a_plan_for_another_model_is_refused():
    model, x = net(), image()
    graph = rowtune.trace(model, (x,))
    plan = rowtune.uniform_plan(graph, "rows", 3)
    assert rowtune.apply(model, plan, fingerprint=graph.fingerprint)(x).shape == (2, 4, 14, 6)
    other = net(norm=True)
    with pytest.raises(PlanError, match="fingerprint"):
        rowtune.apply(other, plan, fingerprint=graph.fingerprint)(x)
    with pytest.raises(PlanError):
        rowtune.apply(nn.Conv2d(3, 4, 3).double(), plan)(x)


class Flipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(torch.relu(self.first(x)).flip(2)))


def test_plans_that_cannot_be_are_refused():
    model, x = Flipped().double(), image()
    graph = rowtune.trace(model, (x,))
    first, last = graph.nodes[0].name, graph.nodes[-1].name
    middle = graph.nodes[3].name
    for segments, reason in [
        ((Segment(first, last, "rows", 3),), f"{first}..{last} cannot be banded: "),
        ((Segment(middle, last, "keep"),), "in order"),
        ((Segment(first, middle, "keep"),), "no segment covers"),
        ((Segment(first, "nothing", "keep"), Segment("nowhere", last)), "in order|ends before"),
        ((Segment(first, last, "keep", images=1),), "no images"),
    ]:
        with pytest.raises(PlanError, match=reason):
            rowtune.apply(model, Plan(segments))(x)


def test_importing_rowtune_does_not_import_torch():
    code = "import sys, rowtune; assert rowtune.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- structure -----------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Feature maps at strides 2 and 4, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.b = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = torch.tanh(self.a(x))
        return {"coarse": torch.tanh(self.b(fine)), "fine": fine}


class Detector(nn.Module):
    """A backbone, and heads with data-dependent control flow that no exporter takes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.score, self.box = nn.Conv2d(6, 1, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        scores = self.score(maps["coarse"]).flatten()
        top = scores[scores > scores.median()]
        return top.sum() + self.box(maps["fine"].mean((2, 3))).square().sum()


@pytest.mark.parametrize("kind", ROWS)
def test_a_banded_backbone_in_a_plain_detector(kind):
    model, x = Detector().double(), image(2, 17, 9)
    keys = list(model.state_dict())
    plain = step(model, lambda: model(x), {"x": x})
    model.backbone = planned(model.backbone, (x,), kind)
    assert uses_rows(model.backbone, x)
    assert list(model.state_dict()) == keys
    assert error(step(model, lambda: model(x), {"x": x}), plain) < TOLERANCE
    model.eval()
    assert not model.backbone.training
    with torch.no_grad():
        assert close(model(x), plain.output)


class Pair(nn.Module):
    """Two images at different strides in, a nested structure out, at three heights; `power` is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.b = nn.Conv2d(3, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, pair: dict[str, Tensor], power: int, bias: Tensor) -> tuple[Any, ...]:
        y = torch.tanh(self.a(pair["large"])) + self.b(pair["small"]) ** power
        z = self.c(y + bias)
        up = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return up, {"y": y, "z": [z, z * 2]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("band", [1, 4])
def test_several_inputs_and_outputs(kind, band):
    model, large = Pair().double(), image(2, 16, 8)
    small, bias = image(2, 8, 4), torch.randn(1, 4, 1, 1).double().requires_grad_()
    inputs: Any = ({"large": large, "small": small}, 2, bias)
    module = planned(model, inputs, kind, **({"band_rows": band} if kind.startswith("rows") else {}))
    assert uses_rows(module, *inputs) == kind.startswith("rows")

    def mixed(run: Any) -> Tensor:
        up, rest = run(*inputs)
        assert set(rest) == {"y", "z"} and isinstance(rest["z"], list)
        return up.square().sum() + rest["y"].exp().mean() + (rest["z"][0] * rest["z"][1]).sum()

    tensors = {"large": large, "small": small, "bias": bias}
    plain = step(model, lambda: mixed(model), tensors)
    assert error(step(model, lambda: mixed(module), tensors), plain) < TOLERANCE


def test_inputs_by_name_and_the_same_tensor_twice():
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) * self.a(y * 2)

    model, x = Add().double(), image()
    module = planned(model, (x, x), "rows/sweep")
    same_step(model, module, x, x)
    plain = step(model, lambda: model(x, y=x), {"x": x})
    assert error(step(model, lambda: module(x, y=x), {"x": x}), plain) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 14, 6), (3, 14, 6), (2, 22, 6), (2, 4, 6), (2, 2, 2), (4, 30, 12)])
def test_one_plan_serves_other_shapes(kind, shape):
    model = net()
    module = planned(model, (image(),), kind)
    same_step(model, module, image(*shape))


@pytest.mark.parametrize("images", [1, 2])
def test_one_plan_with_a_batch_split_serves_other_batches(images):
    model = net()
    module = planned(model, (image(3),), "rows/sweep", images=images)
    for batch in (3, 1, 2, 5):
        same_step(model, module, image(batch))


def test_other_shapes_with_the_loss_inside():
    model, loss = net(), parse("cross_entropy:ignore_index=1")
    module = planned(model, (image(),), "rows/sweep", loss.name, images=1)
    for shape in [(2, 14, 6), (1, 8, 10), (3, 20, 4)]:
        x = image(*shape)
        target = synthetic_target(loss, (shape[0], 4, *shape[1:]), torch.float64, 2)
        plain = step(model, lambda x=x, t=target: loss(model(x), t), {"x": x})
        assert error(step(model, lambda x=x, t=target: module(x, targets=t), {"x": x}), plain) < TOLERANCE


# -- randomness ----------------------------------------------------------------------------------------------


class Random(nn.Module):
    """Dropout of elements, and stochastic depth where asked."""

    def __init__(self, p: float = 0.4, depth: bool = True) -> None:
        super().__init__()
        self.p, self.depth = p, depth
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(torch.tanh(self.a(x)), self.p, self.training)
        drops = self.training and self.depth
        keep = y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(1 - self.p) if drops else 1.0
        y = y + torch.tanh(self.b(y)) * keep
        return F.dropout(self.b(y), self.p, self.training)


def drawn(model: nn.Module, module: nn.Module, x: Tensor, seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return step(model, lambda: module(x), {"x": x})


@pytest.mark.parametrize(("kind", "images"), [*((k, 0) for k in KINDS), *((k, 1) for k in KINDS[1:])])
def test_random_masks_do_not_depend_on_the_plan(kind, images):
    model, x = Random(depth=not (images and kind == "checkpoint")).double(), image(3)
    keep = drawn(model, planned(model, (x,), "keep"), x)
    for band in (2, 5) if kind.startswith("rows") else (0,):
        options = {"band_rows": band} if band else {}
        module = planned(model, (x,), kind, images=images, **options)
        assert error(drawn(model, module, x), keep) < TOLERANCE
    assert error(drawn(model, module, x, seed=8), keep) > 0.1


@pytest.mark.parametrize("kind", ["keep", "rows/sweep"])
def test_masks_change_from_step_to_step(kind):
    model, x = Random().double(), image()
    module = planned(model, (x,), kind)
    torch.manual_seed(0)
    first, second = module(x).detach(), module(x).detach()
    assert not close(first, second, 0.1)
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(x), module(x))
        assert close(module(x), model.eval()(x))


@pytest.mark.parametrize("kind", ["keep", "rows/recompute", "rows/sweep"])
def test_backward_uses_the_masks_of_forward(kind):
    """A linear network: the output is the sum of input times gradient, if both see the same masks."""
    first, second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 3, bias=False)
    model, x = nn.Sequential(first, nn.Dropout(0.5), second).double(), image()
    module = planned(model, (x,), kind)
    out = module(x).sum()
    out.backward()
    assert close((x.grad * x).sum().detach(), out.detach())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_keep_probability(p):
    """Binomial within five deviations, over all elements, each image, each channel, each row; and no two
    images, channels or neighbouring rows share a mask."""
    n = (4, 8, 64, 64)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Dropout(p))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
    x = torch.randn(n[0], 1, *n[2:])
    module = planned(model, (x,), "rows/sweep", band_rows=10)
    y = module(x).detach()
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = kept.double().mean(dims)
        count = kept.numel() / share.numel()
        assert float((share - (1 - p)).abs().max()) < 5 * (p * (1 - p) / count) ** 0.5
    overlap = (1 - p) ** 2 + p**2
    for a, b in ((kept[0], kept[1]), (kept[:, 0], kept[:, 1]), (kept[:, :, :-1], kept[:, :, 1:]),
                 (kept[..., :-1], kept[..., 1:])):  # fmt: skip
        spread = (overlap * (1 - overlap) / a.numel()) ** 0.5
        assert abs(float((a == b).double().mean()) - overlap) < 6 * spread


def test_stochastic_depth_drops_whole_images():
    class Depth(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y + torch.ones_like(y) * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.7)

    x = torch.randn(200, 3, 4, 4).double()
    module = planned(Depth(), (x,), "rows/sweep", band_rows=1)
    gone = module(x) - x
    per_image = gone.amax((1, 2, 3))
    assert torch.allclose(gone, per_image[:, None, None, None].expand_as(gone))
    assert abs(float(per_image.mean()) - 0.7) < 5 * (0.7 * 0.3 / 200) ** 0.5


# -- several processes ---------------------------------------------------------------------------------------


def replica(rank: int, folder: str) -> None:
    """One of two processes: gradients of its half of the batch, averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = image(4, grad=False)[2 * rank : 2 * rank + 2]
    target = torch.full((2, 4, 14, 6), 0.5, dtype=torch.float64)
    found = []
    for kind, inside in [("rows/sweep", True), *((kind, False) for kind in ROWS)]:
        model = net()
        module = planned(model, (x,), kind, "mse" if inside else None)
        # Small buckets: reduced one by one while backward goes on.
        parallel = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=0.001)
        for _ in range(2):  # a second step, after the buckets are rebuilt
            parallel.zero_grad()
            loss = parallel(x, targets=target) if inside else F.mse_loss(parallel(x), target)
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    model, x = net(), image(4, grad=False)
    F.mse_loss(model(x), torch.full((4, 4, 14, 6), 0.5, dtype=torch.float64)).backward()
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    for found in torch.load(tmp_path / "gradients.pt"):
        for name, parameter in model.named_parameters():
            assert close(found[name], parameter.grad), name


class Masked(nn.Module):
    """A constant written through a view, beside ones of the same kind: names must not meet."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x):
        a = torch.zeros(1, 1, 12, 6, dtype=x.dtype)
        a[:, :, :8] = 1
        b = torch.zeros(1, 1, 12, 6, dtype=x.dtype)
        c = torch.zeros(1, 1, 12, 6, dtype=x.dtype)
        return self.conv(x) * (a + 1) + b + c


class Averaged(nn.Module):
    """A buffer that is copied into, and read after that."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.register_buffer("ema", torch.zeros(1, 2, 1, 1, dtype=torch.float64))

    def forward(self, x):
        self.ema.copy_(x.detach().mean((0, 2, 3), keepdim=True) * 0.1 + self.ema * 0.9)
        return self.conv(x * 2 - self.ema).relu()


@pytest.mark.parametrize("kind", [Masked, Averaged])
@pytest.mark.parametrize("barriers", ["store", "recompute", "narrow", "passes"])
def test_constants_and_copied_buffers(kind, barriers):
    torch.manual_seed(0)
    plain, model = kind().double(), kind().double()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 12, 6, dtype=torch.float64)
    graph = rowtune.trace(model, (x,))
    module = rowtune.apply(model, rowtune.uniform_plan(graph, "rows", 4, barriers=barriers))
    for _ in range(2):
        expected, got = plain(x), module(x)
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
        expected.square().sum().backward()
        got.square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    assert all(torch.allclose(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = self.a(x).relu()
        return self.c(y), self.b(y).mean((2, 3))


def test_a_single_sweep_hands_out_reductions_as_well():
    model = TwoHeads()
    x, target = torch.randn(1, 2, 12, 6), torch.zeros(1, 12, 6, dtype=torch.long)
    graph = with_loss(rowtune.trace(model, (x,)), parse("cross_entropy"))
    module = rowtune.apply(model, rowtune.uniform_plan(graph, "rows", 4), "cross_entropy")
    loss, (_, pooled) = module(x, targets=target, outputs=True)
    assert torch.allclose(pooled, model(x)[1], atol=1e-6)
    loss.backward()
    assert model.c.weight.grad is not None
