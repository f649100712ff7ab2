"""What a model's forward says beyond its operators: gradient modes, autocast, effects, randomness."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import TOLERANCE, error, step
from torch import Tensor, nn

import rowtune
from rowtune.cost.predict import predict
from rowtune.errors import ModelError, PlanError, UsageError
from rowtune.graph.cuts import stretches
from rowtune.graph.losses import parse
from rowtune.graph.training import with_loss
from rowtune.plan.lower import lower
from rowtune.plan.plan import Plan, Segment

PLANS: dict[str, dict[str, Any]] = {
    "keep": {"policy": "keep"},
    "checkpoint": {"policy": "checkpoint"},
    **{f"rows/{halo}": {"policy": "rows", "halo": halo} for halo in ("recompute", "cache", "sweep")},
    **{f"tapes/{t}": {"policy": "rows", "tapes": t} for t in ("whole", "late", "replay")},
    **{f"barriers/{b}": {"policy": "rows", "barriers": b} for b in ("recompute", "narrow", "passes")},
    "images": {"policy": "rows", "images": 1},
}


def image(dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    x = torch.randn(2, 3, 11, 6, dtype=dtype, generator=torch.Generator().manual_seed(4))
    return x.requires_grad_(grad)


def applied(model: nn.Module, plan: str, *inputs: Tensor, loss: Any = None) -> Any:
    graph = rowtune.trace(model, inputs)
    options = {"band_rows": 3, **PLANS[plan]}
    return rowtune.apply(model, rowtune.uniform_plan(graph, **options), loss)


def same(make: Callable[[], nn.Module], plan: str, tolerance: float = TOLERANCE) -> None:
    """One step from the same start: outputs, gradients and buffers as from plain PyTorch; and once more."""
    torch.manual_seed(3)
    plain = make()
    dtype = next(plain.parameters()).dtype
    torch.manual_seed(3)
    ours, x = make(), image(dtype)
    module = applied(ours, plan, x)
    for _ in range(2):
        want = step(plain, lambda: plain(x), {"x": x})
        got = step(ours, lambda: module(x), {"x": x})
        assert error(got, want) < tolerance


# -- regions -------------------------------------------------------------------------------------------------


class Region(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(torch.tanh(self.first(x))))

    def inside(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class NoGrad(Region):
    def inside(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            mask = torch.sigmoid(self.own(y))
        return y * mask + self.norm(y)


class Decorated(Region):
    @torch.no_grad()
    def mask(self, y: Tensor) -> Tensor:
        return F.relu(self.own(y))

    def inside(self, y: Tensor) -> Tensor:
        return y + self.mask(y)


class Inference(Region):
    @torch.inference_mode()
    def shift(self, y: Tensor) -> Tensor:
        return self.own(y)

    def inside(self, y: Tensor) -> Tensor:
        return y + self.shift(y)


class Nested(Region):
    """Gradients on again inside; statistics of a norm that change where gradients are off."""

    def inside(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            mask = self.norm(y)
            with torch.enable_grad():
                z = torch.tanh(self.own(y))
            mask = mask * z.mean((2, 3), keepdim=True)
            mask.mul_(0.5)
        return y * mask + z


class Statistics(Region):
    """A norm by hand, with statistics that carry no gradient."""

    def inside(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            mean, deviation = y.mean((2, 3), keepdim=True), y.std((2, 3), keepdim=True)
            top = y.amax((2, 3), keepdim=True)
        return self.own((y - mean) / deviation) * top


class SwitchedOff(Region):
    def inside(self, y: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        z = self.own(y)
        torch.set_grad_enabled(True)
        return y * z


class WithoutAutocast(Region):
    def inside(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            z = self.norm(self.own(y.to(self.own.weight.dtype)))
        return F.silu(z)


class Both(Region):
    def inside(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.own(y)
            with torch.no_grad():
                mask = self.own(z)
            z = z * mask
            with torch.autocast("cpu", enabled=False):
                return self.own(z.to(self.own.weight.dtype))


def spectral() -> nn.Module:
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()


def weight_norm() -> nn.Module:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()


REGIONS = (NoGrad, Decorated, Inference, Nested, Statistics, SwitchedOff, WithoutAutocast, Both)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("region", REGIONS)
def test_regions_are_no_control_flow(region: type[Region], plan: str) -> None:
    same(lambda: region().double(), plan)


@pytest.mark.parametrize("plan", PLANS)
def test_weights_that_are_made(plan: str) -> None:
    same(weight_norm, plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("region", [WithoutAutocast, Both])
def test_autocast_regions_in_low_precision(region: type[Region], outer: bool, plan: str) -> None:
    """Also inside the caller's own autocast. What autocast rounds may round otherwise in bands."""
    torch.manual_seed(3)
    model, x = region(), image(torch.float32)
    module = applied(model, plan, x)
    found = []
    for run in (model, module):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            y = run(x)
        assert y.dtype == (torch.bfloat16 if outer else torch.float32)
        y.float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for want, got in zip(*found, strict=True):
        assert float((got - want).norm()) < 0.02 * float(want.norm()) + 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_a_region_in_float32_stays_so_inside_the_callers_autocast(plan: str) -> None:
    class Precise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.own(torch.tanh(x))

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    torch.manual_seed(3)
    model, x = Precise(), image(torch.float32)
    module = applied(model, plan, x)
    assert run().dtype == torch.float32
    want = step(model, lambda: model(x), {"x": x})
    assert error(step(model, run, {"x": x}), want) < 1e-5


def test_outputs_without_gradient_have_none() -> None:
    class Two(Region):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = torch.tanh(self.first(x))
            with torch.no_grad():
                return y, self.own(y)

    model, x = Two().double(), image()
    for plan in PLANS:
        y, z = applied(model, plan, x)(x)
        assert y.requires_grad and not z.requires_grad, plan


def test_the_callers_mode_when_the_model_is_traced_does_not_stick() -> None:
    model, x = NoGrad().double(), image()
    want = step(model, lambda: model(x), {"x": x})
    for plan in ("keep", "rows/sweep"):
        module = applied(model, plan, x)
        with torch.no_grad():
            module(x)
        got = step(model, lambda: module(x), {"x": x})  # noqa: B023
        got.buffers, want.buffers = {}, {}
        assert error(got, want) < TOLERANCE


def test_a_change_in_place_that_gradients_do_not_see_is_refused() -> None:
    class Clamped(Region):
        def inside(self, y: Tensor) -> Tensor:
            with torch.no_grad():
                y.clamp_(-0.5, 0.5)
            return y

    with pytest.raises(ModelError, match="in place where gradients are off"):
        rowtune.trace(Clamped().double(), (image(),))


# -- effects -------------------------------------------------------------------------------------------------


class Shared(Region):
    """One norm, called three times; and a norm that nobody reads."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.norm.momentum = momentum

    def inside(self, y: Tensor) -> Tensor:
        return self.norm(self.own(self.norm(y)) + self.norm(y * y))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_called_again_counts_every_call(momentum: float | None, plan: str) -> None:
    same(lambda: Shared(momentum).double(), plan)


@pytest.mark.parametrize("cut", [4, 10, 12])
def test_a_norm_called_in_two_segments(cut: int) -> None:
    """PyTorch's own norm in the first, one that is taken apart in the second."""
    torch.manual_seed(3)
    model, x = Shared().double(), image()
    plain, names = copy.deepcopy(model), [node.name for node in rowtune.trace(model, (x,)).nodes]
    want = step(plain, lambda: plain(x), {"x": x})
    for policy in ("keep", "rows"):
        parts = Segment(names[0], names[cut - 1], "keep"), Segment(names[cut], names[-1], policy)
        ours = copy.deepcopy(model)
        module = rowtune.apply(ours, Plan((parts[0], replace(parts[1], band_rows=3)), 2))
        assert error(step(ours, lambda: module(x), {"x": x}), want) < TOLERANCE  # noqa: B023


class Auxiliary(Region):
    """A head whose output nobody reads; its norm still counts."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm(4)

    def inside(self, y: Tensor) -> Tensor:
        self.norm(self.own(y))
        return y


@pytest.mark.parametrize("plan", PLANS)
def test_a_norm_that_nobody_reads_keeps_its_statistics(plan: str) -> None:
    same(lambda: Auxiliary().double(), plan)
    same(lambda: Auxiliary(lambda c: nn.InstanceNorm2d(c, track_running_stats=True)).double(), plan)


class Mask(Region):
    """As SwinUNETR makes its attention masks: written through views, read between and after."""

    def inside(self, y: Tensor) -> Tensor:
        mask = torch.zeros(1, 1, *y.shape[2:], dtype=y.dtype, device=y.device)
        mask[:, :, :4] = 1
        y = y + mask
        for i, rows in enumerate((slice(0, -2), slice(-2, None))):
            mask[:, :, rows] = mask[:, :, rows] * 2 + i
        left, right = mask.chunk(2, 3)
        left += right.flip(2)
        return self.own(y) * mask.masked_fill(mask != 0, 3.0) + mask


@pytest.mark.parametrize("plan", PLANS)
def test_a_mask_written_through_views_is_a_constant(plan: str) -> None:
    same(lambda: Mask().double(), plan)
    graph = rowtune.trace(Mask().double(), (image(),))
    assert {t.device for t in graph.constants.values()} == {torch.device("cpu")}
    meta = rowtune.trace(Mask().double(), (image(grad=False).to("meta"),))
    assert [n.name for n in meta.nodes] == [n.name for n in graph.nodes]


# -- randomness ----------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.draw(torch.tanh(self.first(x))))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli of a half": lambda y: y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.5).mul_(2.0),
    "bernoulli in place of probabilities": lambda y: y * torch.empty_like(y).bernoulli_(y.detach().sigmoid()),
    "bernoulli of probabilities": lambda y: y * torch.bernoulli(y.sigmoid()),
    "bernoulli like": lambda y: y * torch.bernoulli(y, 0.3),
    "normal": lambda y: y + torch.empty_like(y).normal_(),
    "normal of 1, 0.1": lambda y: y * y.new_empty(y.shape).normal_(1.0, 0.1),
    "uniform": lambda y: y + torch.empty_like(y).uniform_(),
    "exponential": lambda y: y + torch.empty_like(y).exponential_(),
    "randn": lambda y: y + torch.randn_like(y),
    "integers": lambda y: y + torch.randint_like(y, 3),
    "fractional pooling": lambda y: F.fractional_max_pool2d(y, 2, output_size=(5, 3)),
    "rrelu": lambda y: F.rrelu(y, 0.1, 0.4, True),
    "rrelu in place": lambda y: F.rrelu(y * 1, 0.1, 0.4, True, inplace=True),
    "alpha dropout": lambda y: F.alpha_dropout(y, 0.3, True),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_operators_draw_the_same_in_every_plan(name: str) -> None:
    torch.manual_seed(3)
    model, x, found = Drawn(DRAWS[name]).double(), image(), {}
    for plan in ("keep", "checkpoint", "rows/recompute", "rows/cache", "rows/sweep", "images"):
        module = applied(model, plan, x)

        def run() -> Tensor:
            torch.manual_seed(11)
            return module(x)  # noqa: B023

        found[plan] = step(model, run, {"x": x})
        assert error(found[plan], found["keep"]) < TOLERANCE, plan
    first = module(x)
    assert any(not torch.equal(module(x), first) for _ in range(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", PLANS)
def test_rrelu_has_the_gradients_of_its_slopes(plan: str, dtype: torch.dtype) -> None:
    """Inside PyTorch's own checkpoint it has not: slopes are read that nobody drew."""
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.RReLU(0.1, 0.4)).to(dtype), image(dtype)
    nn.init.dirac_(model[0].weight)
    y = applied(model, plan, x)(x)
    y.sum().backward()
    slopes = (y / x).detach()
    assert torch.allclose(x.grad, slopes)
    assert bool(((slopes == 1) == (x > 0)).all()) and bool(((slopes > 0.1) | (x > 0)).all())
    assert torch.equal(rowtune.apply(model.eval(), module_plan(model, x))(x), model(x))


def module_plan(model: nn.Module, x: Tensor) -> Any:
    return rowtune.uniform_plan(rowtune.trace(model, (x,), training=False), "rows", 3)


NOTHING = (nn.Dropout(0.0), nn.Dropout2d(0.0), nn.AlphaDropout(0.0), nn.FeatureAlphaDropout(0.0))


@pytest.mark.parametrize("layer", NOTHING)
def test_dropout_of_nothing_is_not_random(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.Conv2d(4, 2, 3)).double()
    graph = rowtune.trace(model, (image(),))
    assert not any(node.random for node in graph.nodes)
    assert stretches(graph, 2) == [(0, len(graph.nodes))]
    state = torch.get_rng_state()
    same(lambda: copy.deepcopy(model), "rows/sweep")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    applied(model, "rows/sweep", image())(image())
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_random_in_place_integers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"random_.*torch\.randint"):
        rowtune.trace(Drawn(lambda y: y + torch.empty_like(y).random_(0, 3)), (image(torch.float32),))


def test_draws_of_python_are_said_to_be_frozen() -> None:
    model, x = Drawn(lambda y: y * random.random()).double(), image()
    random.seed(5)
    first = random.random()
    random.seed(5)
    graph = rowtune.trace(model, (x,))
    assert random.random() == first  # put back
    assert len(graph.notes) == 1 and "random" in graph.notes[0]
    module = rowtune.apply(model, rowtune.uniform_plan(graph, "rows", 3))
    with pytest.warns(UserWarning, match="Python's or numpy's random numbers"):
        module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
    assert not rowtune.trace(Drawn(torch.tanh).double(), (x,)).notes


def test_hooks_are_said_to_be_traced_in() -> None:
    model, x = Drawn(torch.tanh).double(), image()
    model.first.register_forward_hook(lambda module, args, out: out * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.last)  # a hook of PyTorch's own
    (note,) = rowtune.trace(model, (x,)).notes
    assert note.startswith("forward hooks on first ran once")
    with pytest.warns(UserWarning, match="forward hooks on first"):
        applied(model, "rows/sweep", x)(x)


# -- the Python API ------------------------------------------------------------------------------------------


class Heads(Region):
    """Two outputs; what comes of the second has norms of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(
            nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)
        )

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.first(x))
        return self.last(self.norm(y)), self.side(y).flip(2).abs()


@pytest.mark.parametrize("plan", PLANS)
def test_a_loss_leaves_out_the_other_outputs(plan: str) -> None:
    torch.manual_seed(3)
    model, x = Heads().double(), image()
    plain, target = copy.deepcopy(model), torch.zeros(2, 2, 11, 6, dtype=torch.float64)
    module = applied(model, plan, x, loss="mse")
    want = step(plain, lambda: F.mse_loss(plain(x)[0], target), {"x": x})
    got = step(model, lambda: module(x, targets=target), {"x": x})
    assert error(got, want) < TOLERANCE
    graph = with_loss(rowtune.trace(model, (x,)), parse("mse"))
    options = {"band_rows": 3, **PLANS[plan]}
    assert predict(graph, rowtune.uniform_plan(rowtune.trace(model, (x,)), **options)).peak_bytes > 0


class Side(Region):
    """A second output, made in several steps."""

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.first(x))
        return self.last(y), self.own(torch.tanh(self.own(y))).mean((2, 3))


@pytest.mark.parametrize("policy", ["checkpoint", "keep", "rows"])
def test_checkpoints_of_segments_leave_out_the_other_outputs(policy: str) -> None:
    """The heads' nodes lie in other segments than those that read them."""
    torch.manual_seed(3)
    model, x = Side().double(), image()
    plain, target = copy.deepcopy(model), torch.zeros(2, 2, 11, 6, dtype=torch.float64)
    graph = with_loss(rowtune.trace(model, (x,)), parse("mse"))
    names = [node.name for node in graph.nodes]
    want = step(plain, lambda: F.mse_loss(plain(x)[0], target), {"x": x})
    for cut in range(2, len(names) - 4):
        parts = (Segment(names[0], names[cut - 1], policy), Segment(names[cut], names[-1], policy))
        inside = tuple(replace(p, band_rows=3) if policy == "rows" else p for p in parts)
        plan = Plan((Segment(names[0], names[-1], "checkpoint", inside=inside),), 2)
        module = rowtune.apply(model, plan, "mse")
        got = step(model, lambda: module(x, targets=target), {"x": x})  # noqa: B023
        assert error(got, want) < TOLERANCE
        run = {node.name for leaf in lower(graph, plan).segments[0].parts for node in leaf.part.nodes}
        assert run == graph.live < set(names)


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().sqrt()


pixel_loss.row_local = True  # type: ignore[attr-defined]

IMAGES = torch.rand(2, 4, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = IMAGES.argmax(1)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
GIVEN: dict[str, tuple[Any, Tensor, bool]] = {  # loss, target, whether rows can run into it
    "cross entropy": (nn.CrossEntropyLoss(), LABELS, True),
    "with options": (nn.CrossEntropyLoss(WEIGHT, ignore_index=2, reduction="sum"), LABELS, True),
    "smoothed labels": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS, False),
    "mse": (nn.MSELoss(), IMAGES, True),
    "l1": (nn.L1Loss(reduction="sum"), IMAGES, True),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), IMAGES, True),
    "bce": (nn.BCEWithLogitsLoss(), IMAGES, True),
    "bce with weights": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT[:, None, None]), IMAGES, False),
    "huber": (nn.HuberLoss(), IMAGES, False),
    "a function": (lambda output, target: F.cross_entropy(output, target), LABELS, False),
    "a function of rows": (pixel_loss, IMAGES, True),
}


@pytest.mark.parametrize("plan", ["keep", "checkpoint", "rows/cache", "rows/sweep"])
@pytest.mark.parametrize("name", GIVEN)
def test_losses_as_torch_has_them(name: str, plan: str) -> None:
    loss, target, banded = GIVEN[name]
    model, x = nn.Conv2d(3, 4, 3, padding=1).double(), image()
    module = applied(model, plan, x, loss=loss)
    want = step(model, lambda: loss(model(x), target).mean(), {"x": x})
    assert error(step(model, lambda: module(x, targets=target), {"x": x}), want) < TOLERANCE
    if plan == "rows/sweep":
        program = module.program((x,), with_targets=True)
        assert [s.single_sweep for s in program.segments][-1] == banded


@pytest.mark.parametrize("loss", [3, nn.MSELoss, ("mse",), Region])
def test_what_is_no_loss(loss: Any) -> None:
    model = nn.Conv2d(3, 4, 3)
    plan = rowtune.uniform_plan(rowtune.trace(model, (image(torch.float32),)), "keep")
    with pytest.raises(
        UsageError, match=r"loss is a name \(cross_entropy.*function \(output, target\)"
    ) as said:
        rowtune.apply(model, plan, loss)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hinge", "none of cross_entropy, .* in Python the function itself"),
        ("mse:beta", "key=value"),
        ("mse:beta=1", "beta.* in Python the function itself"),
        ("nowhere:loss", "nowhere.* in Python the function itself"),
        ("cross_entropy:label_smoothing=0.1", "label smoothing.* in Python the function itself"),
    ],
)
def test_a_name_that_is_no_loss_speaks_of_no_flag(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as said:
        parse(name)
    assert "--" not in str(said.value) and "\n" not in str(said.value)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled_modules_run_as_they_are() -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()).double(), image()
    plain = copy.deepcopy(model)
    module = torch.compile(applied(model, "rows/sweep", x))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            want = step(plain, lambda: plain(x), {"x": x})
            assert error(step(model, lambda: module(x), {"x": x}), want) < TOLERANCE
    compiled = torch._dynamo.utils.counters["stats"]
    assert not compiled["unique_graphs"] and not compiled["calls_captured"]


@pytest.mark.parametrize("plan", PLANS)
def test_channels_last_outputs_stay_so(plan: str) -> None:
    last = torch.channels_last
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))
    model, x = model.to(memory_format=last), image(torch.float32, grad=False)
    module = applied(model, plan, x)
    for order in (last, torch.contiguous_format):
        given = x.contiguous(memory_format=order)
        assert model(given).is_contiguous(memory_format=last) and module(given).is_contiguous(
            memory_format=last
        )
    other = model.to(memory_format=torch.contiguous_format)
    assert other(x).is_contiguous() and applied(other, plan, x)(x).is_contiguous()


class Supervised(Region):
    """As MONAI's DynUNet: layers leave their heads' outputs in a list that they share with the network."""

    class Layer(nn.Module):
        def __init__(self, heads: list[Tensor], index: int) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
            self.heads, self.index = heads, index

        def forward(self, y: Tensor) -> Tensor:
            y = torch.tanh(self.body(y))
            self.heads[self.index] = self.head(F.max_pool2d(y, 2))
            return y

    def __init__(self) -> None:
        super().__init__()
        self.heads = [torch.rand(1), torch.rand(1)]
        self.layers = nn.Sequential(*(Supervised.Layer(self.heads, i) for i in range(2)))
        self.seen, self.latest = {"calls": []}, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.layers(self.first(x)))
        self.seen["calls"].append(1)
        self.latest = y
        if not self.training or torch.jit.is_scripting():
            return y
        return torch.stack([y, *(F.interpolate(h, y.shape[2:]) for h in self.heads)], 1)


@pytest.mark.parametrize("plan", ["keep", "checkpoint", "rows/sweep"])
def test_deep_supervision_through_a_shared_list(plan: str) -> None:
    same(lambda: Supervised().double(), plan)
    model, x = Supervised().double(), image()
    heads = [*model.heads]
    for _ in range(2):
        rowtune.trace(model, (x,))
    assert model.heads is model.layers[0].heads is model.layers[1].heads
    assert all(a is b for a, b in zip(model.heads, heads, strict=True))
    assert model.seen == {"calls": []} and model.latest is None
    plan_eval = rowtune.uniform_plan(rowtune.trace(model.eval(), (x,), training=False), "keep")
    assert torch.equal(rowtune.apply(model, plan_eval)(x), model(x))


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"policy": "bands"}, "policy is one of keep, checkpoint, rows, not 'bands'"),
    ({"policy": "rows", "band_rows": 0}, "rows needs band_rows or images of at least 1"),
    ({"policy": "rows", "band_rows": -3}, "band_rows is a whole number of at least 0, not -3"),
    ({"policy": "rows", "band_rows": 2.0}, "band_rows is a whole number"),
    ({"policy": "rows", "halo": "none"}, "halo is one of"),
    ({"policy": "rows", "tapes": "none"}, "tapes is one of"),
    ({"policy": "rows", "barriers": "none"}, "barriers is one of"),
    ({"policy": "rows", "images": -1}, "images is a whole number"),
    ({"policy": "keep", "axis": 1}, "axis is a spatial dimension"),
)


@pytest.mark.parametrize(("options", "says"), WRONG)
def test_plans_in_python_are_checked_as_files_are(options: dict[str, Any], says: str) -> None:
    model, x = nn.Conv2d(3, 4, 3), image(torch.float32)
    graph = rowtune.trace(model, (x,))
    with pytest.raises(PlanError, match=says):
        rowtune.uniform_plan(graph, **options)
    axis = {k: options[k] for k in options if k == "axis"}
    segment = rowtune.Segment("conv2d", "conv2d", **{k: options[k] for k in options if k != "axis"})
    for bad in (rowtune.Plan((segment,), **axis), {"segments": []}):
        with pytest.raises(PlanError, match="a plan is a rowtune.Plan" if isinstance(bad, dict) else says):
            rowtune.apply(model, bad)  # type: ignore[arg-type]


# -- buffers -------------------------------------------------------------------------------------------------


class Centred(Region):
    """A running mean by hand, read before it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.full((1, 4, 1, 1), 0.5))

    def inside(self, y: Tensor) -> Tensor:
        z = self.norm(y - self.center)
        with torch.no_grad():
            self.center.copy_(self.center * 0.9 + y.mean((0, 2, 3), keepdim=True) * 0.1)
        return z


class CentredAfter(Centred):
    def inside(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            self.center.mul_(0.9).add_(y.mean((0, 2, 3), keepdim=True) * 0.1)
        return y * self.center


class CentredAnew(Centred):
    def inside(self, y: Tensor) -> Tensor:
        z = y * self.center
        with torch.no_grad():
            self.center = self.center * 0.9 + y.mean((0, 2, 3), keepdim=True) * 0.1
        return z * self.center


class Counted(Centred):
    def inside(self, y: Tensor) -> Tensor:
        self.center += 1
        return y * self.center


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("region", [Centred, CentredAfter, CentredAnew, Counted])
def test_buffers_that_the_forward_reads_and_writes(region: type[Region], plan: str) -> None:
    """What read a buffer before it changed reads the same when it is computed again."""
    same(lambda: region().double(), plan)


@pytest.mark.parametrize("plan", PLANS)
def test_spectral_norm(plan: str) -> None:
    same(spectral, plan)


class Weighted(Region):
    """A weight made of another, that is read in bands and behind them."""

    def inside(self, y: Tensor) -> Tensor:
        twice = 2 * self.own.weight
        y = torch.tanh(F.conv2d(y, twice, padding=1))
        return F.conv2d(y, twice * twice, padding=1)


@pytest.mark.parametrize("halo", ["recompute", "cache", "sweep"])
@pytest.mark.parametrize("make", [spectral, lambda: Weighted().double()], ids=["spectral", "weighted"])
def test_rows_that_end_inside_a_weights_own_nodes(make: Callable[[], nn.Module], halo: Any) -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), make()).double(), image()
    plain, graph = copy.deepcopy(model), rowtune.trace(model, (x,))
    names = [node.name for node in graph.nodes]
    want = step(plain, lambda: plain(x), {"x": x})
    for last in range(3, min(len(names) - 1, 12)):
        for images in (0, 1):
            rows = Segment(names[0], names[last], "rows", 3, halo, images=images)
            ours = copy.deepcopy(model)
            module = rowtune.apply(ours, Plan((rows, Segment(names[last + 1], names[-1], "keep")), 2))
            assert error(step(ours, lambda: module(x), {"x": x}), want) < TOLERANCE  # noqa: B023


def test_rows_of_which_only_a_weight_is_read() -> None:
    class Made(Region):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            head, weight = self.own(y), 2 * self.last.weight
            return F.conv2d(y, weight * weight), head

    torch.manual_seed(3)
    model, x = Made().double(), image()
    plain, target = copy.deepcopy(model), torch.zeros(2, 2, 9, 4, dtype=torch.float64)
    rows = Segment("conv2d_1", "mul", "rows", 3)
    plan = Plan((Segment("conv2d", "conv2d", "keep"), rows, Segment("mul_1", "loss", "keep")), 2)
    module = rowtune.apply(model, plan, "mse")
    want = step(plain, lambda: F.mse_loss(plain(x)[0], target), {"x": x})
    assert error(step(model, lambda: module(x, targets=target), {"x": x}), want) < TOLERANCE


def test_a_part_of_a_buffer_is_not_written() -> None:
    class Bank(Centred):
        def inside(self, y: Tensor) -> Tensor:
            self.center[:, 0] = 1.0
            return y

    with pytest.raises(ModelError, match="writes into a part of the buffer b_center"):
        rowtune.trace(Bank().double(), (image(),))


def test_means_over_images_that_come_one_at_a_time() -> None:
    class Mean(Region):
        def __init__(self, axes: tuple[int, ...]) -> None:
            super().__init__()
            self.axes = axes

        def inside(self, y: Tensor) -> Tensor:
            return y * y.mean(self.axes, keepdim=True)

    for axes in ((0, 2, 3), (0, 1, 2, 3), (-1, 0, -2)):
        same(lambda: Mean(axes).double(), "images")  # noqa: B023
    with pytest.raises(PlanError, match="cannot be split over images"):
        same(lambda: Mean((0,)).double(), "images")
    only = Drawn(lambda y: y.mean(0, keepdim=True)).double()
    with pytest.raises(PlanError, match="mean adds up images, but not rows"):
        applied(only, "images", image())(image())


def test_a_graph_that_is_given_is_not_traced_again(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = torch.randn(1, 2, 16, 8)
    graph = rowtune.trace(model, (x,))
    plan = rowtune.uniform_plan(graph, "rows", 4)
    traced = []

    def counted(*args, **more):
        traced.append(args)
        return rowtune.trace(*args, **more)

    monkeypatch.setattr("rowtune.runtime.module.trace", counted)
    module = rowtune.apply(model, plan, graph=graph)
    assert torch.allclose(module(x), model(x)) and not traced
    for other in (torch.randn(1, 2, 20, 8), torch.randn(2, 2, 16, 8)):  # other sizes are traced
        module(other)
    assert len(traced) == 2
    module.eval()
    module(x)
    assert len(traced) == 3
