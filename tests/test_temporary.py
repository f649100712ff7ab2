"""What kernels of a card take for themselves: counted by rules, of which no CPU has any."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rowtune
from rowtune.graph.losses import parse
from rowtune.graph.training import with_loss
from rowtune.plan.lower import lower
from rowtune.plan.uniform import uniform_plan
from rowtune.runtime.recorder import record
from rowtune.runtime.recording import check
from rowtune.runtime.temporary import temporary_bytes

aten = torch.ops.aten
X, WEIGHT = torch.empty(2, 4, 16, 8), torch.empty(6, 4, 3, 3)


def taken(x: torch.Tensor, weight: torch.Tensor = WEIGHT, kind: str = "cuda") -> int:
    return temporary_bytes(aten.convolution.default, (x, weight, None), kind)


def test_what_lies_densely_is_not_copied() -> None:
    assert taken(X) == 0
    assert taken(X[:1]) == 0  # of a batch some images
    assert taken(X.contiguous(memory_format=torch.channels_last)) == WEIGHT.numel() * 4
    last = WEIGHT.contiguous(memory_format=torch.channels_last)
    assert taken(X.contiguous(memory_format=torch.channels_last), last) == 0
    assert taken(torch.empty(1, 4, 16, 8).contiguous(memory_format=torch.channels_last)[:, :, 4:8], last) == 0


def test_rows_of_a_whole_tensor_are() -> None:
    band = X[:, :, 4:8]
    assert taken(band) == band.numel() * 4
    assert taken(band, kind="cpu") == 0
    assert taken(torch.empty(1, 1, 16, 8)[:, :, 4:8], torch.empty(6, 1, 3, 3)) == 0  # of a single channel

    backward = (X[:, :, :4], band, WEIGHT, None)
    size = temporary_bytes(aten.convolution_backward.default, backward, "cuda")
    assert size == (backward[0].numel() + band.numel()) * 4


@pytest.mark.parametrize("halo", ["sweep", "recompute"])
def test_a_plan_takes_them_on_a_card(halo: str) -> None:
    """Bands of the input are slices of it, and most of what this network has."""
    model, x = torch.nn.Sequential(torch.nn.Conv2d(32, 2, 3, padding=1)), torch.randn(1, 32, 64, 16)
    graph = with_loss(rowtune.trace(model, (x,)), parse("mse"))
    plan = uniform_plan(graph, "rows", 16, halo)  # type: ignore[arg-type]
    on_card = replace(graph, device="cuda")
    more = rowtune.predict(on_card, plan).activation_bytes - rowtune.predict(graph, plan).activation_bytes
    band = 18 * 32 * 16 * 4
    assert 0.5 * band < more <= band
    recording = check(record(lower(on_card, plan)))
    copies = [b for b in recording.buffers if b.role == "temporary"]
    assert copies and all(b.born == b.died for b in copies)
    assert not [b for b in check(record(lower(graph, plan))).buffers if b.role == "temporary"]
