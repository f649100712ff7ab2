"""The search, replayed on a recorded grid (benchmarks/grids/): nothing is run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import search_quality
    finally:
        sys.path.remove(str(BENCHMARKS))
    return search_quality


def test_a_search_comes_near_the_best_of_a_grid(quality: ModuleType) -> None:
    grid = quality.load("edsr")
    assert len(grid.plans) == len(grid.index) == len(grid.peak) == len(grid.predicted) == 1000
    for seed, share in enumerate(quality.SHARES):
        limit = grid.limit(share)
        chosen, measured = quality.searched(grid, limit, seed)
        assert grid.peak[chosen] <= limit and measured <= quality.TRIALS
        assert grid.real[chosen] <= quality.WITHIN * grid.best(limit)
    assert quality.searched(grid, limit, seed) == (chosen, measured)


def test_a_grid_s_space_is_the_programme_on_it(quality: ModuleType) -> None:
    grid = quality.load("edsr")
    space = quality.GridSpace(grid)
    space.most = grid.limit(0.5)
    guess = space.guesses()[0]
    best = quality.by_prediction(grid, grid.limit(0.5), 0)
    assert space.plan(guess) == grid.plans[best]
    space.most = float("inf")
    checkpoints = space.plan(guess | dict.fromkeys(space.zones, "checkpoint"))
    assert {s.policy for s in checkpoints.segments} <= {"keep", "checkpoint"}
    assert np.allclose(space.parts.sum(1), grid.predicted)
    space.most = 1.0
    assert space.plan(guess) == grid.plans[int(grid.peak.argmin())]
