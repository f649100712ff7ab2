"""HRNet-W18 (Wang et al., 2020): branches of 1, 1/2, 1/4 and 1/8 of the resolution side by side, exchanged by
sums; head for classification, or for segmentation (HRNetV2). Names as in timm, but for the fusions'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowtune.errors import UsageError
from rowtune.zoo.resnet import EXPANSION, Bottleneck
from rowtune.zoo.weights import seeded


def _conv(channels: int, out: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def _upsample(x: Tensor, like: Tensor, mode: str) -> Tensor:
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(x, size=like.shape[-2:], mode=mode, **corners)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + x)
        return y


def _fuse(source: int, target: int, widths: list[int]) -> nn.Module:
    """From branch `source` to the channels of branch `target`, and down to its size (up is done outside)."""
    if source == target:
        return nn.Identity()
    if source > target:
        return _conv(widths[source], widths[target], 1, relu=False)
    steps = target - source
    down = [_conv(widths[source], widths[source], 3, 2) for _ in range(steps - 1)]
    return nn.Sequential(*down, _conv(widths[source], widths[target], 3, 2, relu=False))


class Exchange(nn.Module):
    """Basic blocks on every branch, then every branch is the sum of all, brought to its size."""

    def __init__(self, widths: list[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(w) for _ in range(blocks))) for w in widths)
        n = range(len(widths))
        self.fuse_layers = nn.ModuleList(nn.ModuleList(_fuse(j, i, widths) for j in n) for i in n)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for i, layers in enumerate(self.fuse_layers):
            assert isinstance(layers, nn.ModuleList)
            terms = [layer(x) for layer, x in zip(layers, maps, strict=True)]
            terms = [_upsample(t, maps[i], "nearest") if j > i else t for j, t in enumerate(terms)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            fused.append(F.relu(total))
        return fused


class Stage(nn.Module):
    """One more, coarser branch (made by a strided convolution), then `modules` exchanges."""

    def __init__(self, narrow: list[int], widths: list[int], modules: int, blocks: int) -> None:
        super().__init__()
        # The first transition also narrows the one branch there is; later ones only add one.
        first = narrow[0] != widths[0]
        self.narrow = _conv(narrow[0], widths[0]) if first else nn.Identity()
        self.coarser = _conv(narrow[-1], widths[-1], 3, 2)
        self.exchanges = nn.Sequential(*(Exchange(widths, blocks) for _ in range(modules)))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = self.exchanges([self.narrow(maps[0]), *maps[1:], self.coarser(maps[-1])])
        return found


class Classifier(nn.Module):
    """Widen every branch, add them from fine to coarse, pool: (B, classes)."""

    def __init__(self, widths: list[int], planes: int, features: int, classes: int) -> None:
        super().__init__()
        wide = [planes * 2**i for i in range(len(widths))]
        self.incre_modules = nn.ModuleList(Bottleneck(w, p, 1) for w, p in zip(widths, wide, strict=True))
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(p * EXPANSION, 2 * p * EXPANSION, 3, stride=2, padding=1),
                nn.BatchNorm2d(2 * p * EXPANSION),
                nn.ReLU(),
            )
            for p in wide[:-1]
        )
        self.final_layer = nn.Sequential(
            nn.Conv2d(wide[-1] * EXPANSION, features, 1), nn.BatchNorm2d(features), nn.ReLU()
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(features, classes)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        y: Tensor = self.incre_modules[0](maps[0])
        for x, widen, down in zip(maps[1:], self.incre_modules[1:], self.downsamp_modules, strict=True):
            y = widen(x) + down(y)
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.final_layer(y)), 1))
        return logits


class Segmenter(nn.Module):
    """All branches at the finest resolution, side by side: (B, classes, H, W)."""

    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        total = sum(widths)
        self.head = nn.Sequential(
            nn.Conv2d(total, total, 1), nn.BatchNorm2d(total), nn.ReLU(), nn.Conv2d(total, classes, 1)
        )

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        finest = [maps[0], *(_upsample(x, maps[0], "bilinear") for x in maps[1:])]
        return _upsample(self.head(torch.cat(finest, 1)), image, "bilinear")


class HRNet(nn.Module):
    """Images (B, in_channels, H, W) to (B, classes), or to (B, classes, H, W) for segmentation."""

    def __init__(
        self, width: int, stem: int, modules: tuple[int, ...], blocks: int, in_channels: int, head: nn.Module
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(in_channels, stem, 3, 2), _conv(stem, stem, 3, 2))
        channels = [stem, *[stem * EXPANSION] * blocks]
        self.layer1 = nn.Sequential(*(Bottleneck(c, stem, 1) for c in channels[:-1]))
        widths = [channels[-1]]
        stages = []
        for i, count in enumerate(modules):
            wider = [width * 2**k for k in range(i + 2)]
            stages.append(Stage(widths, wider, count, blocks))
            widths = wider
        self.stages = nn.Sequential(*stages)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stages([self.layer1(self.stem(x))]), x)
        return y


def hrnet_w18(
    width: int = 18,
    stem: int = 64,
    modules: tuple[int, ...] = (1, 4, 3),
    blocks: int = 4,
    head: str = "classification",
    classes: int = 1000,
    in_channels: int = 3,
    head_width: int = 32,
    features: int = 2048,
    seed: int = 0,
) -> nn.Module:
    """HRNet-W18: (B, in_channels, H, W) to (B, classes), with `head="segmentation"` to (B, classes, H, W)."""
    if head not in ("classification", "segmentation"):
        raise UsageError(f"HRNet has a head for 'classification' or 'segmentation', not {head!r}")
    widths = [width * 2**k for k in range(len(modules) + 1)]

    def make() -> nn.Module:
        top: nn.Module = (
            Classifier(widths, head_width, features, classes)
            if head == "classification"
            else Segmenter(widths, classes)
        )
        return HRNet(width, stem, tuple(modules), blocks, in_channels, top)

    return seeded(make, seed)
