"""Small networks, plans for them and folders of images, that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rowtune.importers.source import parse_source
from rowtune.plan.file import PlanFile, save_plan
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.tune.step import Workload, define

BUDGET = 10**9

MODELS = '''
"""Networks with batch norm and dropout, whose state is more than their weights."""
import torch
from torch import nn

class Pixels(nn.Module):
    """Three classes for each pixel."""
    def __init__(self, classes=3):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.b = nn.Dropout(0.2), nn.Conv2d(4, classes, 3, padding=1)

    def forward(self, x):
        return self.b(self.drop(torch.relu(self.n(self.a(x)))))

class Images(Pixels):
    """Two classes for each image."""
    def __init__(self):
        super().__init__(2)

    def forward(self, x):
        return super().forward(x).mean((2, 3))

class Twice(nn.Module):
    """An image of twice the size."""
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x):
        return self.b(self.a(x))

class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.a(x)
'''


def workload(model: str, shape: str, loss: str = "", **more: Any) -> Workload:
    return define(parse_source(model), [shape], loss=loss, **more)


def plan_file(work: Workload, band_rows: int = 4, budget: int = BUDGET) -> PlanFile:
    """A plan of rows, where the network has any to band; of none, as PyTorch runs it."""
    policy = ("rows", band_rows) if band_rows else ("keep",)
    plan: Plan = uniform_plan(work.graph, *policy)
    return PlanFile(work.problem, work.graph.fingerprint, budget, plan, {}, {})


def write_plan(path: Path, model: str, shape: str, loss: str = "", **more: Any) -> Path:
    save_plan(plan_file(workload(model, shape, loss), **more), path)
    return path


def draw(path: Path, *shape: int, seed: int = 0, high: int = 256) -> None:
    """An image of noise, or a mask of classes below `high`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def masks(root: Path, count: int = 5, size: tuple[int, int] = (16, 12)) -> Path:
    """Images and masks: bright, dark and other pixels."""
    for i in range(count):
        draw(root / "images" / f"{i}.png", *size, 3, seed=i)
        pixels = np.asarray(Image.open(root / "images" / f"{i}.png")).mean(2)
        mask = (pixels > 100).astype(np.uint8) + (pixels > 150)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    return root


def classes(root: Path, count: int = 4) -> Path:
    """Dark images and bright ones."""
    for i in range(count):
        draw(root / "dark" / f"{i}.png", 20, 14, 3, seed=i, high=100)
        draw(root / "light" / f"{i}.jpg", 14, 20, 3, seed=i)
    return root


def pairs(root: Path, count: int = 4, times: int = 2) -> Path:
    """Images, and the same ones larger."""
    for i in range(count):
        draw(root / "target" / f"{i}.png", 20 * times, 18 * times, 3, seed=i)
        large = Image.open(root / "target" / f"{i}.png")
        (root / "input").mkdir(exist_ok=True)
        large.resize((18, 20), Image.Resampling.BOX).save(root / "input" / f"{i}.png")
    return root
