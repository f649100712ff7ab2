"""nnU-Net's own networks and its own trainer by plans, and MONAI's, where these packages are installed.

pip install nnunetv2 monai (dynamic-network-architectures, timm and torchvision come with the first)
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import unmeasured
from exactness import TOLERANCE, error, step
from torch import Tensor, nn

import rowtune

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "nnunet"


def network(kind: str, rank: int) -> nn.Module:
    """As nnU-Net's planner sets them up, but narrow."""
    unets = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet", reason="nnU-Net's networks are not installed"
    )
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"InstanceNorm{rank}d")
    blocks = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}[kind]
    torch.manual_seed(0)
    made: nn.Module = getattr(unets, kind)(
        input_channels=1, n_stages=4, features_per_stage=(4, 6, 8, 8), conv_op=conv, kernel_sizes=3,
        strides=(1, 2, 2, 2), **{blocks: (1, 2, 2, 2)}, num_classes=3, n_conv_per_stage_decoder=(2, 2, 1),
        conv_bias=True, norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    return made.double()


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("policy", ["rows", "checkpoint"])
def test_their_networks_with_deep_supervision(kind: str, rank: int, policy: str) -> None:
    model, x = network(kind, rank), torch.randn(2, 1, *[32, 16, 16][:rank], dtype=torch.float64)
    rows = {"band_rows": 8} if policy == "rows" else {}
    module = rowtune.apply(model, rowtune.uniform_plan(rowtune.trace(model, (x,)), policy, **rows))
    heads = module(x)
    assert [tuple(y.shape[2:]) for y in heads] == [tuple(s // d for s in x.shape[2:]) for d in (1, 2, 4)]

    def together(run: nn.Module) -> Tensor:
        return sum((y.square().sum() / 2**i for i, y in enumerate(run(x))), torch.zeros(()).double())

    plain = step(model, lambda: together(model), {"x": x.requires_grad_()})
    assert error(step(model, lambda: together(module), {"x": x}), plain) < TOLERANCE
    module.eval()
    module.decoder.deep_supervision = False  # as nnU-Net does to validate and to predict
    with torch.no_grad():
        assert torch.equal(module(x), model(x)) or torch.allclose(module(x), model(x), rtol=1e-10)


@pytest.mark.parametrize("inside", [False, True])
def test_dynunet_of_monai_with_deep_supervision(inside: bool) -> None:
    """It hands its heads on through a list, and out stacked: rows lie along another axis than the input's.
    `inside`: the loss is computed in bands."""
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    torch.manual_seed(0)
    model = nets.DynUNet(
        spatial_dims=3, in_channels=1, out_channels=2, kernel_size=[3] * 4, strides=[1, 2, 2, 2],
        upsample_kernel_size=[2] * 3, filters=[4, 6, 8, 8], deep_supervision=True, deep_supr_num=2,
    ).double()  # fmt: skip
    x = torch.randn(1, 1, 32, 16, 16, dtype=torch.float64, requires_grad=True)
    graph = rowtune.trace(model, (x,))
    module = rowtune.apply(model, rowtune.uniform_plan(graph, "rows", 8), "mse" if inside else None)
    target = torch.randn_like(model(x))

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, target)

    plain = step(model, lambda: loss(model(x)), {"x": x})
    ours = step(model, lambda: module(x, targets=target) if inside else loss(module(x)), {"x": x})
    assert error(ours, plain) < TOLERANCE


@pytest.fixture
def trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module, with a tiny data set that nnU-Net itself planned and preprocessed."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: examples/nnunet is not run")
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr("rowtune.tune.own.find", unmeasured.find)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        volumes(tmp_path / "raw" / "Dataset901_Tiny")
        api = importlib.import_module("nnunetv2.experiment_planning.plan_and_preprocess_api")
        api.extract_fingerprints([901], num_processes=1)
        api.plan_experiments([901])
        narrow(tmp_path / "preprocessed" / "Dataset901_Tiny" / "nnUNetPlans.json")
        api.preprocess([901], configurations=["3d_fullres"], num_processes=[1])
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # augments here, in no other process
        yield importlib.import_module("nnunet_trainer")
    sys.modules.pop("nnunet_trainer")


def volumes(folder: Path) -> None:
    itk = importlib.import_module("SimpleITK")
    made = torch.Generator().manual_seed(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(5):
        mask = torch.zeros(24, 24, 24, dtype=torch.uint8)
        mask[4 + i : 14 + i, 4:16, 6:18] = 1
        volume = torch.randn(mask.shape, generator=made) + 2 * mask
        itk.WriteImage(itk.GetImageFromArray(volume.numpy()), folder / "imagesTr" / f"t_{i:03}_0000.nii.gz")
        itk.WriteImage(itk.GetImageFromArray(mask.numpy()), folder / "labelsTr" / f"t_{i:03}.nii.gz")
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "cube": 1}}
    (folder / "dataset.json").write_text(json.dumps({**about, "numTraining": 5, "file_ending": ".nii.gz"}))


def narrow(path: Path) -> None:
    """A network of a few channels is quick."""
    plans = json.loads(path.read_text())
    features = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"]
    features[:] = [4, 6, 8, 8, 8, 8][: len(features)]
    path.write_text(json.dumps(plans))


def losses(module: Any, folder: Path, steps: int = 2) -> list[float]:
    """Of the first steps and of a validation, as nnU-Net takes them."""
    random.seed(0)
    torch.manual_seed(0)
    importlib.import_module("numpy").random.seed(0)
    data = folder / "preprocessed" / "Dataset901_Tiny"
    plans, about = (json.loads((data / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset"))
    plans["continue_training"] = False
    trainer = module.nnUNetTrainerRowtune(plans, "3d_fullres", 0, about, torch.device("cpu"))
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    found = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(steps)]
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        return [*found, float(trainer.validation_step(next(trainer.dataloader_val))["loss"])]


def test_nnunet_itself_trains_by_a_plan(
    trainers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.json"
    found = trainers.find("901", "3d_fullres", "90%", plan)
    assert any(segment.policy == "rows" for segment in found.plan.segments)
    monkeypatch.setenv("ROWTUNE_PLAN", str(plan))
    planned = losses(trainers, tmp_path)
    monkeypatch.setenv("ROWTUNE_PLAN", "")
    assert planned == pytest.approx(losses(trainers, tmp_path), rel=1e-4)
    monkeypatch.delenv("ROWTUNE_PLAN")
    with pytest.raises(RuntimeError, match="set ROWTUNE_PLAN"):
        losses(trainers, tmp_path)
