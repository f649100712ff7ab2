"""What networks of inverted bottlenecks share (MobileNet, EfficientNet): norm after convolution, gates."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Act = Callable[[], nn.Module] | None


def conv_norm(
    channels: int,
    out: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    act: Act = nn.ReLU,
    eps: float = 1e-3,
    momentum: float = 0.1,
) -> nn.Sequential:
    """Convolution, batch norm and activation: (B, channels, H, W) to (B, out, H/stride, W/stride)."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=eps, momentum=momentum),
    ]
    return nn.Sequential(*layers, *([act()] if act is not None else []))


class SqueezeExcite(nn.Module):
    """x times a gate per channel made from the means of all channels (Hu et al., 2018)."""

    def __init__(self, channels: int, squeezed: int, act: Act = nn.ReLU, gate: Act = nn.Sigmoid) -> None:
        super().__init__()
        assert act is not None and gate is not None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = act()
        self.scale_activation = gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        y: Tensor = scale * x
        return y


def drop_branch(branch: Tensor, drop: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al., 2016): each image's branch is left out with probability `drop`."""
    if drop == 0.0 or not training:
        return branch
    keep = 1.0 - drop
    return branch * (branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(keep) / keep)


def make_divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by` that is not more than a tenth smaller; at least `by`."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded
