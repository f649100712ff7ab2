"""Tensors as small whole numbers, masks as bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import error
from hypothesis import given, settings
from hypothesis import strategies as st
from savers import case
from test_exact_barriers import LAYOUTS
from test_remade import lean

from rowtune.kernels.rounding import doubled, halved, packed, restored, rounded, unpacked
from rowtune.runtime.stores.int4 import Int4
from rowtune.runtime.stores.int8 import Int8

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


@settings(max_examples=100)
@given(shape=SHAPES, store=st.sampled_from([Int8(), Int4()]), wide=st.booleans(), seed=st.integers(0, 99))
def test_every_element_obeys_its_blocks_bound(shape, store, wide, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64 if wide else torch.float32) * 10.0 ** torch.randint(
        -9, 9, shape
    )
    x[torch.rand(shape) < 0.3] = 0
    kept = store.put(x)
    back = store.get(kept)
    assert back.shape == x.shape and back.dtype == x.dtype
    inner = tuple(range(2, x.dim())) or (x.dim() - 1,)
    bound = x.abs().amax(inner, keepdim=True) / (127 if isinstance(store, Int8) else 7)
    assert ((back - x).abs() <= bound * (1 + 1e-5)).all()
    assert torch.equal(back.sign(), x.sign())
    assert torch.equal(store.get(store.put(x)), back)  # the same dice
    assert store.takes(x) and not store.takes(x > 0)
    size, scales = x.numel(), x.numel() // max(x[0, 0].numel() if x.dim() > 2 else x.shape[-1], 1)
    assert store.bytes(kept) <= (size if isinstance(store, Int8) else size // 2 + 1) + 8 * scales


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_memory_keeps_its_order(layout):
    x = torch.randn(1, 4, 6, 5)
    there = LAYOUTS[layout](x)
    back = restored(rounded(there, 127))
    torch.testing.assert_close(back, x, rtol=0, atol=0.05)
    assert back.stride()[1:] == torch.empty_like(there).stride()[1:]  # of one image any stride will do


def test_errors_average_out():
    """Rounded to the nearest, all of these would be off to the same side."""
    x = torch.full((1, 1, 4096), 0.3) + 0.01 * torch.rand(1, 1, 4096)
    x[..., 0] = 7.0
    back = restored(rounded(x, 7))[..., 1:]
    assert {*back.unique().tolist()} <= {0.0, 1.0}
    x = x + 1.0
    x[..., 0] = 7.0
    assert restored(rounded(x, 7))[..., 1:].mean() == pytest.approx(float(x[..., 1:].mean()), abs=0.03)


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_bits_and_halves(shape, seed):
    torch.manual_seed(seed)
    mask = torch.rand(shape) < 0.5
    bits = packed(mask)
    assert bits.numel() == (mask.numel() + 7) // 8 and torch.equal(unpacked(bits, mask.shape), mask)
    codes = torch.randint(-7, 8, shape, dtype=torch.int8)
    for dim, many in enumerate(shape):
        halves = halved(codes, dim)
        assert halves.shape[dim] == (many + 1) // 2 and torch.equal(doubled(halves, dim, many), codes)


def test_no_dice_of_pytorchs_are_thrown():
    before = torch.get_rng_state()
    Int8().put(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_signs_that_decide_are_exact(monkeypatch):
    """With them a gradient is off by what is rounded, not by ReLUs that decided otherwise."""
    monkeypatch.setattr("rowtune.runtime.stores.keeping.LEAST_BYTES", 256)
    made = case("unet_bn", torch.float32, (2, 3, 32, 32))
    found: list[float] = []
    for branches in (frozenset[Any](), frozenset({"relu"})):
        monkeypatch.setattr("rowtune.runtime.stores.remade.BRANCHES", branches)
        plan = lean(made.training, "int4", max_grad_error=9.0)
        found.append(error(made.step(made.apply(plan)), made.plain()))
    assert found[1] < found[0]
