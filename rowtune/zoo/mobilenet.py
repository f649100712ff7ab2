"""MobileNetV3-Large (Howard et al., 2019): depthwise, hardswish, gates; names as in torchvision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rowtune.zoo.inverted import SqueezeExcite, conv_norm, make_divisible
from rowtune.zoo.weights import seeded


class Row(NamedTuple):
    """One block: kernel, channels within, channels out, gate, hardswish, stride."""

    kernel: int
    wide: int
    out: int
    gate: bool
    swish: bool
    stride: int = 1


STAGES = (
    (Row(3, 16, 16, False, False),),
    (Row(3, 64, 24, False, False, 2), Row(3, 72, 24, False, False)),
    (Row(5, 72, 40, True, False, 2), Row(5, 120, 40, True, False), Row(5, 120, 40, True, False)),
    (
        Row(3, 240, 80, False, True, 2),
        Row(3, 200, 80, False, True),
        Row(3, 184, 80, False, True),
        Row(3, 184, 80, False, True),
    ),
    (Row(3, 480, 112, True, True), Row(3, 672, 112, True, True)),
    (Row(5, 672, 160, True, True, 2), Row(5, 960, 160, True, True), Row(5, 960, 160, True, True)),
)
STEM, LAST = 16, 1280
MOMENTUM = 0.01


class Block(nn.Module):
    """Expand, depthwise, (gate,) project: (B, C, H, W) to (B, out, H/stride, W/stride)."""

    def __init__(self, row: Row, channels: int, width: float) -> None:
        super().__init__()
        wide, out = make_divisible(row.wide * width), make_divisible(row.out * width)
        act = nn.Hardswish if row.swish else nn.ReLU
        layers: list[nn.Module] = []
        if wide != channels:
            layers.append(conv_norm(channels, wide, 1, act=act, momentum=MOMENTUM))
        layers.append(conv_norm(wide, wide, row.kernel, row.stride, wide, act, momentum=MOMENTUM))
        if row.gate:
            layers.append(SqueezeExcite(wide, make_divisible(wide // 4), nn.ReLU, nn.Hardsigmoid))
        layers.append(conv_norm(wide, out, 1, act=None, momentum=MOMENTUM))
        self.block = nn.Sequential(*layers)
        self.shortcut = row.stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.shortcut else y


class MobileNetV3(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes); H and W at least 32."""

    def __init__(
        self, width: float, depths: tuple[int, ...], classes: int, in_channels: int, dropout: float
    ) -> None:
        super().__init__()
        channels = make_divisible(STEM * width)
        layers: list[nn.Module] = [
            conv_norm(in_channels, channels, 3, 2, act=nn.Hardswish, momentum=MOMENTUM)
        ]
        for rows, depth in zip(STAGES, depths, strict=True):
            for row in rows[:depth]:
                layers.append(Block(row, channels, width))
                channels = make_divisible(row.out * width)
        features = 6 * channels
        layers.append(conv_norm(channels, features, 1, act=nn.Hardswish, momentum=MOMENTUM))
        hidden = make_divisible(LAST * width)
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(features, hidden), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def mobilenet_v3_large(
    width: float = 1.0,
    depths: tuple[int, ...] = (1, 2, 3, 4, 2, 3),
    classes: int = 1000,
    in_channels: int = 3,
    dropout: float = 0.2,
    seed: int = 0,
) -> nn.Module:
    """MobileNetV3-Large: (B, in_channels, H, W) to (B, classes). `width` multiplies all channels, `depths`
    says how many blocks of each resolution are kept."""
    return seeded(lambda: MobileNetV3(width, tuple(depths), classes, in_channels, dropout), seed)
