"""Blocks of many families of CNNs: one bandable stretch each, and exact in any bands."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from exactness import TOLERANCE, Step, error, step
from family_table import FAMILIES, family
from hypothesis import given, settings
from hypothesis import strategies as st

import rowtune
from rowtune.graph.bands import banding
from rowtune.graph.cuts import opaque_nodes, stretches
from rowtune.graph.graph import Graph
from rowtune.graph.rules import Opaque

HALOS = ("recompute", "cache", "sweep")


class Case:
    """A block, its graph and plain gradients, made once."""

    def __init__(self, name: str) -> None:
        self.model = family(name)
        generator = torch.Generator().manual_seed(1)
        shape = FAMILIES[name][1]
        self.x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        self.graph: Graph = rowtune.trace(self.model, (self.x,))
        self.plain = self.step(self.model)

    def step(self, module: Any) -> Step:
        return step(self.model, lambda: module(self.x), {"x": self.x})

    def error(self, *args: Any, **options: Any) -> float:
        plan = rowtune.uniform_plan(self.graph, "rows", *args, **options)
        module = rowtune.apply(self.model, plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rowtune.runtime.module.trace", lambda *_, **__: self.graph)
            return error(self.step(module), self.plain)


case = cache(Case)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_block_is_one_stretch(name: str) -> None:
    graph = case(name).graph
    assert stretches(graph, 2) == [(0, len(graph.nodes))], opaque_nodes(graph)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("halo", HALOS)
def test_bands_are_exact(name: str, halo: Any) -> None:
    for band in (1, 3, 1000):
        assert case(name).error(band, halo) < TOLERANCE, band


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(FAMILIES)), band=st.integers(1, 40), halo=st.sampled_from(HALOS),
    tapes=st.sampled_from(["split", "whole", "late"]), images=st.integers(0, 1), axis=st.integers(2, 3),
)  # fmt: skip
def test_any_bands_are_exact(name, band, halo, tapes, images, axis):
    found = case(name)
    axis = min(axis, found.x.dim() - 1)
    if images and any(isinstance(r, Opaque) for r in banding(found.graph, 0).rules.values()):
        images = 0
    assert found.error(band, halo, tapes=tapes, images=images, axis=axis) < TOLERANCE
