"""Rows segments run from lists: bit for bit what their schedules compute, whatever comes in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from exactness import RandomNet
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_exact_dag import layers, plain_or_skip
from test_exact_zoo import NETS
from torch import Tensor, nn

import rowtune
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import synthetic_target, with_loss
from rowtune.plan.plan import Plan, Segment
from rowtune.runtime.lists.code import compiled
from rowtune.runtime.lists.listing import Listing, check
from rowtune.runtime.lists.loops import rolled
from rowtune.runtime.lists.rewrites import dead, rewritten, shared
from rowtune.runtime.lists.run import MOST_KINDS, Run
from rowtune.runtime.lists.tracer import Tracer
from rowtune.tune.meter import LiveMeter

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # drawn so

WAYS: dict[str, dict[str, Any]] = {
    "recompute": {"halo": "recompute"},
    "cache": {"halo": "cache"},
    "sweep": {},
    "replay": {"tapes": "replay"},
    "computed again": {"barriers": "recompute"},
    "passes": {"barriers": "passes"},
}


def applied(model: nn.Module, plan: Plan, loss: Any = None, engine: Any = "listed") -> Any:
    """The module, writing its lists down at once."""
    module = rowtune.apply(model, plan, loss, engine=engine)
    module.lists.after = 0
    return module


def results(module: Any, call: Any, x: Tensor) -> list[Tensor | None]:
    """Of two steps: output, gradients and buffers after each."""
    found: list[Tensor | None] = []
    for _ in range(2):
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = call(module)
        out.sum().backward() if out.dim() else out.backward()
        found += [out.detach().clone(), None if x.grad is None else x.grad.clone()]
        found += [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        found += [b.clone() for b in module.buffers()]
    return found


def same_bits(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        (s is None and t is None) or (s is not None and t is not None and torch.equal(s, t))
        for s, t in zip(a, b, strict=True)
    )


def both(model: nn.Module, plan: Plan, call: Any, x: Tensor, loss: Any = None) -> Any:
    """Asserts that both engines give the same bits; the listed module."""
    state = copy.deepcopy(model.state_dict())
    found = {}
    for engine in ("traced", "listed"):
        model.load_state_dict(state)
        module = applied(model, plan, loss, engine=engine)  # type: ignore[arg-type]
        found[engine] = results(module, call, x)
    assert same_bits(found["traced"], found["listed"])
    return module


CASES = [
    *((name, way) for name in NETS for way in ("sweep", "replay")),
    *((name, way) for name in ("per_pixel", "unet_bn", "resnet50", "hrnet_w18") for way in WAYS),
]


@pytest.mark.parametrize(("name", "way"), dict.fromkeys(CASES))
def test_the_zoo_runs_from_lists_bit_for_bit(name: str, way: str) -> None:
    options, size = NETS[name]
    torch.manual_seed(0)
    model, x = build(name, options), torch.randn(1, 3, *size, requires_grad=True)
    traced = rowtune.trace(model, (x,))
    out = traced.values[traced.outputs[0]].shape
    loss = parse(default_name(out, tuple(x.shape)))
    graph, target = with_loss(traced, loss), synthetic_target(loss, out, torch.float32)
    try:
        plan = rowtune.uniform_plan(graph, "rows", 8, **WAYS[way])
        rowtune.lower(graph, plan)
    except rowtune.RowtuneError:
        pytest.skip("this network has no such plan")
    module = both(model, plan, lambda m: m(x, targets=target), x, loss)
    assert module.lists.kinds and not module.lists.why_not()


def build(name: str, options: dict[str, Any]) -> nn.Module:
    return rowtune.zoo.build(name, **options)


def test_checkpoints_of_rows_run_from_lists() -> None:
    model, x = build("unet_bn", NETS["unet_bn"][0]), torch.randn(2, 3, 20, 12, requires_grad=True)
    graph = rowtune.trace(model, (x,))
    first, last = graph.nodes[0].name, graph.nodes[-1].name
    inside = (Segment(first, last, "rows", 8),)
    module = both(model, Plan((Segment(first, last, "checkpoint", inside=inside),)), lambda m: m(x), x)
    lives = {
        place[0] for by_key in module.lists.kinds.values() for kind in by_key.values() for place in kind.steps
    }
    assert ("forward", "again") in lives and not module.lists.why_not()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    layers=layers, batch=st.integers(1, 2), height=st.integers(3, 17), band=st.integers(1, 17),
    halo=st.sampled_from(["recompute", "cache", "sweep"]),
    tapes=st.sampled_from(["split", "whole", "late", "replay"]), images=st.integers(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_random_networks_run_from_lists(layers, batch, height, band, halo, tapes, images, seed):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    net, x = RandomNet(layers, 4), torch.randn(batch, 4, height, 5, requires_grad=True)
    plain_or_skip(net, x)
    graph = rowtune.trace(net, (x,))
    plan = rowtune.uniform_plan(
        graph, "rows", band, halo, images=images if images < batch else 0, tapes=tapes
    )
    module = both(net, plan, lambda m: m(x), x)
    assume(any(s.policy == "rows" for s in plan.segments))
    assert not module.lists.why_not()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x).relu()
        return self.a(y), self.b(y)


def two_heads() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model, x = TwoHeads(), torch.randn(2, 3, 24, 6, requires_grad=True)
    plan = rowtune.uniform_plan(rowtune.trace(model, (x,)), "rows", 5)
    return model, x, {e: applied(model, plan, engine=e) for e in ("traced", "listed")}


SEEDS = {
    "both": lambda a, b: (a * a).sum() + b.sum(),
    "first": lambda a, b: (a * a).sum(),
    "second": lambda a, b: (b * b).sum(),
    "expanded": lambda a, b: a.sum(),
    "shared": lambda a, b: (a + b).square().sum(),
    "other order": lambda a, b: (a.permute(0, 2, 3, 1).contiguous() * 2).square().sum(),
}


def test_any_outer_gradients() -> None:
    """Outputs without a gradient leave parameters without one, in whatever order the kinds come."""
    model, x, modules = two_heads()
    for name in (*SEEDS, *reversed(SEEDS)):
        found = {}
        for engine, module in modules.items():
            model.zero_grad(set_to_none=True)
            x.grad = None
            SEEDS[name](*module(x)).backward()
            found[engine] = [x.grad, *(p.grad for p in model.parameters())]
        assert same_bits(found["traced"], found["listed"]), name
    assert not modules["listed"].lists.why_not()


def test_calls_alive_at_once_and_inputs_that_lie_elsewhere() -> None:
    model, _, modules = two_heads()
    data = torch.randn(3, 2, 3, 24, 6)  # a batch is a view of a larger tensor, at another place each time
    found = {}
    for engine, module in modules.items():
        model.zero_grad(set_to_none=True)
        outs = [module(batch) for batch in data]
        sum(SEEDS["both"](*out) for out in outs).backward()
        found[engine] = [p.grad for p in model.parameters()]
    assert same_bits(found["traced"], found["listed"])
    assert sum(map(len, modules["listed"].lists.kinds.values())) == 1


def test_weights_may_be_replaced() -> None:
    model, x, modules = two_heads()
    modules["listed"](x)
    with torch.no_grad():
        for p in model.parameters():
            p.data = torch.randn_like(p)
    assert torch.equal(modules["traced"](x)[0], modules["listed"](x)[0])


def test_one_tensor_as_two_inputs() -> None:
    """What shares memory when a list is written shares none later, and the other way round."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.conv(a) + self.conv(b).relu()

    model, x, y = Sum(), torch.randn(1, 2, 16, 5), torch.randn(1, 2, 16, 5)
    plan = rowtune.uniform_plan(rowtune.trace(model, (x, y)), "rows", 4)
    listed = applied(model, plan)
    for pair in ((x, x), (x, y), (y, y), (x, x)):
        torch.testing.assert_close(listed(*pair), model(*pair))
    assert sum(map(len, listed.lists.kinds.values())) == 2


def test_autocast_is_part_of_a_kind() -> None:
    model, x, modules = two_heads()
    found = {}
    for engine, module in modules.items():
        model.zero_grad(set_to_none=True)
        SEEDS["both"](*module(x)).backward()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        SEEDS["both"](*out).backward()
        found[engine] = [out[0], *(p.grad for p in model.parameters())]
    assert found["listed"][0].dtype == torch.bfloat16
    assert same_bits(found["traced"], found["listed"]) and not modules["listed"].lists.why_not()


def per_pixel() -> tuple[nn.Module, Tensor, Tensor, Plan]:
    model, x = build("per_pixel", NETS["per_pixel"][0]), torch.randn(1, 3, 40, 7)
    traced = rowtune.trace(model, (x,))
    loss = parse("cross_entropy")
    target = synthetic_target(loss, traced.values[traced.outputs[0]].shape, torch.float32)
    return model, x, target, rowtune.uniform_plan(with_loss(traced, loss), "rows", 4)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(5.0)])
def test_a_single_sweep_is_scaled_as_asked(scale: Any) -> None:
    model, x, target, plan = per_pixel()
    found = {}
    for engine in ("traced", "listed"):
        module = applied(model, plan, "cross_entropy", engine=engine)
        for factor in (1.0, scale, scale * 2):
            module.loss_scale = factor
            model.zero_grad(set_to_none=True)
            (module(x, targets=target) * factor).backward()
            found.setdefault(engine, []).extend(p.grad for p in model.parameters())
    assert same_bits(found["traced"], found["listed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_weights_may_change(dtype: torch.dtype) -> None:
    """Also where the loss reads a copy of them, in another type."""
    model, x, target, plan = per_pixel()
    model, x = model.to(dtype), x.to(dtype)
    weight = torch.ones(model(x).shape[1])
    module = applied(model, plan, nn.CrossEntropyLoss(weight=weight))
    for first in (1.0, 7.0, 3.0):
        weight[0] = first
        plain = nn.functional.cross_entropy(model(x), target, weight.to(dtype))
        torch.testing.assert_close(module(x, targets=target), plain)


class OwnAutocast(nn.Module):
    """Casts by itself, whatever the caller does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x).relu()
        with torch.autocast("cpu", enabled=False):
            return self.b(y.float())


@pytest.mark.parametrize("around", [False, True])
def test_a_models_own_autocast_is_written_down(around: bool) -> None:
    model, x = OwnAutocast(), torch.randn(1, 3, 24, 8, requires_grad=True)
    plan = rowtune.uniform_plan(rowtune.trace(model, (x,)), "rows", 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        module = both(model, plan, lambda m: m(x), x)
    assert module.lists.kinds and not module.lists.why_not()


def test_what_cannot_be_written_down_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, target, plan = per_pixel()
    monkeypatch.setattr("rowtune.runtime.lists.tracer.MOST_CALLS", 10)
    module = applied(model, plan, "cross_entropy")
    expected = applied(model, plan, "cross_entropy", engine="traced")(x, targets=target)
    assert torch.equal(module(x, targets=target), expected)
    assert module.lists.why_not() == {"more than 10 calls"}


def test_masks_are_drawn_anew_in_every_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.randn(2, 3, 20, 8, requires_grad=True)
    plan = rowtune.uniform_plan(rowtune.trace(model, (x,)), "rows", 4)
    found = {}
    for engine in ("traced", "listed"):
        torch.manual_seed(3)
        module = applied(model, plan, engine=engine)  # type: ignore[arg-type]
        found[engine] = results(module, lambda m: m(x), x)
    assert same_bits(found["traced"], found["listed"])
    assert module.lists.kinds and not module.lists.why_not()
    assert not torch.equal(module(x), module(x))


def test_not_more_kinds_than_these() -> None:
    model, x, target, plan = per_pixel()
    module = applied(model, plan, "cross_entropy")
    for i in range(MOST_KINDS + 3):
        module.loss_scale = 1.0 + i
        module(x, targets=target)
    assert {len(by_key) for by_key in module.lists.kinds.values()} == {MOST_KINDS}


def test_copies_and_pickles_hold_no_code() -> None:
    _, x, modules = two_heads()
    expected = modules["listed"](x)[0]
    for twin in (copy.deepcopy(modules["listed"]), pickle.loads(pickle.dumps(modules["listed"]))):
        assert not twin.lists.kinds and torch.equal(twin(x)[0], expected)


def test_a_kind_is_written_down_when_it_comes_again() -> None:
    model, x, target, plan = per_pixel()
    module = rowtune.apply(model, plan, "cross_entropy")
    for kinds_then in (0, 1, 1):
        module(x, targets=target)
        assert sum(map(len, module.lists.kinds.values())) == kinds_then
    with torch.no_grad():
        module(x, targets=target)
    assert sum(map(len, module.lists.kinds.values())) == 1


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11's
def test_fewer_calls_and_no_more_memory() -> None:
    model, x, target, plan = per_pixel()
    counts = {}
    for engine in ("traced", "listed"):
        module = applied(model, plan, "cross_entropy", engine=engine)  # type: ignore[arg-type]
        module(x, targets=target).backward()
        with LiveMeter() as meter, torch.profiler.profile() as seen:
            module(x, targets=target).backward()
        calls = sum(e.count for e in seen.key_averages() if e.key.startswith("aten::"))
        counts[engine] = calls, meter.peaks().activation_bytes
    assert counts["listed"][0] < 0.8 * counts["traced"][0]
    assert counts["listed"][1] <= counts["traced"][1]


# -- listings ---------------------------------------------------------------------------------------------


def listing(function: Any, *given: Tensor, constants: tuple[Tensor, ...] = ()) -> Listing:
    tracer = Tracer(
        torch.device("cpu"), torch.device("meta"), lambda func, args, kwargs: func(*args, **kwargs)
    )
    blank = [torch.empty_like(t, device="meta") for t in given]
    stand_ins = [tracer.stand_in(t) for t in constants]
    with torch.no_grad(), tracer.section({("in", str(i)): t for i, t in enumerate(blank)}) as section:
        made = function(*blank, *stand_ins)
    tracer.ask(section, {("out", "0"): made})
    return tracer.listed()[0].listing


def run(found: Listing) -> Any:
    return compiled(rolled(found))


def names(found: Listing) -> list[str]:
    return [call.name.removeprefix("aten::") for call in found.calls]


X = torch.arange(6.0).view(2, 3)


def test_dead_calls_go() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        (y + 1).exp()
        y.add_(1)
        z = x.clone()
        z.zero_()
        return y.relu()

    found = dead.rewrite(listing(function, X))
    assert names(found) == ["mul", "add_", "relu"]
    assert torch.equal(run(found)([X])[0], X * 2 + 1)


def test_the_same_call_is_made_once_unless_something_was_written() -> None:
    def function(x: Tensor) -> Tensor:
        a = x[0].exp() + x[0].exp()
        x[1].add_(1)
        return a + x[1].exp() + x[1].exp() + x[0].exp()

    found = shared.rewrite(listing(function, X))
    assert names(found).count("exp") == 3  # of x[0], of x[1], and of x[0] again: x was written to
    x = X.clone()
    assert torch.equal(run(rewritten(found))([x])[0], function(X.clone()))


def test_what_is_written_to_is_not_shared() -> None:
    def function(x: Tensor) -> Tensor:
        a, b = torch.zeros_like(x), torch.zeros_like(x)
        a.add_(1)
        return a + b

    found = rewritten(listing(function, X))
    assert torch.equal(run(found)([X])[0], torch.ones(2, 3))


def test_results_that_are_told_where_to_lie_are_shared() -> None:
    def function(x: Tensor) -> Tensor:
        a, b, c = torch.empty(3), torch.empty(3), torch.empty(3)
        torch.div(x[0], 2, out=a)
        torch.div(x[0], 2, out=b)
        torch.div(x[0], 2, out=c)
        c.add_(1)
        return a + b * 2 + c

    found = rewritten(listing(function, X))
    assert names(found).count("div") == 2 and names(found).count("empty") == 2
    assert torch.equal(run(found)([X])[0], function(X))


def test_constants_are_the_real_ones() -> None:
    table = torch.tensor([2.0, 3.0, 4.0])
    found = rewritten(listing(lambda x, t: x * t[1:].sum(), X, constants=(table,)))
    assert torch.equal(run(found)([X])[0], X * 7)
    with pytest.raises(Exception, match="writes to a constant"):
        listing(lambda x, t: x * t.add_(1), X, constants=(table,))


def test_what_a_listing_may_not_be() -> None:
    found = listing(lambda x: (x * 2).relu(), X)
    with pytest.raises(AssertionError, match="nothing made"):
        check(found.with_calls(iter(found.calls[1:])))
    with pytest.raises(AssertionError, match="made by no call"):
        check(found.with_calls(iter(found.calls[:1])))


def test_a_run_knows_when_it_leaves_what_was_written() -> None:
    """A second forward of a run that had none when its kind was written is traced."""
    _, x, modules = two_heads()
    out = modules["listed"](x)
    node = out[0].grad_fn
    assert isinstance(node.call.run, Run)
    again = node.call.run
    again.recall(node.call.detached(node.call.recalled()))
    assert torch.equal(next(iter(again.again().values())), out[0])
