"""EDSR (Lim et al., 2017): super-resolution by a long norm-free residual body at low resolution.

The mean shift of the paper is left out: it is a constant of the data set and belongs to the data loader.
"""

from __future__ import annotations

from torch import Tensor, nn

from rowtune.errors import UsageError
from rowtune.zoo.weights import seeded, small


class ResidualBlock(nn.Module):
    """x + residual_scale * conv(relu(conv(x))); (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, residual_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv3(channels, channels), nn.ReLU(), _conv3(channels, channels))
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        branch = self.body(x)
        y: Tensor = x + (branch if self.residual_scale == 1.0 else branch * self.residual_scale)
        return y


class EDSR(nn.Module):
    """(B, in_channels, H, W) to (B, in_channels, scale H, scale W)."""

    def __init__(
        self, blocks: int, channels: int, scale: int, residual_scale: float, in_channels: int
    ) -> None:
        super().__init__()
        self.head = _conv3(in_channels, channels)
        self.body = nn.Sequential(
            *(ResidualBlock(channels, residual_scale) for _ in range(blocks)), _conv3(channels, channels)
        )
        self.upsample = _upsampler(channels, scale)
        self.tail = _conv3(channels, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y: Tensor = self.tail(self.upsample(x + self.body(x)))
        return y


def _conv3(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _upsampler(channels: int, scale: int) -> nn.Sequential:
    factors = {2: (2,), 3: (3,), 4: (2, 2)}.get(scale)
    if factors is None:
        raise UsageError(f"EDSR enlarges by 2, 3 or 4, not by {scale}")
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [_conv3(channels, channels * factor**2), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


def edsr(
    blocks: int = 16,
    channels: int = 64,
    scale: int = 2,
    residual_scale: float = 1.0,
    in_channels: int = 3,
    seed: int = 0,
) -> nn.Module:
    """The paper's baseline: (B, in_channels, H, W) to (B, in_channels, scale H, scale W)."""
    return seeded(lambda: EDSR(blocks, channels, scale, residual_scale, in_channels), seed, small)
