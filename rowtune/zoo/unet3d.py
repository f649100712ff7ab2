"""A 3-D U-Net for volumes (Çiçek et al., 2016) in nnU-Net's form (Isensee et al., 2021): instance norm, leaky
ReLU, strided convolutions down, transposed convolutions up."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from rowtune.zoo.weights import seeded

SLOPE = 0.01


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """Two 3x3x3 convolutions with norm: (B, channels, D, H, W) to (B, out, D/stride, H/stride, W/stride)."""
    layers: list[nn.Module] = []
    for source, step in ((channels, stride), (out, 1)):
        layers.append(nn.Conv3d(source, out, 3, stride=step, padding=1))
        layers.append(nn.InstanceNorm3d(out, affine=True))
        layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """Volumes (B, in_channels, D, H, W) to (B, classes, D, H, W); D, H and W are multiples of 2**depth."""

    def __init__(self, base: int, depth: int, widest: int, in_channels: int, classes: int) -> None:
        super().__init__()
        widths = [min(base * 2**i, widest) for i in range(depth + 1)]
        self.down = nn.ModuleList(
            _block(source, out, 1 if i == 0 else 2)
            for i, (source, out) in enumerate(pairwise([in_channels, *widths]))
        )
        steps = list(reversed(list(pairwise(widths))))
        self.up = nn.ModuleList(nn.ConvTranspose3d(wide, out, 2, stride=2, bias=False) for out, wide in steps)
        self.merge = nn.ModuleList(_block(2 * out, out) for out, _ in steps)
        self.head = nn.Conv3d(widths[0], classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        y: Tensor = self.head(x)
        return y


def unet3d(
    base: int = 32, depth: int = 5, widest: int = 320, in_channels: int = 1, classes: int = 2, seed: int = 0
) -> nn.Module:
    """nnU-Net's 3-D full-resolution network: (B, in_channels, D, H, W) to (B, classes, D, H, W)."""
    return seeded(lambda: UNet3d(base, depth, widest, in_channels, classes), seed)
