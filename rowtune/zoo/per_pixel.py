"""A chain of 3x3 convolutions at full resolution: all its bytes are feature maps, the benchmark's extreme."""

from __future__ import annotations

from torch import nn

from rowtune.zoo.weights import seeded


def _chain(layers: int, channels: int, in_channels: int, classes: int) -> nn.Sequential:
    widths = [in_channels, *[channels] * (layers - 1), classes]
    modules: list[nn.Module] = []
    for i in range(layers):
        modules.append(nn.Conv2d(widths[i], widths[i + 1], 3, padding=1))
        if i + 1 < layers:
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def per_pixel(
    layers: int = 8, channels: int = 32, in_channels: int = 3, classes: int = 2, seed: int = 0
) -> nn.Module:
    """`layers` convolutions with ReLU between them: (B, in_channels, H, W) to (B, classes, H, W)."""
    return seeded(lambda: _chain(layers, channels, in_channels, classes), seed)
