"""Train-mode norms, pools and extremes inside rows segments: exact however the barrier is carried."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import TOLERANCE, Step, error, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_exact_zoo import NETS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rowtune
from rowtune.errors import PlanError
from rowtune.graph.cuts import barrier_parts, opaque_nodes
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import synthetic_target
from rowtune.kernels.constants import Tables
from rowtune.kernels.moments import measure, moments, normalise, statistics_of
from rowtune.plan.narrow import divided
from rowtune.plan.plan import Plan, Segment
from rowtune.zoo import build

WAYS = ("store", "recompute", "narrow", "passes")


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.outer(F.silu(self.inner(y))))


class Response(nn.Module):
    """Global response norm, as ConvNeXt v2 has it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(c, 1, 1)), nn.Parameter(torch.randn(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + self.shift + self.scale * x * (size / (size.mean(1, keepdim=True) + 1e-6))


class Means(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Cells(nn.Module):
    """Pools to a small grid, and what is made of them."""

    def __init__(self, c: int, pool: type[nn.Module]) -> None:
        super().__init__()
        self.pool, self.mix = pool((3, 1)), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(self.pool(x))).mean(2, keepdim=True)


def frozen(c: int) -> nn.Module:
    return nn.BatchNorm2d(c).requires_grad_(False)


LAYERS: dict[str, Any] = {
    "batch norm": nn.BatchNorm2d,
    "bare batch norm": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
    "cumulative batch norm": lambda c: nn.BatchNorm2d(c, momentum=None),
    "frozen weights": frozen,
    "group norm": lambda c: nn.GroupNorm(2, c),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "running instance norm": lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    "gate": Gate,
    "response": Response,
    "average cells": lambda c: Cells(c, nn.AdaptiveAvgPool2d),
    "largest cells": lambda c: Cells(c, nn.AdaptiveMaxPool2d),
    "amax": lambda c: Means(lambda x: x * x.amax((2, 3), keepdim=True)),
    "amin of ties": lambda c: Means(lambda x: x - F.relu(x).amin((2, 3), keepdim=True)),
    "sum": lambda c: Means(lambda x: x * 0.1 + 0.01 * x.sum((2, 3), keepdim=True)),
    "mean of all": lambda c: Means(lambda x: x - x.mean((1, 2, 3), keepdim=True)),
    "var": lambda c: Means(lambda x: x / (1 + x.var((2, 3), keepdim=True))),
    "std": lambda c: Means(lambda x: x * x.std((1, 2, 3), keepdim=True, correction=0)),
}


class Net(nn.Module):
    """Convolutions with the named layers between them, and a shortcut that is normalised as well."""

    def __init__(self, names: list[str], stride: int, channels: int = 4) -> None:
        super().__init__()
        conv = lambda k, s: nn.Conv2d(channels, channels, k, s, k // 2)  # noqa: E731
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.ModuleList(LAYERS[n](channels) for n in names)
        self.convs = nn.ModuleList(conv(3, stride if i == 0 else 1) for i in range(len(names)))
        self.short, self.norm = conv(1, stride), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.first(x)
        for conv, layer in zip(self.convs, self.layers, strict=True):
            y = F.silu(layer(conv(y)))
        return y + self.norm(self.short(x))


def plain_and_graph(net: nn.Module, x: Tensor) -> tuple[Step, Any]:
    twin = copy.deepcopy(net)
    return step(twin, lambda: twin(x), {"x": x}), rowtune.trace(net, (x,))


def run(net: nn.Module, x: Tensor, plan: Any) -> Step:
    twin = copy.deepcopy(net)
    module = rowtune.apply(twin, plan)
    return step(twin, lambda: module(x), {"x": x})


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3), stride=st.integers(1, 2),
    batch=st.integers(1, 3), height=st.integers(6, 13), width=st.integers(6, 9), seed=st.integers(0, 99),
    data=st.data(),
)  # fmt: skip
def test_random_networks(names, stride, batch, height, width, seed, data):
    torch.manual_seed(seed)
    net = Net(names, stride).double()
    x = torch.randn(batch, 3, height, width, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    assert not opaque_nodes(graph)
    assert len(barrier_parts(graph, 0, len(graph.nodes), 2)) > 1
    for way in WAYS:
        halo = data.draw(st.sampled_from(["sweep", "recompute"] + ["cache"] * (way == "store")))
        tapes = data.draw(st.sampled_from(["split", "whole", "late", "replay"]))
        images = data.draw(st.integers(0, 1)) if "running instance norm" not in names else 0
        band = data.draw(st.integers(1, height))
        axis = data.draw(st.sampled_from([2, 2, 3]))
        layout = data.draw(st.sampled_from(["contiguous", "contiguous", "channels_last"]))
        plan = rowtune.uniform_plan(
            graph, "rows", band, halo, images=images, tapes=tapes, barriers=way, axis=axis
        )
        plan = replace(plan, layout=layout)
        found = error(run(net, x, plan), plain)
        assert found < TOLERANCE or found < 20 * rounding(net, x, plain), plan


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("names", [["std", "instance norm"], ["group norm", "average cells"]])
def test_layouts_and_images(names, images, layout):
    """An image of a batch in channels_last, viewed as one image of all channels, once had wrong gradients."""
    torch.manual_seed(0)
    net = Net(names, 1).double()
    x = torch.randn(3, 3, 10, 6, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    for way in WAYS:
        plan = rowtune.uniform_plan(graph, "rows", 4, "sweep", images=images, barriers=way)
        found = error(run(net, x, replace(plan, layout=layout)), plain)
        assert found < TOLERANCE or found < 20 * rounding(net, x, plain), plan


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows": lambda x: F.pad(x, (0, 0, 2, 1)).contiguous(memory_format=torch.channels_last)[:, :, 2:-1],
    "images": lambda x: torch.cat((x, x)).contiguous(memory_format=torch.channels_last)[: len(x)],
    "an image, permuted": lambda x: x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None],
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@settings(max_examples=100)
@given(
    ours=st.sampled_from(sorted(LAYOUTS)), theirs=st.sampled_from(sorted(LAYOUTS)), batch=st.integers(1, 3),
    groups=st.sampled_from([0, 1, 2, 4]), centred=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_norms_do_not_depend_on_where_tensors_lie(ours, theirs, batch, groups, centred, seed):
    """Neither the layout of what is normalised nor that of the gradient that arrives."""
    torch.manual_seed(seed)
    batch = 1 if "an image, permuted" in (ours, theirs) else batch
    x, y = torch.randn(2, batch, 4, 5, 3, dtype=torch.float64)
    weight, bias = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(2))
    found = []
    for lay_x, lay_y in (("contiguous", "contiguous"), (ours, theirs)):
        here = LAYOUTS[lay_x](x).detach().requires_grad_()
        made = normalise(here, moments(here, groups, centred), weight, bias, groups, 1e-5)
        found.append((made, *torch.autograd.grad(made, (here, weight, bias), LAYOUTS[lay_y](y))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


def rounding(net: nn.Module, x: Tensor, plain: Step) -> float:
    """How far plain PyTorch moves when its input does by a few units in the last place: a bias before a batch
    norm has a true gradient of zero, and behind a deviation of few pixels what is left of it is large. One
    move may happen to do little: the largest of a few counts."""
    moved = (x.detach() * (1 + 1e-15 * torch.randn_like(x)) for _ in range(6))
    return max(error(plain_and_graph(net, x.requires_grad_())[0], plain) for x in moved)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_keep_and_checkpoint_run_as_pytorch_does(name):
    torch.manual_seed(0)
    net = Net([name], 1).double()
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    for policy in ("keep", "checkpoint"):
        assert error(run(net, x, rowtune.uniform_plan(graph, policy)), plain) < TOLERANCE


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_one_and_three_dimensions(rank, way):
    torch.manual_seed(0)
    conv, norm, own = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d, nn.InstanceNorm3d),
    }[rank]  # fmt: skip
    net = nn.Sequential(
        conv(2, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, 4, 3, 2, 1), own(4, affine=True), nn.ReLU(),
        nn.RMSNorm([4, *[5] * rank]), conv(4, 2, 3, padding=1), nn.LayerNorm([2, *[5] * rank]),
    ).double()  # fmt: skip
    x = torch.randn(2, 2, *[10] * rank, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    for band in (1, 3, 4):
        plan = rowtune.uniform_plan(graph, "rows", band, "sweep", barriers=way)
        assert error(run(net, x, plan), plain) < TOLERANCE


def test_batches_are_split_across_batch_norm():
    """Micro-batches alone, which gradient accumulation cannot do: statistics are those of the whole batch."""
    torch.manual_seed(0)
    net = Net(["batch norm", "gate"], 2).double()
    x = torch.randn(5, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    for way in WAYS:
        for images in (1, 2):
            plan = rowtune.uniform_plan(graph, "rows", 0, "sweep", images=images, barriers=way)
            assert error(run(net, x, plan), plain) < TOLERANCE


class Standardised(nn.Module):
    """Weights that are computed from parameters: for a gate, for a classifier, and for both at once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        weight = self.gate.weight - self.gate.weight.mean()
        y = F.conv2d(y, weight) * torch.sigmoid(F.conv2d(F.adaptive_avg_pool2d(y, 1), weight, self.gate.bias))
        return F.linear(y.mean((2, 3)), F.normalize(self.head.weight, dim=1), self.head.bias)


@pytest.mark.parametrize("way", WAYS)
def test_weights_computed_from_parameters(way):
    torch.manual_seed(0)
    net = Standardised().double()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    for band, images in ((2, 0), (5, 1)):
        plan = rowtune.uniform_plan(graph, "rows", band, barriers=way, images=images)
        assert error(run(net, x, plan), plain) < TOLERANCE


def test_backward_finishes_statistics_where_they_are_read():
    """And computes no convolution again whose values nobody reads, in any schedule."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3, 2, 1),
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    for halo, tapes in (("recompute", "split"), ("cache", "split"), ("sweep", "split"), ("sweep", "late")):
        plan = rowtune.uniform_plan(graph, "rows", 2, halo, tapes=tapes)
        first, second, third = rowtune.lower(graph, plan).segments
        assert [len(s.how.spared) for s in (first, second, third)] == [1, 1, 0]
        assert [len(s.finishes) for s in (first, second, third)] == [0, 1, 1]
        assert [len(s.how.unread) for s in (first, second, third)] == [1, 1, 1]
        assert error(run(net, x, plan), plain) < TOLERANCE
        in_one_band = rowtune.uniform_plan(graph, "rows", 18, halo, tapes=tapes)
        twin = copy.deepcopy(net)
        assert operations(rowtune.apply(twin, in_one_band), x) == operations(twin, x)


def operations(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds of one step's convolutions, forward and backward."""
    module(x)  # traced
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["amax", "gate"])
def test_passes_that_end_in_a_reduction(kind):
    """A gate finished by the last pass, and read beyond the segment."""
    net = Net(["group norm", kind], 1).double()
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    at = max(i for i, n in enumerate(graph.nodes) if n.op == "mul")
    last = graph.nodes[at - 1].name
    for way in WAYS[1:]:
        first = Segment(graph.nodes[0].name, last, "rows", 2, barriers=way)
        rest = Segment(graph.nodes[at].name, graph.nodes[-1].name)
        assert error(run(net, x, Plan((first, rest))), plain) < TOLERANCE


def test_narrow_barriers_divide_a_bottleneck():
    """Parts end where tensors are narrow; the wide ones behind a block's last convolution are passed."""
    model = rowtune.zoo.resnet50(width=8, depths=(2, 1, 1, 1), classes=3)
    with torch.device("meta"):
        graph = rowtune.trace(model, (torch.empty(1, 3, 64, 64),))
    block = [i for i, n in enumerate(graph.nodes) if n.module.startswith("layer1.1")]
    parts = divided(graph, block[0], block[-1] + 1, 2)
    assert [p.passes for p in parts] == [False, False, True]
    kept = [graph.nodes[p.stop - 1].name for p in parts]
    channels = [graph.values[n.name].shape[1] for p in parts[:2] for n in graph.nodes[p.start : p.stop]
                if n.op == "conv2d"]  # fmt: skip
    assert channels == [8, 8] and kept[-1] == graph.nodes[block[-1]].name


class Summed(nn.Module):
    """A gate from three pools at once, the first of which gates on its own as well: one gradient for all."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y0 = self.convs[0](x)
        r = y0.mean((2, 3), keepdim=True)
        y1 = self.convs[1](y0 * torch.sigmoid(r))
        p = y1.mean((2, 3), keepdim=True)
        y2 = self.convs[2](y1 * torch.sigmoid(p))
        q = y2.mean((2, 3), keepdim=True)
        return y2 * torch.sigmoid(q + p + r) * p * r


@pytest.mark.parametrize("way", WAYS)
def test_one_gradient_for_several_pools(way):
    net = Summed().double()
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    plain, graph = plain_and_graph(net, x)
    plan = rowtune.uniform_plan(graph, "rows", 3, barriers=way)
    assert error(run(net, x, plan), plain) < TOLERANCE


def test_two_forwards_before_one_backward():
    torch.manual_seed(0)
    net = Net(["batch norm"], 1).double()
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(net)
    want = step(plain, lambda: plain(x) + plain(x * 2), {"x": x})
    graph = rowtune.trace(net, (x,))
    for way in WAYS:
        twin = copy.deepcopy(net)
        module = rowtune.apply(twin, rowtune.uniform_plan(graph, "rows", 3, barriers=way))
        got = step(twin, lambda run=module: run(x) + run(x * 2), {"x": x})
        assert error(got, want) < TOLERANCE


def test_cache_keeps_no_rows_for_barriers_that_are_not_stored():
    graph = rowtune.trace(Net(["batch norm"], 1), (torch.zeros(1, 3, 8, 8),))
    with pytest.raises(PlanError, match="cache"):
        rowtune.lower(graph, rowtune.uniform_plan(graph, "rows", 2, "cache", barriers="passes"))


# -- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [0, 2, 4])
def test_large_means_lose_nothing(groups):
    """Mean 1e4 and deviation 1 in float32: variance and input gradient against float64, beside PyTorch's."""
    torch.manual_seed(0)
    x = (1e4 + torch.randn(2, 4, 4096, 3)).requires_grad_()
    grad = torch.randn(x.shape)

    def native(t: Tensor) -> Tensor:
        return F.batch_norm(t, None, None, training=True) if not groups else F.group_norm(t, groups)

    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(native(exact), exact, grad.double())
    (plain,) = torch.autograd.grad(native(x), x, grad)
    bands = x.detach().split(64, 2)
    count = x.numel() // moments(x, groups)[0].numel()
    total = statistics_of(torch.stack([measure(t, groups) for t in bands]), (count // 64,) * 64, Tables())
    spread = exact.detach().view(2, groups, -1) if groups else exact.detach().transpose(0, 1).reshape(4, -1)
    var = spread.var(-1, correction=0)
    assert ((total[2] / total[0] - var).abs() / var).max() < 1e-6
    assert ((total[1] - spread.mean(-1)).abs()).max() < 1e-6  # float32 itself is 5e-4 apart there
    (ours,) = torch.autograd.grad(normalise(x, moments(x, groups), None, None, groups, 1e-5), x, grad)
    assert (ours - want).abs().max() <= 1.5 * (plain - want).abs().max()


@pytest.mark.parametrize("centred", [True, False])
def test_shares_in_any_order_are_statistics_of_the_whole(centred):
    bands = [torch.randn(1, 3, n, 5, dtype=torch.float64) + n for n in (1, 4, 2)]
    shares = [measure(band, centred=centred) for band in bands]
    one = statistics_of(torch.stack(shares), (5, 20, 10), Tables())
    other = statistics_of(torch.stack(shares[::-1]), (10, 20, 5), Tables())
    whole = moments(torch.cat(bands, 2), centred=centred)
    assert torch.allclose(one, other, rtol=1e-12) and torch.allclose(one, whole, rtol=1e-12)


TRAINED = (
    "resnet50", "unet_bn", "efficientnet_v2_s", "mobilenet_v3_large", "deeplabv3plus", "hrnet_w18",
    "densenet121", "convnext_tiny", "unet3d",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_follow_plain_training(name):
    """float32: no further from plain PyTorch than plain PyTorch with its batch in other orders, times 3.
    Rounding grows from step to step, by luck more or less (one activation that changes its sign): hence
    several orders, for plain and for the rows."""
    options, size = NETS[name]
    net = build(name, **options)
    x = torch.randn(4, 3, *size)
    output = net(x).shape
    loss = parse(default_name(output, tuple(x.shape)))
    target = synthetic_target(loss, output, torch.float32, 2)
    orders = [torch.tensor(o) for o in ((2, 0, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 2, 3, 0))]

    def losses(wrap: Any, x: Tensor, target: Tensor) -> Tensor:
        model = copy.deepcopy(net)
        module = wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            now = loss(module(x), target)
            now.backward()
            optimizer.step()
            found.append(now.item())
        return torch.tensor(found)

    plain = losses(lambda m: m, x, target)
    others = [losses(lambda m: m, x[order], target[order]) for order in orders]
    allowed = 3 * max((plain - other).abs().max() for other in others) + 1e-6
    graph = rowtune.trace(net, (x,))
    assert plain[-1] < plain[0]
    for way in WAYS if name == "resnet50" else ("store",):
        found = []
        for band in (4, 8, 12) if way == "store" else (8,):
            plan = rowtune.uniform_plan(graph, "rows", band, barriers=way)
            assert any(s.policy == "rows" for s in plan.segments)
            ours = losses(lambda m, plan=plan: rowtune.apply(m, plan), x, target)
            found.append((ours - plain).abs().max())
        assert sorted(found)[len(found) // 2] <= allowed, way


# -- several processes -------------------------------------------------------------------------------------


def synced() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1),
        nn.BatchNorm2d(4, momentum=None),
    )  # fmt: skip
    return net.double()


def replica(rank: int, folder: str) -> None:
    """One of two processes with half the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = torch.randn(4, 3, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half = x[2 * rank : 2 * rank + 2]
    found = []
    for way in ("keep", "checkpoint", *WAYS):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(synced())
        graph = rowtune.trace(net, (half,))
        rows = way in WAYS
        plan = rowtune.uniform_plan(
            graph, "rows" if rows else way, 3, images=int(rows), barriers=way if rows else "store"
        )
        rowtune.apply(net, plan)(half).square().mean().backward()
        for p in net.parameters():  # as DistributedDataParallel does, which takes no SyncBatchNorm on a CPU
            torch.distributed.all_reduce(p.grad)
            p.grad /= 2
        gradients = {n: p.grad for n, p in net.named_parameters()}
        found.append((gradients, dict(net.named_buffers())))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


def test_statistics_of_two_processes(tmp_path):
    """SyncBatchNorm with averaged gradients equals one process with the whole batch."""
    net = synced()
    x = torch.randn(4, 3, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    net(x).square().mean().backward()
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    largest = max(float(p.grad.abs().max()) for p in net.parameters())
    for gradients, buffers in torch.load(tmp_path / "found.pt"):
        for name, parameter in net.named_parameters():
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-10, atol=1e-10 * largest), name
        for name, buffer in net.named_buffers():
            assert torch.allclose(buffers[name], buffer, rtol=1e-10), name
