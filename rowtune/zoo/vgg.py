"""VGG-16 (Simonyan and Zisserman, 2015): norm-free 3x3 convolutions, parameter names as in torchvision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rowtune.zoo.weights import seeded

# Convolutions per stage and channels as multiples of the first stage's.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


class VGG(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes); H and W at least 32."""

    def __init__(self, width: int, classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        self.features = _features(width, in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        hidden = width * 64
        self.classifier = nn.Sequential(
            nn.Linear(width * 8 * 7 * 7, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _features(width: int, in_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = in_channels
    for convolutions, factor in STAGES:
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width * factor, 3, padding=1), nn.ReLU()]
            channels = width * factor
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg16(
    width: int = 64, classes: int = 1000, in_channels: int = 3, dropout: float = 0.5, seed: int = 0
) -> nn.Module:
    """VGG-16 with its classifier: (B, in_channels, H, W) to (B, classes)."""
    return seeded(lambda: VGG(width, classes, in_channels, dropout), seed)


def vgg16_features(width: int = 64, in_channels: int = 3, seed: int = 0) -> nn.Module:
    """The convolutional part alone: (B, in_channels, H, W) to (B, 8 width, H/32, W/32)."""
    return seeded(lambda: _features(width, in_channels), seed)
