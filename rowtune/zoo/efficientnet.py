"""EfficientNetV2-S (Tan and Le, 2021): fused and depthwise inverted bottlenecks; names as in torchvision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rowtune.zoo.inverted import SqueezeExcite, conv_norm, drop_branch
from rowtune.zoo.weights import seeded


class Stage(NamedTuple):
    fused: bool
    expand: int
    stride: int
    channels: int


STAGES = (
    Stage(True, 1, 1, 24),
    Stage(True, 4, 2, 48),
    Stage(True, 4, 2, 64),
    Stage(False, 4, 2, 128),
    Stage(False, 6, 1, 160),
    Stage(False, 6, 2, 256),
)
STEM, LAST = 24, 1280


class Block(nn.Module):
    """Expand, 3x3, (gate,) project: (B, C, H, W) to (B, out, H/stride, W/stride), with a shortcut where both
    are the same. A fused block expands with the 3x3 convolution itself."""

    def __init__(self, stage: Stage, channels: int, out: int, stride: int, drop: float) -> None:
        super().__init__()
        wide = channels * stage.expand
        layers: list[nn.Module] = []
        if stage.fused and stage.expand == 1:
            layers.append(conv_norm(channels, out, 3, stride, act=nn.SiLU))
        elif stage.fused:
            layers.append(conv_norm(channels, wide, 3, stride, act=nn.SiLU))
            layers.append(conv_norm(wide, out, 1, act=None))
        else:
            layers.append(conv_norm(channels, wide, 1, act=nn.SiLU))
            layers.append(conv_norm(wide, wide, 3, stride, groups=wide, act=nn.SiLU))
            layers.append(SqueezeExcite(wide, max(1, channels // 4), nn.SiLU, nn.Sigmoid))
            layers.append(conv_norm(wide, out, 1, act=None))
        self.block = nn.Sequential(*layers)
        self.shortcut = stride == 1 and channels == out
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + drop_branch(y, self.drop, self.training) if self.shortcut else y


class EfficientNetV2(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes); H and W at least 32."""

    def __init__(
        self,
        width: float,
        depths: tuple[int, ...],
        classes: int,
        in_channels: int,
        dropout: float,
        stochastic_depth: float,
    ) -> None:
        super().__init__()
        channels = _scaled(STEM, width)
        layers: list[nn.Module] = [conv_norm(in_channels, channels, 3, 2, act=nn.SiLU)]
        done = 0
        for stage, depth in zip(STAGES, depths, strict=True):
            out, blocks = _scaled(stage.channels, width), []
            for i in range(depth):
                # Later blocks are dropped more often, rising linearly towards `stochastic_depth`.
                drop = stochastic_depth * done / sum(depths)
                blocks.append(Block(stage, channels, out, stage.stride if i == 0 else 1, drop))
                channels, done = out, done + 1
            layers.append(nn.Sequential(*blocks))
        last = _scaled(LAST, width)
        layers.append(conv_norm(channels, last, 1, act=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def _scaled(channels: int, width: float) -> int:
    return max(2, round(channels * width))


def efficientnet_v2_s(
    width: float = 1.0,
    depths: tuple[int, ...] = (2, 4, 4, 6, 9, 15),
    classes: int = 1000,
    in_channels: int = 3,
    dropout: float = 0.2,
    stochastic_depth: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """EfficientNetV2-S: (B, in_channels, H, W) to (B, classes). `width` multiplies all channels; the paper
    trains with `stochastic_depth=0.2`."""
    return seeded(
        lambda: EfficientNetV2(width, tuple(depths), classes, in_channels, dropout, stochastic_depth), seed
    )
