"""How exactness is measured everywhere (docs/sweep.md, Exactness), and the networks it is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-10


@dataclass
class Step:
    """What one forward and backward gives."""

    output: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def step(model: nn.Module, run: Callable[[], Tensor], inputs: dict[str, Tensor]) -> Step:
    """Gradients for a fixed random gradient of the output (or for a scalar loss)."""
    model.zero_grad(set_to_none=True)
    for t in inputs.values():
        t.grad = None
    out = run()
    seed = (
        torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
        if out.dim()
        else None
    )
    out.backward(seed)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    gradients |= {n: t.grad.clone() for n, t in inputs.items() if t.grad is not None}
    return Step(out.detach().clone(), gradients, {n: b.clone() for n, b in model.named_buffers()})


def error(ours: Step, plain: Step) -> float:
    """The largest error of output, gradients and buffers by the project's measure."""
    assert ours.gradients.keys() == plain.gradients.keys()
    assert ours.output.shape == plain.output.shape
    worst = _ratio(ours.output, plain.output)
    largest = max((float(g.abs().max()) for g in plain.gradients.values() if g.numel()), default=0.0)
    for name, want in plain.gradients.items():
        if want.numel() and largest:
            scale = max(float(want.abs().max()), 1e-3 * largest)
            worst = max(worst, float((ours.gradients[name] - want).abs().max()) / scale)
    for name, want_buffer in plain.buffers.items():
        worst = max(worst, _ratio(ours.buffers[name], want_buffer))
    return worst


def _ratio(a: Tensor, b: Tensor) -> float:
    if not b.numel():
        return 0.0
    scale = float(b.double().abs().max())
    return float((a.double() - b.double()).abs().max()) / (scale or 1.0)


class RandomNet(nn.Module):
    """A small DAG from a drawn list of layers: each reads an earlier feature map of its choice; maps of equal
    size may be joined at the end."""

    def __init__(self, layers: list[tuple[str, dict[str, Any], int]], channels: int, rank: int = 2) -> None:
        super().__init__()
        self.rank = rank
        self.layers = layers
        made = [make_layer(kind, options, channels, rank) for kind, options, _ in layers]
        self.ops = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for (_, _, source), op in zip(self.layers, self.ops, strict=True):
            y = op(maps[max(0, len(maps) - 1 - source)])
            twins = [m for m in maps[1:] if m.shape == y.shape]
            if twins and source % 2:
                y = y + twins[0]
            maps.append(y)
        last = maps[-1]
        same = [m for m in maps[:-1] if m.shape[2:] == last.shape[2:]]
        return torch.cat([last, *same[-1:]], 1)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ChannelNorm(nn.Module):
    """Layer norm over channels by permute, then a linear layer, as ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(1, -1)
        return torch.nn.functional.gelu(self.linear(self.norm(y))).movedim(-1, 1)


def make_layer(kind: str, o: dict[str, Any], c: int, rank: int) -> nn.Module:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
    maxpool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[rank]
    avgpool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[rank]
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]
    F = torch.nn.functional
    if kind == "conv":
        layer: nn.Module = conv(c, c, o["k"], o["s"], o["p"], o["d"], groups=o["g"])
        return nn.Sequential(layer, nn.Tanh())
    if kind == "same":
        return conv(c, c, o["k"], padding="same", dilation=o["d"])
    if kind == "transposed":
        return up(c, c, o["k"], o["s"], min(o["p"], o["k"] - 1), min(o["op"], o["s"] - 1), groups=o["g"])
    if kind == "max":
        return maxpool(o["k"], o["s"], min(o["p"], o["k"] // 2), ceil_mode=o["ceil"])
    if kind == "avg":
        return avgpool(
            o["k"], o["s"], min(o["p"], o["k"] // 2), ceil_mode=o["ceil"], count_include_pad=o["count"]
        )
    if kind == "nearest":
        return Lambda(lambda x: F.interpolate(x, scale_factor=o["scale"], mode="nearest"))
    if kind == "bilinear":
        return Lambda(
            lambda x: F.interpolate(x, scale_factor=o["scale"], mode=linear, align_corners=o["corners"])
        )
    if kind == "size":
        return Lambda(
            lambda x: F.interpolate(
                x, size=[s + 1 for s in x.shape[2:]], mode=linear, align_corners=o["corners"]
            )
        )
    if kind == "pad":
        return Lambda(lambda x: F.pad(x, [o["a"], o["b"]] * rank, mode=o["mode"]))
    if kind == "shuffle":
        return nn.Sequential(conv(c, 4 * c, 1), nn.PixelShuffle(2)) if rank == 2 else nn.Identity()
    if kind == "unshuffle":
        if rank != 2:
            return nn.Identity()
        crop = Lambda(lambda x: x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2])
        return nn.Sequential(crop, nn.PixelUnshuffle(2), conv(4 * c, c, 1))
    if kind == "norm":
        return ChannelNorm(c)
    if kind == "crop":
        return Lambda(lambda x: x[:, :, 1:] if x.shape[2] > 2 else x)
    if kind == "chunk":
        return Lambda(lambda x: torch.cat([t * 0.5 for t in x.chunk(2, 1)][::-1], 1) * torch.sigmoid(x))
    assert kind == "batchnorm"
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](c).eval()
