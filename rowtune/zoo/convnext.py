"""ConvNeXt-T (Liu et al., 2022): depthwise 7x7, layer norm over channels, layer scale, torchvision names."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowtune.zoo.weights import seeded

EPS = 1e-6


class Permute(nn.Module):
    """Moves the channel axis; a module, so that parameter names count as torchvision's do."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W), through channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + stochastic_depth(layer_scale * branch(x)); (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, layer_scale: float, drop: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=EPS),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.empty(channels, 1, 1))
        self.initial_scale = layer_scale
        self.drop = drop

    def reset_parameters(self) -> None:
        nn.init.constant_(self.layer_scale, self.initial_scale)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.layer_scale * self.block(x)
        if self.drop > 0.0 and self.training:
            keep = 1.0 - self.drop
            branch = branch * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)
        y: Tensor = x + branch
        return y


class ConvNeXt(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes); H and W at least 32."""

    def __init__(
        self,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        classes: int,
        in_channels: int,
        layer_scale: float,
        stochastic_depth: float,
    ) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(in_channels, dims[0], 4, stride=4), ChannelNorm(dims[0], eps=EPS))
        layers: list[nn.Module] = [stem]
        last = max(sum(depths) - 1, 1)
        done = 0
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            # Later blocks are dropped more often, rising linearly to `stochastic_depth`.
            drops = [stochastic_depth * (done + j) / last for j in range(depth)]
            layers.append(nn.Sequential(*(Block(dim, layer_scale, drop) for drop in drops)))
            done += depth
            if i + 1 < len(dims):
                layers.append(_downsample(*list(pairwise(dims))[i]))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            ChannelNorm(dims[-1], eps=EPS), nn.Flatten(1), nn.Linear(dims[-1], classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)))
        return logits


def _downsample(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(channels, eps=EPS), nn.Conv2d(channels, out, 2, stride=2))


def convnext_tiny(
    depths: tuple[int, ...] = (3, 3, 9, 3),
    dims: tuple[int, ...] = (96, 192, 384, 768),
    classes: int = 1000,
    in_channels: int = 3,
    layer_scale: float = 1e-6,
    stochastic_depth: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """ConvNeXt-T: (B, in_channels, H, W) to (B, classes)."""
    return seeded(
        lambda: ConvNeXt(tuple(depths), tuple(dims), classes, in_channels, layer_scale, stochastic_depth),
        seed,
        lambda fan_in: 0.02,
    )
