"""DeepLabV3+ (Chen et al., 2018) on ResNet-50, output stride 16: atrous pyramid, decoder with a skip.

Batch norm over the one pixel of the image pooling has nothing to normalise where there is one image; by
default that branch has a bias instead, as in Detectron2. `pool_norm=True` is the original.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowtune.zoo.resnet import EXPANSION, Trunk
from rowtune.zoo.weights import seeded


def _conv(channels: int, out: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution, norm, relu; keeps height and width."""
    pad = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, padding=pad, dilation=dilation, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


class Pyramid(nn.Module):
    """ASPP: 1x1, three dilated 3x3 and the image's mean, side by side; (B, C, H, W) to (B, out, H, W)."""

    def __init__(self, channels: int, out: int, rates: tuple[int, ...], pool_norm: bool, dropout: float):
        super().__init__()
        branches = [_conv(channels, out, 1), *(_conv(channels, out, 3, rate) for rate in rates)]
        self.branches = nn.ModuleList(branches)
        norm = [nn.BatchNorm2d(out)] if pool_norm else []
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, out, 1, bias=not pool_norm), *norm, nn.ReLU()
        )
        self.project = nn.Sequential(*_conv(out * (len(branches) + 1), out, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        mean = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        y: Tensor = self.project(torch.cat([*(branch(x) for branch in self.branches), mean], 1))
        return y


class DeepLabV3Plus(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes, H, W)."""

    def __init__(
        self,
        width: int,
        depths: tuple[int, ...],
        channels: int,
        low_channels: int,
        rates: tuple[int, ...],
        classes: int,
        in_channels: int,
        pool_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.backbone = Trunk(width, depths, in_channels, dilate_last=True)
        self.low = _conv(width * EXPANSION, low_channels, 1)
        self.aspp = Pyramid(self.backbone.channels, channels, rates, pool_norm, dropout)
        self.classifier = nn.Sequential(
            *_conv(low_channels + channels, channels, 3), nn.Conv2d(channels, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        low, *_, high = self.backbone(x)
        low = self.low(low)
        high = F.interpolate(self.aspp(high), size=low.shape[-2:], mode="bilinear", align_corners=False)
        y = self.classifier(torch.cat([low, high], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def deeplabv3plus(
    width: int = 64,
    depths: tuple[int, ...] = (3, 4, 6, 3),
    channels: int = 256,
    low_channels: int = 48,
    rates: tuple[int, ...] = (6, 12, 18),
    classes: int = 21,
    in_channels: int = 3,
    pool_norm: bool = False,
    dropout: float = 0.1,
    seed: int = 0,
) -> nn.Module:
    """DeepLabV3+ with ResNet-50: (B, in_channels, H, W) to (B, classes, H, W)."""
    return seeded(
        lambda: DeepLabV3Plus(
            width, tuple(depths), channels, low_channels, tuple(rates), classes, in_channels, pool_norm,
            dropout,
        ),
        seed,
    )  # fmt: skip
