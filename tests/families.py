"""Small blocks of the families of CNNs that people train; family_table.py gives them sizes.

Norms are frozen (or of the kind that does not mix rows), and there is no global pooling: a whole block is
meant to be one stretch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(c: int, out: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, k, padding=options.pop("padding", k // 2), **options)


def frozen(c: int) -> nn.Module:
    """Batch norm with fixed statistics, in a network that is in train mode."""
    norm = nn.BatchNorm2d(c)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    norm.eval()
    norm.train = lambda mode=True: norm  # type: ignore[method-assign, assignment]
    return norm


class After(nn.Module):
    """A function of a convolution's output, and a convolution after it: rows have to go through."""

    def __init__(self, function: Callable[[Tensor], Tensor], c: int = 4, out: int = 4, rank: int = 2) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.before, self.after = kind(3, c, 3, padding=1), kind(out, 2, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


class Residual(nn.Module):
    def __init__(self, *body: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.body, self.scale = nn.Sequential(*body), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


class Branches(nn.Module):
    """Inception: branches side by side, joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in self.branches], 1)


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: half of the channels go through, then all are shuffled by view and transpose."""

    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.branch = nn.Sequential(
            conv(h, h, 1),
            frozen(h),
            nn.ReLU(inplace=True),
            conv(h, h, groups=h),
            conv(h, h, 1),
            nn.ReLU(True),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        y = torch.cat((kept, self.branch(worked)), dim=1)
        b, c, h, w = y.size()
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class Focus(nn.Module):
    """YOLOv5's stem: every second row and column, four times, along the channels."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.conv = conv(4 * c, out)

    def forward(self, x: Tensor) -> Tensor:
        quarters = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.conv(torch.cat(quarters, 1))


class CSP(nn.Module):
    """A cross-stage partial block with one bottleneck."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.second, self.last = conv(c, c // 2, 1), conv(c, c // 2, 1), conv(c, c, 1)
        self.inner = Residual(conv(c // 2, c // 2, 1), nn.SiLU(), conv(c // 2, c // 2), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.last(torch.cat((self.inner(self.first(x)), self.second(x)), 1)))


class SPPF(nn.Module):
    """The same max pool three times, all four maps along the channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool, self.last = nn.MaxPool2d(5, 1, 2), conv(4 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = [x]
        for _ in range(3):
            y.append(self.pool(y[-1]))
        return self.last(torch.cat(y, 1))


class LayerNorm2d(nn.Module):
    """Over channels, written by hand as ConvNeXt's and NAFNet's authors do."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class SimpleGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b


class RRDB(nn.Module):
    """ESRGAN: a densely connected residual block, scaled."""

    def __init__(self, c: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(c + i * growth, growth if i < 3 else c) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.convs[:-1]:
            maps.append(F.leaky_relu(layer(torch.cat(maps, 1)), 0.2, inplace=True))
        return x + 0.2 * self.convs[-1](torch.cat(maps, 1))


class AttentionGate(nn.Module):
    """Attention U-Net: a coarse signal decides, through a sigmoid at half size, what of a skip goes on."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.coarse = conv(c, c, stride=2)
        self.theta, self.phi, self.psi = conv(c, c, 2, stride=2, padding=0), conv(c, c, 1), conv(c, 1, 1)
        self.last = conv(2 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        signal = self.coarse(x)
        mixed = F.relu(
            self.theta(x) + F.interpolate(self.phi(signal), size=signal.shape[2:], mode="bilinear")
        )
        gate = F.interpolate(torch.sigmoid(self.psi(mixed)), size=x.shape[2:], mode="bilinear")
        up = F.interpolate(signal, size=x.shape[2:], mode="bilinear")
        return self.last(torch.cat([gate.expand_as(x) * x, up], 1))


class SpatialAttention(nn.Module):
    """CBAM: mean and maximum over the channels decide each pixel's weight."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.first = conv(2, 1, 7), conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))  # many ties at zero, where max and amax differ
        most, _ = torch.max(x, dim=1, keepdim=True)
        return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), most], 1)))


class UNetPlusPlus(nn.Module):
    """Nested skips: every node reads all earlier ones of its level."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.x00, self.x10, self.x20 = conv(3, c), conv(c, c), conv(c, c)
        self.x01, self.x11, self.x02 = conv(2 * c, c), conv(2 * c, c), conv(3 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        a = F.relu(self.x00(x))
        b = F.relu(self.x10(F.max_pool2d(a, 2)))
        c = F.relu(self.x20(F.max_pool2d(b, 2)))
        d = F.relu(self.x01(torch.cat([a, up(b)], 1)))
        e = F.relu(self.x11(torch.cat([b, up(c)], 1)))
        return self.x02(torch.cat([a, d, up(e)], 1))


class MLPDecoder(nn.Module):
    """SegFormer: every scale through a linear layer on flattened pixels, then to one size."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, c, stride=2), conv(c, c, stride=2)])
        self.linear = nn.ModuleList([nn.Linear(c, c), nn.Linear(c, c)])
        self.fuse = conv(2 * c, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for down, linear in zip(self.down, self.linear, strict=True):
            x = F.gelu(down(x))
            tokens = linear(x.flatten(2).transpose(1, 2))
            y = tokens.permute(0, 2, 1).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
            size = found[0].shape[2:] if found else y.shape[2:]
            found.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(found[::-1], 1))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips: (B, C, T), bands of time."""

    def __init__(self, c: int, layers: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, c, 1), nn.Conv1d(c, 2, 1)
        self.gates = nn.ModuleList(nn.Conv1d(c, 2 * c, 2, dilation=2**i) for i in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0.0
        for gate, skip in zip(self.gates, self.skips, strict=True):
            y = gate(F.pad(x, (gate.dilation[0], 0)))
            a, b = y.split(y.shape[1] // 2, dim=1)
            y = torch.tanh(a) * torch.sigmoid(b)
            x, total = x + y, total + skip(y)
        return self.last(F.relu(total))


class Chomp(nn.Module):
    """A TCN block: padded on both sides, then cut at the end."""

    def __init__(self, c: int) -> None:
        super().__init__()
        wn = nn.utils.parametrizations.weight_norm
        self.a, self.b = (
            wn(nn.Conv1d(3, c, 3, padding=4, dilation=2)),
            wn(nn.Conv1d(c, 3, 3, padding=8, dilation=4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)[:, :, :-4].contiguous())
        return F.relu(F.relu(self.b(y)[:, :, :-8].contiguous()) + x)


class StandardConv(nn.Conv2d):
    """Weight standardisation, by var_mean of the weight alone."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) * torch.rsqrt(var + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledStandardConv(nn.Conv2d):
    """NFNets': the same through batch norm of the weight, with a gain."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, (self.gain * 0.2).view(-1), training=True, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class AxialAttention(nn.Module):
    """Attention along the width, each row within itself."""

    def __init__(self, c: int, built_in: bool) -> None:
        super().__init__()
        self.qkv, self.last, self.built_in = conv(3, 3 * c), conv(c, 2), built_in

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).permute(0, 2, 3, 1).chunk(3, dim=-1)
        if self.built_in:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.last(y.permute(0, 3, 1, 2))


class CoordConv(nn.Module):
    """Two more channels that say where a pixel is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(b, 1, h, w)
        columns = torch.linspace(-1, 1, w, dtype=x.dtype).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.conv(torch.cat([x, rows, columns], 1))


class FlatConv(nn.Module):
    """A 1x1 convolution written as a 1-D one on flattened pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.flat = conv(3, 4), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x * self.flat(x.flatten(2)).view_as(x)


class Einsums(nn.Module):
    """Mixing channels by einsum, by a matrix product on flattened pixels, and by tensordot."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = conv(3, c)
        self.w = nn.ParameterList(nn.Parameter(torch.randn(c, c)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = torch.einsum("bchw,dc->bdhw", x, self.w[0]) + torch.einsum(
            "b c ..., c d -> b d ...", x, self.w[1]
        )
        y = y + torch.matmul(self.w[2], y.flatten(2)).view_as(y)
        y = y + torch.bmm(self.w[3].expand(x.shape[0], -1, -1), y.flatten(2)).unflatten(2, y.shape[2:])
        y = torch.tensordot(y, self.w[0], dims=([1], [1])).movedim(-1, 1)
        return y * torch.einsum("bchw,bchw->bhw", y, x).unsqueeze(1)
