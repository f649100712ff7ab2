"""How good a network is, by its task: accuracy, mean intersection over union, PSNR.

Predictions are looked at a few rows at a time, so that a metric takes no memory to speak of beside the
output it is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from rowtune.graph.losses import LOSSES, Loss

ROWS = 64


class Metric(Protocol):
    """Sums over batches; `result` is their means, by name."""

    def add(self, output: Tensor, target: Tensor) -> None: ...

    def result(self) -> dict[str, float]: ...


def metric_for(loss: Loss, output: tuple[int, ...]) -> Metric | None:
    """By the loss and the output's shape; None for a loss of the user's own: it may mean anything."""
    name = loss.name.partition(":")[0]
    if name not in LOSSES:
        return None
    if loss.class_target:
        return Accuracy() if len(output) == 2 else Overlap(output[1])
    if name == "bce_with_logits":
        return Overlap(2) if len(output) > 2 and output[1] == 1 else None
    return PeakSignal()


class Accuracy:
    """Share of images whose highest score is their class."""

    def __init__(self) -> None:
        self.hits, self.count = torch.zeros((), dtype=torch.int64), 0

    def add(self, output: Tensor, target: Tensor) -> None:
        self.hits = self.hits.to(output.device) + (output.argmax(1) == target).sum()
        self.count += target.numel()

    def result(self) -> dict[str, float]:
        return {"accuracy": int(self.hits) / max(1, self.count)}


class Overlap:
    """Mean intersection over union of the classes that occur, and the share of pixels that are right.

    Pixels whose target is no class (`ignore_index`) do not count.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes * classes, dtype=torch.int64)

    def add(self, output: Tensor, target: Tensor) -> None:
        self.confusion = self.confusion.to(output.device)
        if target.is_floating_point():  # one channel of logits
            target = target[:, 0]
        for scores, truth in _pieces(output, target):
            found = scores.argmax(0) if scores.shape[0] > 1 else (scores[0] > 0).long()
            truth = (truth > 0.5).long() if truth.is_floating_point() else truth
            counts = (truth >= 0) & (truth < self.classes)
            pairs = truth[counts] * self.classes + found[counts]
            self.confusion += torch.bincount(pairs, minlength=self.classes**2)

    def result(self) -> dict[str, float]:
        table = self.confusion.reshape(self.classes, self.classes).double().cpu()
        right = table.diagonal()
        union = table.sum(0) + table.sum(1) - right
        there = union > 0
        mean = float((right[there] / union[there]).mean()) if bool(there.any()) else 0.0
        return {"mean_iou": mean, "pixel_accuracy": float(right.sum() / table.sum().clamp(min=1))}


class PeakSignal:
    """Peak signal-to-noise ratio in decibels, of values from 0 to 1, as the mean over images."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, output: Tensor, target: Tensor) -> None:
        for image, wanted in zip(output, target, strict=True):
            error = torch.zeros((), dtype=torch.float64, device=output.device)
            for a, b in zip(image.split(ROWS, 1 if image.dim() > 1 else 0),
                            wanted.split(ROWS, 1 if image.dim() > 1 else 0), strict=True):  # fmt: skip
                error += (a - b).square().sum(dtype=torch.float64)
            mean = float(error) / max(1, image.numel())
            self.total += -10 * math.log10(mean) if mean else math.inf
            self.count += 1

    def result(self) -> dict[str, float]:
        return {"psnr": self.total / max(1, self.count)}


def _pieces(output: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of one image at a time: scores by class, and their target."""
    for scores, truth in zip(output, target, strict=True):
        yield from zip(scores.split(ROWS, 1), truth.split(ROWS, 0), strict=True)
