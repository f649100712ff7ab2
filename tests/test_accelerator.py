"""Steps on a device without data: nothing that a GPU would have to wait for, and not more launches than there
were when this was written. No GPU is needed, and nothing is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import NETS, Numbers, Watch, measured
from torch import nn
from torch.utils import backend_registration

import rowtune
from rowtune.kernels.constants import Copies, Tables, zero
from rowtune.kernels.moments import by_deviations, by_one_kernel, statistics_of
from rowtune.problem import TensorSpec
from rowtune.tune.step import plain_graph
from rowtune.zoo import build

KNOWN: dict[Any, Any] = {}
# Launches of a warm step under each plan of accelerator.plans, in order, and implicit copies under all: with
# torch 2.13; the operators of another release may take one or two more.
SLACK = 1.0 if torch.__version__.startswith("2.13.") else 1.01
MOST: dict[str, tuple[tuple[int, ...], int]] = {
    "convnext_tiny": ((290, 290, 332, 356, 356, 356, 356, 356, 354, 519, 356, 356, 356, 377), 37),
    "deeplabv3plus": ((464, 464, 607, 1426, 1436, 1439, 1417, 1414, 1430, 2436, 1592, 1915, 8228, 1629), 134),
    "densenet121": ((282, 282, 373, 826, 835, 835, 835, 835, 835, 1482, 918, 1027, 4100, 952), 84),
    "edsr": ((88, 88, 106, 309, 373, 426, 301, 320, 341, 425, 293), 118),
    "efficientnet_v2_s": ((371, 371, 475, 975, 977, 977, 977, 976, 977, 1701, 1070, 1214, 5524, 1117), 0),
    "hrnet_w18": ((524, 524, 690, 1600, 1610, 1613, 1591, 1588, 1603, 2776, 1790, 2154, 7630, 1822), 1),
    "mobilenet_v3_large": ((379, 379, 483, 981, 982, 982, 982, 981, 982, 1695, 1073, 1202, 5455, 1116), 0),
    "per_pixel": ((60, 60, 71, 118, 145, 163, 129, 135, 144, 100, 136), 45),
    "resnet50": ((348, 348, 454, 1031, 1031, 1031, 1031, 1031, 1031, 1829, 1125, 1222, 5186, 1173), 119),
    "unet": ((196, 196, 236, 376, 338, 355, 310, 350, 348, 326, 455), 68),
    "unet3d": ((251, 251, 308, 835, 857, 951, 843, 865, 912, 997, 1097, 1261, 2405, 1027), 122),
    "unet_bn": ((208, 208, 269, 781, 805, 894, 800, 810, 853, 977, 1000, 1131, 2031, 915), 161),
    "vgg16": ((188, 188, 227, 240, 240, 240, 240, 240, 240, 345, 240, 240, 240, 263), 0),
    "vgg16_features": ((148, 148, 181, 186, 186, 183, 183, 183, 183, 253, 204), 0),
}


@pytest.mark.parametrize("network", NETS)
def test_a_warm_step_waits_for_nothing(network):
    launches, copies = [], 0
    for found in measured(network, KNOWN):
        assert not found.faults, (found.plan, found.faults)
        launches.append(found.launches)
        copies += found.copies
    most, most_copies = MOST[network]
    assert len(launches) == len(most)
    assert all(now <= then * SLACK for now, then in zip(launches, most, strict=True)), launches
    assert copies <= most_copies


@pytest.mark.parametrize("network", ["per_pixel", "unet_bn"])
def test_lists_wait_for_nothing_and_launch_less(network):
    """Their second step, which writes them down on tensors without data, and runs them."""
    most, _ = MOST[network]
    for found, traced in zip(measured(network, KNOWN, engine="listed"), most, strict=True):
        assert not found.faults, (found.plan, found.faults)
        assert found.launches <= traced, found.plan


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot name a device",
)
def test_an_accelerator_in_name_agrees():
    """PyTorch's own checks of devices, and its checkpoint, on a device that it takes for an accelerator."""
    wanted = ["unet_bn:cache", "resnet50:checkpoint", "per_pixel:replay", "per_pixel:turns"]
    script = Path(__file__).with_name("accelerator.py")
    done = subprocess.run([sys.executable, str(script), *wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f"{f['network']}:{f['plan']}" for f in found] == wanted
    assert not [f for f in found if f["faults"]]


def test_what_an_accelerator_would_wait_for_is_seen():
    """Guards the tests above."""
    x = torch.empty(2, 3, device="meta")

    def faults(run: Any) -> list[str]:
        watch = Watch("meta", {})
        with Numbers(watch), watch:
            try:
                run()
            except (RuntimeError, NotImplementedError):
                assert watch.faults
        return [*watch.faults]

    assert not faults(lambda: (x + 1.0).sum() * x.new_zeros(()) + torch.ones(()))
    for run in (
        lambda: x.sum().item(), lambda: bool(x.any()), lambda: torch.ones(3).to("meta"), lambda: x.to("cpu"),
        lambda: torch.tensor([1.0], device="meta"), lambda: x[[0, 1]], lambda: x.copy_(torch.ones(3)),
        lambda: x[torch.tensor([0])], lambda: x.nonzero(),
    ):  # fmt: skip
        assert faults(run)


@pytest.mark.parametrize("network", ["vgg16", "resnet50", "unet_bn", "convnext_tiny"])
def test_a_network_is_traced_on_its_own_device(network):
    options, size = NETS[network]
    specs = [TensorSpec("x", (2, 3, *size))]
    here, there = build(network, **options), build(network, **options).to("meta")
    assert plain_graph(there, specs).fingerprint == plain_graph(here, specs).fingerprint


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 6, 7), (3, 2, 4, 3, 2)])
def test_statistics_by_one_kernel_are_those_by_deviations(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 100
    dims = (0, *range(2, len(shape)))
    count = x.numel() // shape[1]
    one, other = (
        statistics_of(by(x, dims)[None], (count,), Tables()) for by in (by_one_kernel, by_deviations)
    )
    assert one.dtype == other.dtype == torch.float64
    assert torch.allclose(one, other, rtol=1e-12)
    assert torch.allclose(
        statistics_of(by_one_kernel(x.float(), dims)[None], (count,), Tables()), other, rtol=1e-4
    )


@pytest.mark.parametrize("counts", [(50, 50, 50), (60, 60, 30)])
def test_statistics_are_put_together_in_float64(counts):
    """What bands measured in float32, around a large mean."""
    shares = torch.stack([by_one_kernel(torch.randn(2, 3, n // 2, 1) + 1e4, (0, 2, 3)) for n in counts])
    assert shares.dtype == torch.float32
    found = statistics_of(shares, counts, Tables())
    assert torch.allclose(found, statistics_of(shares.double(), counts, Tables()), rtol=1e-14)


def test_constants_are_made_once_and_never_for_a_tracer():
    tables, like = Tables(), torch.empty(2, 3)
    with torch.inference_mode():
        first = tables.column((1.0, 2.0), like, 0)
    assert tables.column((1.0, 2.0), like, 0) is first and first.shape == (2, 1) and not first.is_inference()
    assert tables.column((1.0, 2.0), like.double(), 0).dtype == torch.float64
    with torch._subclasses.FakeTensorMode() as mode:
        traced = tables.index((0, 1), mode.from_tensor(like))
        assert isinstance(traced, torch._subclasses.FakeTensor)
        assert isinstance(zero(mode.from_tensor(like)), torch._subclasses.FakeTensor)
    assert tables.index((0, 1), like).tolist() == [0, 1]
    assert zero(like) is zero(like) and float(zero(like, torch.float64)) == 0.0


def test_class_weights_that_change_are_copied_again():
    weights = torch.ones(3)
    copies, like = Copies(weights), torch.empty(1)
    first = copies.like(like, torch.float64)
    assert copies.like(like, torch.float64) is first
    weights.mul_(2)
    assert copies.like(like, torch.float64).tolist() == [2.0, 2.0, 2.0]


def test_a_cumulative_average_reads_no_counter():
    """momentum=None: the factor is one over the number of batches, which is on the device."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)).to("meta")
    x = torch.empty(2, 3, 9, 9, device="meta")
    module = rowtune.apply(net, rowtune.uniform_plan(rowtune.trace(net, (x,)), "rows", 3))
    module(x).sum().backward()
    watch = Watch("meta", {})
    with Numbers(watch), watch:
        module(x).sum().backward()
    assert not watch.faults
