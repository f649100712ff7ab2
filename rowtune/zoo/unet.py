"""U-Net (Ronneberger et al., 2015) with padded convolutions: output as high and wide as the input."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from rowtune.errors import UsageError
from rowtune.zoo.weights import seeded


def _block(channels: int, out: int, norm: bool) -> nn.Sequential:
    """Two padded 3x3 convolutions; a convolution followed by batch norm needs no bias."""
    layers: list[nn.Module] = []
    for source in (channels, out):
        layers.append(nn.Conv2d(source, out, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _upsample(channels: int, out: int, up: str) -> nn.Module:
    """(B, channels, H, W) to (B, out, 2H, 2W)."""
    if up == "transposed":
        return nn.ConvTranspose2d(channels, out, 2, stride=2)
    if up == "bilinear":
        return nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(channels, out, 1)
        )
    raise UsageError(f"a U-Net upsamples with 'transposed' or 'bilinear', not {up!r}")


class UNet(nn.Module):
    """(B, in_channels, H, W) to (B, classes, H, W); H and W are multiples of 2**depth."""

    def __init__(self, base: int, depth: int, in_channels: int, classes: int, up: str, norm: bool) -> None:
        super().__init__()
        widths = [base * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(
            _block(source, out, norm) for source, out in pairwise([in_channels, *widths[:-1]])
        )
        self.pool = nn.MaxPool2d(2)
        self.bottom = _block(widths[-2] if depth else in_channels, widths[-1], norm)
        self.up = nn.ModuleList(_upsample(wide, out, up) for out, wide in reversed(list(pairwise(widths))))
        self.merge = nn.ModuleList(_block(2 * out, out, norm) for out in reversed(widths[:-1]))
        self.head = nn.Conv2d(base, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        y: Tensor = self.head(x)
        return y


def unet(
    base: int = 64,
    depth: int = 4,
    in_channels: int = 3,
    classes: int = 2,
    up: str = "transposed",
    seed: int = 0,
) -> nn.Module:
    """A norm-free U-Net: (B, in_channels, H, W) to (B, classes, H, W)."""
    return seeded(lambda: UNet(base, depth, in_channels, classes, up, norm=False), seed)


def unet_bn(
    base: int = 64,
    depth: int = 4,
    in_channels: int = 3,
    classes: int = 2,
    up: str = "transposed",
    seed: int = 0,
) -> nn.Module:
    """The same U-Net with batch norm after every 3x3 convolution."""
    return seeded(lambda: UNet(base, depth, in_channels, classes, up, norm=True), seed)
