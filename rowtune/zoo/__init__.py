"""Real architectures in plain torch: what the tests, the benchmarks and a first try run on.

Every factory has width and depth arguments, so that the same code gives the full-size network and a
test-sized one, and a `seed` that fixes the weights without touching torch's global generator. Models come
in train mode. Under `torch.device("meta")` they come without storage, for counting and tracing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from rowtune.errors import UsageError, meant
from rowtune.zoo.convnext import convnext_tiny
from rowtune.zoo.deeplab import deeplabv3plus
from rowtune.zoo.densenet import densenet121
from rowtune.zoo.edsr import edsr
from rowtune.zoo.efficientnet import efficientnet_v2_s
from rowtune.zoo.hrnet import hrnet_w18
from rowtune.zoo.mobilenet import mobilenet_v3_large
from rowtune.zoo.per_pixel import per_pixel
from rowtune.zoo.resnet import resnet50
from rowtune.zoo.unet import unet, unet_bn
from rowtune.zoo.unet3d import unet3d
from rowtune.zoo.vgg import vgg16, vgg16_features

ZOO: dict[str, Callable[..., nn.Module]] = {
    "convnext_tiny": convnext_tiny,
    "deeplabv3plus": deeplabv3plus,
    "densenet121": densenet121,
    "edsr": edsr,
    "efficientnet_v2_s": efficientnet_v2_s,
    "hrnet_w18": hrnet_w18,
    "mobilenet_v3_large": mobilenet_v3_large,
    "per_pixel": per_pixel,
    "resnet50": resnet50,
    "unet": unet,
    "unet3d": unet3d,
    "unet_bn": unet_bn,
    "vgg16": vgg16,
    "vgg16_features": vgg16_features,
}

EXAMPLE_SHAPES: dict[str, tuple[int, ...]] = {
    "convnext_tiny": (1, 3, 224, 224),
    "deeplabv3plus": (1, 3, 512, 512),
    "densenet121": (1, 3, 224, 224),
    "edsr": (1, 3, 192, 192),
    "efficientnet_v2_s": (1, 3, 384, 384),
    "hrnet_w18": (1, 3, 224, 224),
    "mobilenet_v3_large": (1, 3, 224, 224),
    "per_pixel": (1, 3, 1024, 1024),
    "resnet50": (1, 3, 224, 224),
    "unet": (1, 3, 512, 512),
    "unet3d": (1, 1, 64, 64, 64),
    "unet_bn": (1, 3, 512, 512),
    "vgg16": (1, 3, 224, 224),
    "vgg16_features": (1, 3, 1024, 1024),
}


def build(name: str, **kwargs: Any) -> nn.Module:
    """The architecture `name` in train mode; UsageError for an unknown name or argument."""
    factory = _find(name)
    signature = inspect.signature(factory)
    unknown = sorted(set(kwargs) - set(signature.parameters))
    if unknown:
        raise UsageError(
            f"{name} has no argument {', '.join(unknown)}; it takes {', '.join(signature.parameters)}"
            f"{meant(unknown[0], signature.parameters)}"
        )
    return factory(**kwargs)


def example_shape(name: str) -> tuple[int, ...]:
    """The default input shape of `name`, batch of one, e.g. (1, 3, 224, 224)."""
    _find(name)
    return EXAMPLE_SHAPES[name]


def _find(name: str) -> Callable[..., nn.Module]:
    if name not in ZOO:
        raise UsageError(
            f"no architecture named {name!r} in the zoo; it has {', '.join(sorted(ZOO))}{meant(name, ZOO)}"
        )
    return ZOO[name]
