"""DenseNet-121 (Huang et al., 2017): a layer reads all earlier ones of its block; names as in torchvision."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from rowtune.zoo.weights import seeded


class DenseLayer(nn.Module):
    """norm, relu, 1x1, norm, relu, 3x3: the maps so far to `growth` new channels of the same size."""

    def __init__(self, channels: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        inner = bottleneck * growth
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        y: Tensor = self.conv2(self.relu2(self.norm2(x)))
        return y


class DenseBlock(nn.ModuleDict):
    """(B, C, H, W) to (B, C + depth * growth, H, W)."""

    def __init__(self, channels: int, depth: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        for i in range(depth):
            self[f"denselayer{i + 1}"] = DenseLayer(channels + i * growth, growth, bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.values():
            maps.append(layer(maps))
        return torch.cat(maps, 1)


def _transition(channels: int) -> nn.Sequential:
    """(B, C, H, W) to (B, C/2, H/2, W/2)."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
            pool=nn.AvgPool2d(2, 2),
        )
    )


class DenseNet(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes); H and W at least 32."""

    def __init__(
        self,
        growth: int,
        depths: tuple[int, ...],
        width: int,
        bottleneck: int,
        classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(width),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels = width
        for i, depth in enumerate(depths, 1):
            layers[f"denseblock{i}"] = DenseBlock(channels, depth, growth, bottleneck)
            channels += depth * growth
            if i < len(depths):
                layers[f"transition{i}"] = _transition(channels)
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(layers)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.relu(self.features(x)))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def densenet121(
    growth: int = 32,
    depths: tuple[int, ...] = (6, 12, 24, 16),
    width: int = 64,
    bottleneck: int = 4,
    classes: int = 1000,
    in_channels: int = 3,
    seed: int = 0,
) -> nn.Module:
    """DenseNet-121: (B, in_channels, H, W) to (B, classes); each of `depths` layers adds `growth` channels,
    through `bottleneck` times as many within."""
    return seeded(lambda: DenseNet(growth, tuple(depths), width, bottleneck, classes, in_channels), seed)
