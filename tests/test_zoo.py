"""The zoo: sizes and names of the published networks, seeds, and a training step of a small variant each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rowtune.errors import UsageError
from rowtune.zoo import EXAMPLE_SHAPES, ZOO, build, example_shape

torch.set_num_threads(1)

SMALL: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "classes": 10},
    "deeplabv3plus": {"width": 4, "depths": (1, 1, 1, 2), "channels": 8, "low_channels": 4, "rates": (1, 2)},
    "densenet121": {"growth": 4, "depths": (1, 2, 1, 1), "width": 8, "classes": 10},
    "edsr": {"blocks": 2, "channels": 8},
    "efficientnet_v2_s": {"width": 0.1, "depths": (1, 2, 1, 2, 1, 1), "classes": 10},
    "hrnet_w18": {
        "width": 3, "stem": 4, "modules": (1, 1, 2), "blocks": 1, "classes": 10, "head_width": 2,
        "features": 16,
    },
    "mobilenet_v3_large": {"width": 0.1, "depths": (1, 2, 1, 1, 1, 1), "classes": 10},
    "per_pixel": {"layers": 3, "channels": 4},
    "resnet50": {"width": 4, "depths": (1, 1, 1, 1), "classes": 10},
    "unet": {"base": 4, "depth": 2},
    "unet3d": {"base": 4, "depth": 2, "in_channels": 3},
    "unet_bn": {"base": 4, "depth": 2, "up": "bilinear"},
    "vgg16": {"width": 2, "classes": 10},
    "vgg16_features": {"width": 2},
}  # fmt: skip

# Published counts (torchvision's for those it has, timm's for HRNet); EDSR's baseline for x2 is the paper's
# 1.37 M. nnU-Net's 31.2 M and DeepLabV3+ on ResNet-50's 39.8 M are published rounded only.
PARAMETERS = {
    "vgg16": 138_357_544,
    "resnet50": 25_557_032,
    "convnext_tiny": 28_589_128,
    "densenet121": 7_978_856,
    "efficientnet_v2_s": 21_458_488,
    "mobilenet_v3_large": 5_483_032,
    "hrnet_w18": 21_299_004,
    "unet3d": 31_193_248,
    "edsr": 1_369_859,
    "vgg16_features": 14_714_688,
    "unet": 31_031_810,
}


def test_tables_agree() -> None:
    assert set(ZOO) == set(EXAMPLE_SHAPES) == set(SMALL)


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_parameter_counts_of_variants() -> None:
    """The original of DeepLabV3+ has a norm after the pooling; HRNetV2-W18's segmenter is 9.6 M."""
    with torch.device("meta"):
        deeplab = build("deeplabv3plus", pool_norm=True)
        segmenter = build("hrnet_w18", head="segmentation", classes=19)
    assert sum(p.numel() for p in deeplab.parameters()) == 39_761_845
    assert round(sum(p.numel() for p in segmenter.parameters()) / 1e6, 1) == 9.6


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vgg16", ["features.0.weight", "features.28.bias", "classifier.0.weight", "classifier.6.bias"]),
        ("resnet50", ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.downsample.1.running_var"]),
        ("resnet50", ["layer4.2.bn3.num_batches_tracked", "fc.bias"]),
        ("convnext_tiny", ["features.0.0.weight", "features.1.0.layer_scale", "features.1.0.block.5.bias"]),
        ("convnext_tiny", ["features.2.1.weight", "classifier.2.weight"]),
        ("densenet121", ["features.denseblock4.denselayer16.conv2.weight", "features.transition3.norm.bias"]),
        ("densenet121", ["features.conv0.weight", "features.norm5.running_mean", "classifier.weight"]),
        ("efficientnet_v2_s", ["features.4.0.block.2.fc1.weight", "features.7.1.running_var"]),
        ("efficientnet_v2_s", ["features.1.0.block.0.0.weight", "classifier.1.bias"]),
        ("mobilenet_v3_large", ["features.4.block.2.fc2.bias", "features.16.0.weight", "classifier.3.bias"]),
    ],
)
def test_names_as_in_torchvision(name: str, keys: list[str]) -> None:
    with torch.device("meta"):
        assert set(keys) <= set(build(name).state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_small_variant_trains(name: str) -> None:
    model = build(name, **SMALL[name])
    assert model.training
    x = torch.rand(2, 3, *((64, 64) if len(example_shape(name)) == 4 else (16, 8, 12)))
    y = model(x)
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    assert y.detach().std() > 0


@pytest.mark.parametrize("name", SMALL)
def test_seed_fixes_the_weights_and_leaves_the_global_generator(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again = build(name, **SMALL[name], seed=3), build(name, **SMALL[name], seed=3)
    other = build(name, **SMALL[name], seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_edsr_scales(scale: int) -> None:
    y = build("edsr", blocks=1, channels=4, scale=scale)(torch.rand(1, 3, 8, 10))
    assert y.shape == (1, 3, 8 * scale, 10 * scale)


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_unet_keeps_height_and_width(up: str) -> None:
    y = build("unet", base=2, depth=3, classes=5, up=up)(torch.rand(1, 3, 16, 24))
    assert y.shape == (1, 5, 16, 24)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_tiny", {"layer_scale": 1.0}),
        ("efficientnet_v2_s", {"depths": (3, 3, 2, 2, 2, 2), "dropout": 0.0}),
    ],
)
def test_stochastic_depth_is_for_training_only(name: str, options: dict[str, Any]) -> None:
    model = build(name, **{**SMALL[name], **options}, stochastic_depth=0.5)
    x = torch.rand(4, 3, 64, 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(("name", "shape"), [("deeplabv3plus", (45, 67)), ("hrnet_w18", (45, 67))])
def test_segmenters_keep_any_height_and_width(name: str, shape: tuple[int, int]) -> None:
    options = {"head": "segmentation"} if name == "hrnet_w18" else {}
    y = build(name, **{**SMALL[name], **options, "classes": 5})(torch.rand(1, 3, *shape))
    assert y.shape == (1, 5, *shape)


def test_deeplab_dilates_its_last_stage() -> None:
    with torch.device("meta"):
        maps = build("deeplabv3plus").backbone(torch.empty(2, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (4, 6)]


def test_example_shape() -> None:
    assert example_shape("vgg16") == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "call",
    [
        lambda: build("vgg17"),
        lambda: example_shape("vgg17"),
        lambda: build("vgg16", depth=3),
        lambda: build("edsr", scale=5),
        lambda: build("unet", up="nearest"),
        lambda: build("hrnet_w18", head="detection"),
    ],
)
def test_user_errors(call: Any) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
