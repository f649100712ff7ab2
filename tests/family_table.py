"""What test_coverage.py bands: name -> (a factory of a block, an input shape)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from families import (
    CSP,
    RRDB,
    SPPF,
    After,
    AttentionGate,
    AxialAttention,
    Branches,
    Chomp,
    CoordConv,
    Einsums,
    FlatConv,
    Focus,
    LayerNorm2d,
    MLPDecoder,
    Residual,
    ScaledStandardConv,
    ShuffleUnit,
    SimpleGate,
    SpatialAttention,
    StandardConv,
    UNetPlusPlus,
    WaveNet,
    conv,
    frozen,
)
from torch import Tensor, nn

Factory = Callable[[], nn.Module]
IMAGE = (2, 3, 12, 7)


def _stereo(x: Tensor) -> Tensor:
    """Two views stacked on a new axis, compared, and summed up again."""
    both = torch.stack([x, x.roll(1, 3), x.flip(3)], dim=1)
    return (both * torch.softmax(both, dim=1)).sum(1)


def _window_tokens(x: Tensor) -> Tensor:
    """Split rows and columns in windows of 3 x 2 and back (a single image: the batch stays first)."""
    b, c, h, w = x.shape
    y = x.view(b, c, h // 3, 3, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 6, c)
    y = y * torch.softmax(y.mean(-1, keepdim=True), 2)
    return y.view(b, h // 3, w // 2, 3, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def _shuffle_by_view(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def _space_to_depth(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def _nonlinear(x: Tensor) -> Tensor:
    for f in (F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.softplus, F.elu, F.celu, F.selu, F.relu6,
              F.leaky_relu, F.logsigmoid, F.softsign, F.tanhshrink, F.softshrink, torch.erf):  # fmt: skip
        x = x + f(x)
    return F.glu(torch.cat([x, torch.clamp(x, -1, 1)], 1), dim=1)


def _picks(x: Tensor) -> Tensor:
    """Channels by list, repeated, sorted; norms of pixels."""
    y = torch.cat([x[:, [2, 0, 1]], x.index_select(1, torch.tensor([3])), x.topk(2, dim=1)[0]], 1)
    y = y[:, :4] * y.repeat(1, 2, 1, 1)[:, 4:8] + y.repeat_interleave(2, dim=1)[:, :4]
    return F.normalize(y, dim=1) + torch.logsumexp(y, 1, keepdim=True) + y.sort(1).values.cumsum(1)


def _halves(x: Tensor) -> Tensor:
    """Upper half times lower half: the same rows of the output read rows far apart."""
    upper, lower = x.split(x.shape[2] // 2, dim=2)
    left, right = torch.tensor_split(upper * lower.flip(1), [3], dim=3)
    return torch.cat([right, left], 3)


def _res2net(x: Tensor) -> Tensor:
    """Groups of channels, each added to the next after a pool of its own."""
    first, *others = x.unbind(1)
    done = [first]
    for group in others:
        done.append(group + F.avg_pool2d(done[-1].unsqueeze(1), 3, 1, 1).squeeze(1))
    return torch.stack(done, dim=1)


def _involution(x: Tensor) -> Tensor:
    """A kernel for every pixel, made from its channels (here by a fixed rule), on its patch."""
    b, c, h, w = x.shape
    kernel = x.repeat(1, 3, 1, 1)[:, :9].tanh().unsqueeze(1)
    return (kernel * F.unfold(x, 3, 1, 1).reshape(b, c, 9, h, w)).sum(dim=2)


def _both_parts(x: Tensor) -> Tensor:
    """Values and indices of the same operator, both read."""
    values, where = x.max(1, keepdim=True)
    return values * torch.sin(x).gather(1, where) + x.min(dim=1, keepdim=True).values


def _carafe(x: Tensor) -> Tensor:
    """Content-aware upsampling: patches, enlarged, weighed by what a pixel shuffle gives."""
    b, c, h, w = x.shape
    weight = torch.softmax(F.pixel_shuffle(x.repeat(1, 9, 1, 1), 2), 1)
    patches = F.unfold(x, 3, padding=1).view(b, c * 9, h, w)
    near = F.interpolate(patches, scale_factor=2, mode="nearest").view(b, c, 9, 2 * h, 2 * w)
    return (near * weight.unsqueeze(1)).sum(2)


def _local_attention(x: Tensor) -> Tensor:
    """Each pixel looks at the 9 around it (F.unfold), with strides and dilation to make it hard."""
    b, c, h, w = x.shape
    near = F.unfold(x, 3, padding=1).view(b, c, 9, h, w)
    weight = torch.softmax((near * x.unsqueeze(2)).sum(1, keepdim=True), dim=2)
    return (near * weight).sum(2)


def _folded(x: Tensor) -> Tensor:
    """Overlapping patches, worked on, and added up again."""
    options: dict[str, Any] = {"kernel_size": (3, 2), "dilation": (2, 1), "padding": (2, 1), "stride": (3, 2)}
    return F.fold(torch.tanh(F.unfold(x, **options)), x.shape[2:], **options)


def _resized(mode: str, scale: float, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, scale_factor=scale, mode=mode, **options)


FAMILIES: dict[str, tuple[Factory, tuple[int, ...]]] = {
    "shufflenet": (lambda: nn.Sequential(conv(3, 4), ShuffleUnit(4), ShuffleUnit(4)), IMAGE),
    "channel_shuffle": (lambda: After(lambda x: F.channel_shuffle(x, 2)), IMAGE),
    "yolo": (
        lambda: nn.Sequential(Focus(3, 4), CSP(4), SPPF(4), nn.Upsample(scale_factor=2)),
        (2, 3, 16, 10),
    ),
    "esrgan": (lambda: nn.Sequential(conv(3, 4), Residual(RRDB(4, 2), RRDB(4, 2), scale=0.2)), IMAGE),
    "rcan": (
        lambda: nn.Sequential(
            conv(3, 4), Residual(Residual(conv(4, 4), nn.ReLU(), conv(4, 4)), conv(4, 4)), conv(4, 16),
            nn.PixelShuffle(2), conv(4, 3),
        ),
        IMAGE,
    ),
    "espcn": (
        lambda: nn.Sequential(
            conv(3, 6, 5), nn.Tanh(), conv(6, 4), nn.Tanh(), conv(4, 27), nn.PixelShuffle(3)
        ),
        IMAGE,
    ),
    "dncnn": (
        lambda: Residual(
            conv(3, 4), nn.ReLU(True), conv(4, 4, bias=False), frozen(4), nn.ReLU(True), conv(4, 3)
        ),
        IMAGE,
    ),
    "nafnet": (
        lambda: nn.Sequential(
            conv(3, 4),
            Residual(LayerNorm2d(4), conv(4, 8, 1), conv(8, 8, groups=8), SimpleGate(), conv(4, 4, 1)),
            conv(4, 8, 2, stride=2, padding=0),
            Residual(LayerNorm2d(8), conv(8, 16, 1), SimpleGate(), conv(8, 8, 1)),
            conv(8, 16, 1), nn.PixelShuffle(2),
        ),
        (2, 3, 12, 8),
    ),
    "attention_unet": (lambda: nn.Sequential(conv(3, 4), AttentionGate(4)), (2, 3, 14, 8)),
    "cbam": (lambda: nn.Sequential(conv(3, 4), SpatialAttention(4)), IMAGE),
    "unet++": (lambda: UNetPlusPlus(2), (2, 3, 16, 8)),
    "inception": (
        lambda: Branches(
            conv(3, 2, 1), nn.Sequential(conv(3, 2, 1), conv(2, 2, 5)),
            nn.Sequential(nn.Conv2d(3, 2, (1, 7), padding=(0, 3)), nn.Conv2d(2, 2, (7, 1), padding=(3, 0))),
            nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv(3, 2, 1)),
            nn.MaxPool2d(3, 1, 1),
        ),
        IMAGE,
    ),
    "segformer_decoder": (lambda: MLPDecoder(4), (2, 3, 17, 11)),
    "wavenet": (lambda: WaveNet(4, 4), (2, 3, 40)),
    "tcn": (lambda: Chomp(4), (2, 3, 30)),
    "alexnet_lrn": (lambda: After(lambda x: F.local_response_norm(F.relu(x), 3)), IMAGE),
    "lrn_3d": (lambda: After(lambda x: F.local_response_norm(x, 3), rank=3), (2, 3, 8, 5, 4)),
    "weight_standardised": (
        lambda: nn.Sequential(StandardConv(3, 4, 3, padding=1), nn.ReLU(), conv(4, 2)),
        IMAGE,
    ),
    "nfnet": (lambda: nn.Sequential(ScaledStandardConv(3, 4, 3, padding=1), nn.GELU(), conv(4, 2)), IMAGE),
    "axial_attention": (lambda: AxialAttention(4, built_in=False), IMAGE),
    "axial_attention_fused": (lambda: AxialAttention(4, built_in=True), IMAGE),
    "coordconv": (CoordConv, IMAGE),
    "einsum": (lambda: Einsums(4), IMAGE),
    "stereo": (lambda: After(_stereo), IMAGE),
    "windows": (lambda: After(_window_tokens), (2, 3, 12, 6)),
    "pixel_shuffle_by_view": (lambda: After(_shuffle_by_view, 8, 2), IMAGE),
    "space_to_depth_by_view": (lambda: After(_space_to_depth, 2, 8), (2, 3, 12, 6)),
    "pixel_unshuffle": (lambda: After(lambda x: F.pixel_unshuffle(x, 2), 2, 8), (2, 3, 12, 6)),
    "nonlinear": (lambda: After(_nonlinear), IMAGE),
    "prelu": (lambda: nn.Sequential(conv(3, 4), nn.PReLU(4), conv(4, 2), nn.PReLU()), IMAGE),
    "maxout": (lambda: After(lambda x: x.view(x.shape[0], 2, 2, *x.shape[2:]).max(2)[0], 4, 2), IMAGE),
    "picks": (lambda: After(_picks), IMAGE),
    "casts": (lambda: After(lambda x: x.to(torch.float64) * (x > 0).to(x.dtype).type_as(x)), IMAGE),
    "cosine": (lambda: After(lambda x: x * F.cosine_similarity(x, x.flip(1), dim=1).unsqueeze(1)), IMAGE),
    "softmax": (lambda: After(lambda x: x.softmax(1) * F.log_softmax(x, 1)), IMAGE),
    "circular_width": (lambda: After(lambda x: F.pad(x, (2, 1, 0, 0), mode="circular")), IMAGE),
    "flattened_conv": (FlatConv, IMAGE),
    "row_repeat": (lambda: After(lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, dim=3)), IMAGE),
    "lp_pool": (lambda: After(lambda x: F.lp_pool2d(x, 2, 2)), IMAGE),
    "halves": (lambda: After(_halves), IMAGE),
    "res2net": (lambda: After(_res2net), IMAGE),
    "involution": (lambda: After(_involution), IMAGE),
    "both_parts": (lambda: After(_both_parts, 4, 1), IMAGE),
    "carafe": (lambda: After(_carafe), (2, 3, 9, 5)),
    "local_attention": (lambda: After(_local_attention), IMAGE),
    "fold": (lambda: After(_folded), (2, 3, 13, 7)),
    "fold_disjoint": (
        lambda: After(lambda x: F.fold(F.unfold(x, 2, stride=3), x.shape[2:], 2, stride=3)),
        IMAGE,
    ),
    "tensor_unfold": (lambda: After(lambda x: x.unfold(2, 3, 2).unfold(3, 2, 2).amax((-1, -2))), IMAGE),
    "pool_values": (lambda: After(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0]), IMAGE),
    "pool_1d_causal": (lambda: After(lambda x: F.avg_pool1d(F.pad(x, (2, 0)), 3, 1), rank=1), (2, 3, 25)),
    "bicubic": (lambda: After(_resized("bicubic", 2)), IMAGE),
    "bicubic_odd": (lambda: After(_resized("bicubic", 1.4)), IMAGE),
    "bicubic_corners": (lambda: After(_resized("bicubic", 0.6, align_corners=True)), IMAGE),
    "bicubic_antialias": (lambda: After(_resized("bicubic", 0.45, antialias=True)), (2, 3, 23, 17)),
    "bilinear_antialias": (lambda: After(_resized("bilinear", 0.3, antialias=True)), (2, 3, 23, 17)),
    "bilinear_antialias_up": (lambda: After(_resized("bilinear", 1.7, antialias=True)), IMAGE),
    "bilinear_slightly_larger": (lambda: After(_resized("bilinear", 1.1)), (2, 3, 23, 7)),
    "nearest_exact": (lambda: After(_resized("nearest-exact", 1.6)), IMAGE),
    "nearest_exact_double": (lambda: After(_resized("nearest-exact", 2)), IMAGE),
    "nearest_exact_3d": (lambda: After(_resized("nearest-exact", 0.6), rank=3), (2, 3, 9, 5, 4)),
}  # fmt: skip


def family(name: str) -> nn.Module:
    factory, _ = FAMILIES[name]
    torch.manual_seed(7)
    return factory().double().train()
