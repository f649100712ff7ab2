"""ResNet-50 (He et al., 2016), the v1.5 variant: stride on the 3x3 convolution; names as in torchvision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rowtune.zoo.weights import seeded

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; (B, C, H, W) to (B, 4 planes, H/stride, W/stride)."""

    def __init__(self, channels: int, planes: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        out = planes * EXPANSION
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(y + shortcut)
        return y


class Trunk(nn.Module):
    """Images (B, in_channels, H, W) to the maps of every stage, at 1/4, 1/8, 1/16 and 1/32 of their size.

    With `dilate_last` the last stage keeps the size and spreads its kernels instead.
    """

    def __init__(
        self, width: int, depths: tuple[int, ...], in_channels: int, dilate_last: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.channels = width
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (stage, depth) in enumerate(zip(self.stages, depths, strict=True)):
            planes, last = width * 2**i, i + 1 == len(depths)
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 and not (dilate_last and last) else 1
                dilation = 2 if dilate_last and last and j > 0 else 1
                blocks.append(Bottleneck(self.channels, planes, stride, dilation))
                self.channels = planes * EXPANSION
            self.add_module(stage, nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
            maps.append(x)
        return maps


class ResNet(Trunk):
    """Images (B, in_channels, H, W) to logits (B, classes)."""

    def __init__(self, width: int, depths: tuple[int, ...], classes: int, in_channels: int) -> None:
        super().__init__(width, depths, in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.channels, classes)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        last = super().forward(x)[-1]
        logits: Tensor = self.fc(torch.flatten(self.avgpool(last), 1))
        return logits


def resnet50(
    width: int = 64,
    depths: tuple[int, ...] = (3, 4, 6, 3),
    classes: int = 1000,
    in_channels: int = 3,
    seed: int = 0,
) -> nn.Module:
    """ResNet-50 with batch norm: (B, in_channels, H, W) to (B, classes)."""
    return seeded(lambda: ResNet(width, tuple(depths), classes, in_channels), seed)
