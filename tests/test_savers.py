"""The contract of savers: exact ones give plain PyTorch's gradients, lossy ones keep within their bound, and
what each takes is predicted; alone and in random combinations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from exactness import TOLERANCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from savers import NETS, Case, case, plans
from torch import Tensor, nn
from training import plan_file, workload

import rowtune
from rowtune.cost.predict import predict
from rowtune.cost.profile import Profile
from rowtune.errors import PlanError, RowtuneError, UsageError
from rowtune.graph.cuts import legal_cut
from rowtune.graph.graph import Graph
from rowtune.plan.choices import Store
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.program import Banded
from rowtune.plan.repeat import shortened
from rowtune.runtime.in_backward import check_training
from rowtune.runtime.layout import channels_last, has_channels_last, strides
from rowtune.runtime.optimizer_state import state_on_device
from rowtune.runtime.stores.bf16 import BF16
from rowtune.runtime.stores.fp16 import FP16
from rowtune.runtime.stores.host import Host, HostPool
from rowtune.runtime.stores.keeping import Keeping
from rowtune.torch_private import storage_of
from rowtune.train.loop import train
from rowtune.train.options import Options
from rowtune.tune.measure import Bench
from rowtune.tune.reference import Place
from rowtune.tune.step import Plain, scaler_for, steps_of
from rowtune.tune.verify import Verifier

WAYS = {
    "keep": {"policy": "keep"},
    "checkpoint": {"policy": "checkpoint"},
    "recompute": {"policy": "rows", "band_rows": 5, "halo": "recompute"},
    "cache": {"policy": "rows", "band_rows": 5, "halo": "cache"},
    "sweep": {"policy": "rows", "band_rows": 5, "halo": "sweep"},
    "whole": {"policy": "rows", "band_rows": 5, "tapes": "whole"},
    "late": {"policy": "rows", "band_rows": 5, "tapes": "late"},
    "replay": {"policy": "rows", "band_rows": 5, "tapes": "replay"},
    "again": {"policy": "rows", "band_rows": 8, "barriers": "recompute"},
    "narrow": {"policy": "rows", "band_rows": 8, "barriers": "narrow"},
    "passes": {"policy": "rows", "band_rows": 8, "barriers": "passes"},
}


def uniform(graph: Graph, way: str) -> Plan:
    return rowtune.uniform_plan(graph, **WAYS[way])  # type: ignore[arg-type]


# -- layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["per_pixel", "unet_bn"])
def test_channels_last(name, way):
    made = case(name)
    plan = replace(uniform(made.training, way), layout="channels_last")
    assert made.error(plan) < TOLERANCE
    assert made.memory(plan).error < 0.01


@pytest.mark.parametrize("name", NETS)
def test_channels_last_everywhere(name):
    made = case(name)
    for way in ("keep", "sweep"):
        plan = replace(uniform(made.training, way), layout="channels_last")
        assert made.error(plan) < TOLERANCE
        assert made.memory(plan).error < 0.01


@pytest.mark.parametrize("way", ["cache", "narrow"])
def test_channels_last_from_lists(way):
    made = case("unet_bn")
    plan = replace(uniform(made.training, way), layout="channels_last")
    assert made.error(plan, engine="listed", steps=2) < TOLERANCE


def test_parameters_keep_their_own_layout():
    """Plans of both layouts may take turns on one model and one optimizer."""
    made = case("unet_bn")
    before = [p.stride() for p in made.net.parameters()]
    found = made.step(made.apply(replace(uniform(made.training, "sweep"), layout="channels_last")))
    assert [p.stride() for p in made.net.parameters()] == before
    assert all(found.gradients[n].stride() == p.stride() for n, p in made.net.named_parameters())


def test_which_layout_a_tensor_has():
    for shape in ((2, 3, 4, 5), (1, 3, 4, 5), (2, 3, 4, 5, 6), (2, 1, 4, 5), (1, 1, 4, 5, 6)):
        t = torch.randn(shape)
        last = channels_last(t)
        assert torch.equal(t, last) and has_channels_last(last) and not has_channels_last(t)
        assert last.stride() == strides(shape)
        assert (last.data_ptr() == t.data_ptr()) == (shape[1] == 1)
        assert channels_last(last) is last
        assert has_channels_last(last[:, :, 1:3])
    assert not has_channels_last(torch.randn(2, 3, 4)) and not has_channels_last(torch.randn(3, 4))


# -- precision ---------------------------------------------------------------------------------------------


FEW = ("keep", "cache", "sweep", "narrow")


@pytest.mark.parametrize(("name", "way"), [*(("per_pixel", w) for w in WAYS), *(("unet_bn", w) for w in FEW)])
def test_bf16(name, way):
    """Sums in another order are rounded otherwise."""
    made = case(name, torch.float32)
    plan = replace(uniform(made.training, way), dtype="bf16")
    assert made.error(plan) < 0.15
    assert made.memory(plan).error < 0.01


@pytest.mark.parametrize("way", ["keep", "checkpoint", "sweep"])
def test_fp16(way):
    made = case("edsr", torch.float32)
    plan = replace(uniform(made.training, way), dtype="fp16")
    assert made.error(plan) < 0.02
    assert made.memory(plan).error < 0.01


def test_bf16_from_lists():
    made = case("unet_bn", torch.float32)
    plan = replace(uniform(made.training, "narrow"), dtype="bf16")
    assert made.error(plan, engine="listed", steps=2) < 0.15


def test_bf16_takes_less():
    made = case("per_pixel", torch.float32)
    plan = uniform(made.training, "keep")
    cost = rowtune.predict(made.training, replace(plan, dtype="bf16"))
    assert cost.activation_bytes < 0.85 * rowtune.predict(made.training, plan).activation_bytes


def test_verified_at_the_same_precision():
    made = case("edsr", torch.float32)
    plan = replace(uniform(made.training, "sweep"), dtype="fp16")
    place = Place(((made.x,), made.target), "cpu")
    verifier = Verifier(made.net, made.loss, [place])
    check = verifier.check(lambda m: rowtune.apply(m, plan, made.loss), precision="fp16")
    assert check.ok and check.dtype == "float16", check
    plain = verifier.check(lambda m: Plain(m, made.loss), precision="fp16")
    assert plain.max_relative_error > 0  # float32 is another computation


def test_fp16_is_trained_with_a_scaled_loss():
    """A single sweep makes its gradients before the loss is there to be scaled: the same steps as plain's."""
    made = case("edsr", torch.float32)
    plan = replace(uniform(made.training, "sweep"), dtype="fp16")
    finals = []
    for runner, scaler in ((made.apply(plan), scaler_for(plan, "cpu")), (Plain(made.net, made.loss), None)):
        before = [p.detach().clone() for p in made.net.parameters()]
        optimizer = torch.optim.SGD(made.net.parameters(), lr=0.1)
        for _ in range(2):
            steps_of(runner, optimizer, scaler)((made.x,), made.target)
        finals.append([p.detach() - b for p, b in zip(made.net.parameters(), before, strict=True)])
        with torch.no_grad():
            for p, b in zip(made.net.parameters(), before, strict=True):
                p.copy_(b)
    for ours, plain in zip(*finals, strict=True):
        assert (ours - plain).abs().max() <= 0.02 * plain.abs().max()


# -- stores ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Tensors of these networks are small enough to stay where they are."""
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)
    monkeypatch.setattr("rowtune.plan.waiting.LEAST_BYTES", 256)


def stored(plan: Plan, store: Store, **whole: Any) -> Plan:
    return replace(plan, segments=tuple(replace(s, store=store) for s in plan.segments), **whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["edsr", "unet_bn"])
def test_host(name, way, small):
    """Exact; device memory, as predicted, is less, and what left is counted."""
    made = case(name)
    here = uniform(made.training, way)
    plan = stored(here, "host")
    assert made.error(plan) < TOLERANCE
    found = made.memory(plan)
    assert found.error < 0.01
    assert found.real_peak <= made.memory(here).real_peak
    module = made.apply(plan)
    made.step(module)
    assert module.host.bytes == 0  # given back
    assert module.host.peak_bytes == rowtune.predict(made.training, plan).host_bytes


def test_many_bands_that_are_like_others_are_counted_on_the_host(small):
    made = case("per_pixel", shape=(1, 3, 160, 4))
    plan = stored(rowtune.uniform_plan(made.training, "rows", 2, "cache"), "host")
    (segment,) = rowtune.lower(made.training, plan, shortened).segments
    assert isinstance(segment.how, Banded) and segment.how.repeat is not None
    module = made.apply(plan)
    made.step(module)
    assert module.host.peak_bytes == rowtune.predict(made.training, plan).host_bytes


def test_host_from_lists(small):
    made = case("unet_bn")
    for way in ("cache", "narrow"):
        assert made.error(stored(uniform(made.training, way), "host"), engine="listed", steps=3) < TOLERANCE


def test_a_keep_segment_offloads_most_of_what_it_holds(small):
    made = case("unet_bn")
    plan = uniform(made.training, "keep")
    here, there = (rowtune.predict(made.training, p) for p in (plan, stored(plan, "host")))
    assert there.activation_bytes < 0.4 * here.activation_bytes
    assert there.host_bytes < here.activation_bytes  # what is saved twice is stored once


BOUNDS = {"bf16": 0.4, "fp16": 0.02, "int8": 0.5, "int4": 4.0}
"""Of gradients: where a ReLU's sign is found again from a rounded input, it flips near zero."""


@pytest.mark.parametrize("way", ["keep", "checkpoint", "cache", "sweep", "narrow"])
@pytest.mark.parametrize("store", BOUNDS)
def test_rounded(store, way, small):
    made = case("unet_bn", torch.float32)
    plan = stored(uniform(made.training, way), store, max_grad_error=BOUNDS[store])
    assert made.error(plan) < plan.max_grad_error
    assert made.memory(plan).error < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponents", [(-1, 1), (-30, 30)])
def test_every_element_obeys_the_bound(dtype, exponents):
    x = torch.randn(4, 1000, dtype=dtype) * 2.0 ** torch.randint(*exponents, (4, 1000))
    x[:, :10] = 0
    for store, bound in ((BF16(), x.abs() / 2**8), (FP16(), x.abs() / 2**11 + x.abs().max() / 2**39)):
        handle = store.put(x)
        back = store.get(handle)
        assert back.dtype == dtype and ((back - x).abs() <= bound).all()
        assert (back[x == 0] == 0).all() and (back * x >= 0).all()
        assert store.bytes(handle) < 0.51 * x.numel() * x.itemsize
        assert not store.takes(torch.ones(9, dtype=torch.int64)) and not store.takes(torch.ones(9) > 0)
    zero = torch.zeros(3)
    assert torch.equal(FP16().get(FP16().put(zero)), zero)


def test_the_host_gives_back_what_it_took():
    pool = HostPool()
    store = Host(pool)
    for t in (torch.randn(3, 4, 5)[:, 1:3], torch.arange(7), torch.ones(2, 2, 2, 2).bool()):
        handle = store.put(t)
        want = t.clone()
        t.zero_()
        assert torch.equal(store.get(handle), want) and store.get(handle).dtype == t.dtype
        assert pool.bytes == t.numel() * t.itemsize and store.bytes(handle) == 0
        del handle
    assert pool.bytes == 0 and pool.peak_bytes == 120


def test_what_lives_anyway_stays():
    x = torch.randn(100, 100)
    keeping = Keeping(Host(HostPool()), {storage_of(x)})
    y = torch.randn(100, 100)
    assert keeping.pack(x[10:]) is not None and keeping.pack(x) is x
    assert isinstance(keeping.pack(x.t()), torch.Tensor)
    assert isinstance(keeping.pack(torch.randn(4, 4)), torch.Tensor)  # small
    assert isinstance(keeping.pack(torch.randn(4, 1).expand(4, 9999)), torch.Tensor)  # takes no memory
    kept = keeping.pack(y)
    assert kept is keeping.pack(y) and kept is not keeping.pack(y.t())
    y.add_(1)
    assert keeping.pack(y) is not kept  # another tensor by now
    first, second = keeping.unpack(kept), keeping.unpack(kept)
    assert first is second and torch.equal(first + 1, y)
    assert kept.here is None and keeping.unpack(kept) is not first  # a graph may run backward again


def test_an_error_that_is_allowed_is_none_and_a_larger_one_is_wrong(small):
    work = workload("zoo:per_pixel", "1x3x16x12")
    bench = Bench(work.problem, work=work)
    plan = stored(rowtune.uniform_plan(work.graph, "keep"), "bf16", max_grad_error=0.1)
    found = bench.measure(plan)
    assert found.status == "ok" and found.max_relative_error is not None
    assert 1e-3 < found.max_relative_error < plan.max_grad_error
    assert bench.measure(replace(plan, max_grad_error=1e-4)).status == "wrong"
    assert replace(plan, segments=(replace(plan.segments[0], store="host"),)).allowed_error == 0


@pytest.mark.parametrize("way", ["keep", "recompute", "cache"])
def test_copies_to_the_host_and_back_take_time(way, small):
    """Each byte that is away is copied twice at least, at the rate of what nobody timed."""
    made = case("unet_bn", torch.float32)
    plan = uniform(made.training, way)
    here, away = (predict(made.training, p, 1, Profile()) for p in (plan, stored(plan, "host")))
    assert away.host_bytes > 0
    assert away.seconds - here.seconds > 1.9 * 2 * away.host_bytes / Profile().bytes_per_second


# -- the optimizer's step in backward ----------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
}


def trained(made: Case, module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters after some steps with a schedule, which are undone."""
    before = [p.detach().clone() for p in made.net.parameters()]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        steps_of(module, optimizer)((made.x,), made.target)
        schedule.step()
    after = [p.detach().clone() for p in made.net.parameters()]
    with torch.no_grad():
        for p, b in zip(made.net.parameters(), before, strict=True):
            p.copy_(b)
    made.net.zero_grad()
    return after


@pytest.mark.parametrize("way", ["keep", "checkpoint", "cache", "sweep", "narrow"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_with_the_step_in_backward(way, kind):
    """The same parameters as the same plan gives with the step after backward; state and schedules go on."""
    made = case("edsr")
    plan = uniform(made.training, way)
    found = []
    for inside in (False, True):
        module = made.apply(replace(plan, step_in_backward=inside))
        optimizer = OPTIMIZERS[kind](made.net.parameters())
        found.append(trained(made, module, optimizer))
        assert all(len(optimizer.state[p]) for p in made.net.parameters())
        assert not inside or all(p.grad is None for p in made.net.parameters())
    for after, within in zip(*found, strict=True):
        assert torch.equal(after, within)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_not_all_there_at_once(name):
    made = case(name)
    for way in ("keep", "sweep"):
        plan = uniform(made.training, way)
        within = replace(plan, step_in_backward=True)
        assert made.memory(within).error < 0.01
        costs = [rowtune.predict(made.training, p, 1) for p in (plan, within)]
        assert costs[1].peak_bytes <= costs[0].peak_bytes


def test_lists_make_gradients_that_are_let_go_of_at_once():
    """They are no results that nobody reads: all of backward was, in a rows segment that is no sweep."""
    made = case("per_pixel", shape=(1, 3, 256, 256))
    nodes = [n.name for n in made.training.nodes]
    rows = Segment(nodes[0], nodes[-2], "rows", 64, tapes="replay")
    plan = Plan((rows, Segment(nodes[-1], nodes[-1])), step_in_backward=True)
    assert made.memory(plan, "listed").error < 0.01


# -- gradients that wait on the host -----------------------------------------------------------------------

SKIPS = ["unet_bn", "unet3d", "resnet50", "edsr"]


def one_by_one(graph: Graph, policy: str) -> Plan:
    """A segment for each stretch between legal cuts, so that skips cross many."""
    plan = uniform(graph, "keep")
    places = [0, *(p for p in range(1, len(graph.nodes)) if legal_cut(graph, p)), len(graph.nodes)]
    names = [(graph.nodes[a].name, graph.nodes[b - 1].name) for a, b in pairwise(places)]
    return replace(plan, segments=tuple(Segment(a, b, policy) for a, b in names))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SKIPS)
@pytest.mark.parametrize("policy", ["keep", "checkpoint"])
def test_gradients_of_skips_wait_on_the_host(name, policy, small):
    made = case(name)
    plan = one_by_one(made.training, policy)
    waits = replace(plan, waiting_gradients="host")
    assert made.error(waits) < TOLERANCE
    memory = made.memory(waits)
    assert memory.error < 0.01
    before, after = (rowtune.predict(made.training, p, 1) for p in (plan, waits))
    assert after.peak_bytes <= before.peak_bytes and after.host_bytes > 0
    module = made.apply(waits)
    made.step(module)
    assert 0 < module.host.peak_bytes <= after.host_bytes and module.host.bytes == 0


def test_second_derivatives_would_miss_what_waits(small):
    made = case("edsr")
    module = made.apply(replace(one_by_one(made.training, "keep"), waiting_gradients="host"))
    with pytest.raises(RowtuneError, match="second derivatives are not supported by a plan with waiting_"):
        torch.autograd.grad(module(made.x, targets=made.target), [*made.net.parameters()], create_graph=True)


# -- the optimizer's state on the host ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("inside", [False, True])
def test_training_with_the_state_on_the_host(kind, inside):
    """Bit for bit what the same plan gives with the state on the device, in backward and after it; from one
    home to the other and back, and by way of a state dict."""
    made = case("unet_bn")
    plan = replace(uniform(made.training, "sweep"), step_in_backward=inside)
    away = replace(plan, optimizer_state="host")
    found, states = [], []
    for three in ((plan, plan, plan), (away, away, away), (plan, away, plan), (away, plan, away)):
        optimizer = OPTIMIZERS[kind](made.net.parameters())
        modules = [made.apply(p) for p in three]
        before = {k: v.clone() for k, v in made.net.state_dict().items()}
        for module in modules:
            steps_of(module, optimizer)((made.x,), made.target)
            again = OPTIMIZERS[kind](made.net.parameters())
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        steps_of(modules[-1], optimizer)((made.x,), made.target)
        here = sum(t.nbytes for t in state_on_device(optimizer))
        assert here < 1000 if three[-1] is away else here > 10000
        found.append([p.detach().clone() for p in made.net.parameters()])
        states.append([t.clone() for s in optimizer.state.values() for t in s.values() if t is not None])
        made.net.load_state_dict(before)
    made.net.zero_grad()
    for other, state in zip(found[1:], states[1:], strict=True):
        assert all(map(torch.equal, found[0], other)) and all(map(torch.equal, states[0], state))


@pytest.mark.parametrize("name", NETS)
def test_what_the_state_on_the_host_takes(name):
    """As much as is predicted; on the device one parameter's at a time."""
    made = case(name)
    for way in ("keep", "sweep"):
        for inside in (False, True):
            plan = replace(uniform(made.training, way), step_in_backward=inside)
            away = replace(plan, optimizer_state="host")
            assert made.memory(away).error < 0.01
            costs = [rowtune.predict(made.training, p, 1) for p in (plan, away)]
            state = sum(v.bytes for v in made.training.parameters())
            assert costs[1].host_bytes == costs[0].host_bytes + state
            assert costs[1].peak_bytes < costs[0].peak_bytes
            real = torch.optim.SGD(made.net.parameters(), momentum=0.9)
            assert rowtune.predict(made.training, away, real).peak_bytes == costs[1].peak_bytes


def test_what_the_step_in_backward_is_not_for():
    made = case("edsr")
    plan = replace(uniform(made.training, "keep"), step_in_backward=True)
    module, optimizer = made.apply(plan), torch.optim.SGD(made.net.parameters(), lr=0.0)
    made.net.zero_grad()  # other tests use the same network
    with rowtune.step_in_backward(optimizer):
        module(made.x, targets=made.target).backward()
        with pytest.raises(UsageError, match="got a second one; to accumulate gradients"):
            module(made.x, targets=made.target).backward()
    made.net.zero_grad()
    module(made.x, targets=made.target).backward()
    with pytest.raises(UsageError, match=r"an earlier backward are there: call zero_grad\(\) first"):
        with rowtune.step_in_backward(optimizer):
            raise AssertionError
    made.net.zero_grad()
    assert not any(p._post_accumulate_grad_hooks for p in made.net.parameters())  # type: ignore[attr-defined]
    check_training(plan)
    with pytest.raises(UsageError, match="which clipping of gradients cannot wait for"):
        check_training(plan, clipped=True)
    with pytest.raises(UsageError, match="which accumulation of gradients cannot wait for"):
        check_training(plan, accumulated=True)


WHOLE = [{"layout": "channels_last"}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"step_in_backward": True},
         {"optimizer_state": "host"}, {"optimizer_state": "host", "step_in_backward": True}]  # fmt: skip


@pytest.mark.parametrize("whole", WHOLE)
def test_the_training_loop_does_as_the_plan_says(whole):
    losses = []
    for change in ({}, whole):
        work = workload("zoo:per_pixel", "1x3x12x8")
        file = plan_file(work)
        file = replace(file, plan=replace(file.plan, **change))
        found = train(file, work, Options(steps=3))
        assert found.status == "ok" and found.loss is not None
        losses.append(found.loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if "dtype" in whole else 1e-5)


def test_the_training_loop_refuses_to_clip_what_it_has_used():
    work = workload("zoo:per_pixel", "1x3x12x8")
    file = plan_file(work)
    file = replace(file, plan=replace(file.plan, step_in_backward=True))
    for options in (Options(steps=1, clip=1.0), Options(steps=1, accumulate=2)):
        with pytest.raises(UsageError, match="a plan with step_in_backward uses each gradient as it comes"):
            train(file, work, options)


# -- in combination ----------------------------------------------------------------------------------------


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["edsr", "per_pixel", "unet_bn"]), data=st.data())
def test_combinations(name, data, small):
    made = case(name)
    plan = data.draw(plans(made.training, ("device", "host")))
    layout = data.draw(st.sampled_from(["contiguous", "channels_last"]))
    dtype = data.draw(st.sampled_from(["as given", "bf16"]))
    whole: dict[str, Any] = {"layout": layout, "dtype": dtype, "step_in_backward": data.draw(st.booleans())}
    homes = st.sampled_from(["device", "host"])
    plan = replace(plan, **whole, optimizer_state=data.draw(homes), waiting_gradients=data.draw(homes))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert made.error(plan) < TOLERANCE
    assert made.memory(plan).error < 0.01


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["edsr", "per_pixel"]), store=st.sampled_from(sorted(BOUNDS)), data=st.data())
def test_combinations_that_round(name, store, data, small):
    made = case(name, torch.float32)
    plan = replace(data.draw(plans(made.training, ("device", "host", store))), max_grad_error=BOUNDS[store])
    layout = data.draw(st.sampled_from(["contiguous", "channels_last"]))
    plan = replace(plan, layout=layout, step_in_backward=data.draw(st.booleans()))
    assert made.error(plan) < plan.max_grad_error
    assert made.memory(plan).error < 0.01


# -- what a plan may say -----------------------------------------------------------------------------------


REFUSED = [
    ({"layout": "nhwc"}, "layout is one of contiguous, channels_last"),
    ({"dtype": "fp8"}, "dtype is one of as given, bf16, fp16"),
    ({"max_grad_error": -1.0}, "max_grad_error is a number of at least 0, not -1.0"),
    ({"step_in_backward": 1}, "step_in_backward is true or false, not 1"),
    ({"step_in_backward": True, "dtype": "fp16"}, "does not go with dtype fp16: loss scaling looks at all"),
    ({"max_grad_error": True}, "max_grad_error is a number"),
    ({"waiting_gradients": True}, "waiting_gradients is one of device, host, not True"),
    ({"optimizer_state": "disk"}, "optimizer_state is one of device, host"),
    ({"optimizer_state": "host", "dtype": "fp16"}, "optimizer_state host does not go with dtype fp16"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_refused(change, says):
    made = case("per_pixel")
    with pytest.raises(PlanError, match=says):
        made.apply(replace(uniform(made.training, "keep"), **change))


def test_stores_refused():
    made = case("per_pixel")
    plan = uniform(made.training, "checkpoint")
    with pytest.raises(PlanError, match="store is one of device, host, bf16, fp16, int8, int4, not 'disk'"):
        made.apply(stored(plan, "disk"))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="store bf16 rounds what it keeps, and the plan allows no error"):
        made.apply(stored(plan, "bf16"))
    whole = plan.segments[0]
    inside = Segment(whole.first, whole.last, store="host")
    nested = replace(whole, inside=(inside,))
    with pytest.raises(PlanError, match=r"lies inside a checkpoint and keeps nothing .*; give store host to"):
        made.apply(Plan((nested,)))
