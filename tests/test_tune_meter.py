"""The meter, against sums done by hand."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from rowtune.tune.meter import LiveMeter, allocator_peak, measure_memory, state_tensors


def test_live_bytes_follow_storages_not_tensors() -> None:
    x = torch.zeros(100)  # 400 bytes
    meter = LiveMeter()
    meter.start([x])
    with meter:
        a = x + 1  # 800
        view = a.view(10, 10)[2:]  # a view owns nothing
        b = a * 2  # 1200
        del a
        assert meter.live_bytes == 1200  # the view holds a's storage
        del view
        assert meter.live_bytes == 800
        del b
    assert meter.live_bytes == 400
    assert meter.peaks().peak_bytes == 1200


def test_in_place_and_reused_memory_are_not_counted_twice() -> None:
    x = torch.zeros(100)
    meter = LiveMeter()
    meter.start([x])
    with meter:
        for _ in range(5):
            x = x + 1  # old and new live together for a moment
            x.mul_(2)
    assert meter.peaks().peak_bytes == 800
    assert meter.live_bytes == 400


class Linear(nn.Module):
    """One 10x10 weight: 400 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).sum()


def test_a_training_step_by_hand() -> None:
    """Forward: x 40 + x@w 40 + sum 4 over the weight's 400. Backward: the 400 of the gradient more, but
    x@w is gone; the sum and its gradient take 8. SGD with momentum holds 400 more, updated in place."""
    net, x = Linear(), torch.ones(1, 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).backward()
        optimizer.step()

    step()
    memory = measure_memory(step, net, optimizer, [x], "cpu")
    assert memory.activation_bytes == 40 + 40 + 4
    assert memory.peak_bytes == 400 + 400 + 400 + 40 + 4 + 4


def test_saved_tensors_count_until_backward_drops_them() -> None:
    x = torch.zeros(100, requires_grad=True)
    meter = LiveMeter()
    meter.start([x])
    with meter:
        y = x.exp().exp().sum()  # each exp saves its output: 400 + 400 + 4
        assert meter.live_bytes == 400 + 804
        y.backward()
    assert x.grad is not None
    del y
    assert meter.live_bytes == 400 + 400
    meter.tag([x, x.grad])
    assert meter.peaks().activation_bytes < meter.peaks().peak_bytes


def test_a_gradient_is_a_gradient_from_the_moment_it_is_made() -> None:
    w = nn.Parameter(torch.zeros(1000))
    meter = LiveMeter()
    meter.start([w], [w])
    with meter:
        (w * 2).sum().backward()
    assert w.grad is not None
    assert meter.peaks().activation_bytes == 4000 + 4 + 4  # backward: the gradient, the sum, its own gradient
    meter.tag([w.grad])
    assert meter.peaks().activation_bytes == 4000 + 4  # forward: w*2 and its sum


def test_memory_is_the_same_from_step_to_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.Adam(net.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()

    step()
    first, second = (measure_memory(step, net, optimizer, [x], "cpu") for _ in range(2))
    assert first == second
    held = sum(t.untyped_storage().nbytes() for t in state_tensors(net, optimizer))
    assert first.peak_bytes > held + first.activation_bytes / 2


def test_the_allocator_sees_kernel_temporaries() -> None:
    x = torch.randn(200, 300)

    def step() -> None:
        x.t().contiguous().sort(dim=1)

    live = LiveMeter()
    live.start([x])
    with live:
        step()
    tensors = live.peaks().peak_bytes - 240_000
    assert tensors == 240_000 * (1 + 1 + 2)  # the copy, values, int64 indices
    assert tensors < allocator_peak(step) < 1.1 * tensors


FRESH_PAGES = """
import resource, torch
from rowtune.tune.device import keep_freed_memory
keep_freed_memory()
for _ in range(8):
    torch.zeros(1 << 24).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.zeros(1 << 24).add_(1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_let_go_of_is_kept():
    """64 MB four times: 16 thousand fresh pages each time, or none."""
    done = subprocess.run([sys.executable, "-c", FRESH_PAGES], check=True, capture_output=True)
    assert int(done.stdout) < 1 << 23
