"""Seeded weights, drawn once.

Building a layer normally draws its weights with the global generator, which takes seconds for VGG-16 and
disturbs whoever relies on that generator. Here the network is built without storage and filled afterwards,
from a generator of its own; always on the CPU, so that a seed means the same weights on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

Std = Callable[[float], float]

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def he(fan_in: float) -> float:
    """Keeps the variance through convolution + ReLU; what norm-free chains need to train at all."""
    return math.sqrt(2.0 / fan_in)


def small(fan_in: float) -> float:
    """PyTorch's default variance; keeps a sum of residual branches from growing block by block."""
    return math.sqrt(1.0 / (3.0 * fan_in))


def seeded(make: Callable[[], nn.Module], seed: int, std: Std = he) -> nn.Module:
    """`make()` with weights from `seed` on the current default device, in train mode."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = make()
    if device.type == "meta":
        return model.train()
    model.to_empty(device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, std, generator)
    return model.to(device).train()


def _fill(module: nn.Module, std: Std, generator: torch.Generator) -> None:
    if isinstance(module, _Conv | _Transposed | nn.Linear):
        # Uniform with that deviation: twice as fast to draw as a normal distribution, which counts in VGG.
        bound = math.sqrt(3.0) * std(_fan_in(module))
        module.weight.uniform_(-bound, bound, generator=generator)
        if module.bias is not None:
            module.bias.zero_()
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()


def _fan_in(module: _Conv | _Transposed | nn.Linear) -> float:
    """Input values that one output value sums over."""
    if isinstance(module, _Transposed):
        taps = math.prod(module.kernel_size) / math.prod(module.stride)
        return module.in_channels / module.groups * taps
    return module.weight[0].numel()
