"""nnU-Net with a plan: its own trainer, with one method changed.

nnU-Net's trainers make their network in `build_network_architecture`. Patches, augmentation, deep
supervision, its loss, checkpoints and inference are theirs and do not know of the plan. Search once for a
configuration that nnU-Net has planned and preprocessed, then train:

    python examples/nnunet/nnunet_trainer.py 901 3d_fullres --budget 8GB --out plan.json
    export ROWTUNE_PLAN=$PWD/plan.json nnUNet_extTrainer=$PWD/examples/nnunet
    nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerRowtune

What for: raise `patch_size` in nnUNetPlans.json, up to whole volumes, and search with the memory there is.
The search takes steps with a loss on the finest output. nnU-Net's own (Dice and cross-entropy at every
resolution) lies outside of the plan and takes more: keep room for it with `--reserve`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

import rowtune


class nnUNetTrainerRowtune(nnUNetTrainer):
    """Trains and validates by the plan that ROWTUNE_PLAN names; as PyTorch does where it is empty."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network = nnUNetTrainer.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        if "ROWTUNE_PLAN" not in os.environ:
            raise RuntimeError(
                "set ROWTUNE_PLAN to the plan.json of a search, or to nothing to train without one"
            )
        plan = os.environ["ROWTUNE_PLAN"]
        return rowtune.apply(network, rowtune.load(plan)) if plan else network


def find(
    dataset: str, configuration: str, budget: str, out: str, plans: str = "nnUNetPlans", **more: Any
) -> Any:
    """A plan for the network, the patch and the batch of a configuration that nnU-Net has planned."""
    name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    folder = Path(nnUNet_preprocessed) / name
    manager = PlansManager(json.loads((folder / f"{plans}.json").read_text()))
    about = json.loads((folder / "dataset.json").read_text())
    chosen = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, chosen, about)
    heads = manager.get_label_manager(about).num_segmentation_heads
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = nnUNetTrainer.build_network_architecture(manager, chosen, channels, heads).to(device)
    batch = torch.zeros(chosen.batch_size, channels, *chosen.patch_size, device=device)
    how = {"loss": "cross_entropy", "optimizer": "sgd:lr=0.01,momentum=0.99", "out": out}
    return rowtune.search(network, (batch,), budget, **how, **more)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Search a plan for a configuration of nnU-Net.")
    parser.add_argument("dataset", help="901, or Dataset901_Name")
    parser.add_argument("configuration", help="3d_fullres, 2d, ...")
    parser.add_argument("--budget", required=True, help="8GB, or 50%% of what plain PyTorch takes")
    parser.add_argument("--reserve", default=0, help="of the budget, for what is outside of the network")
    parser.add_argument("--out", default="plan.json")
    parser.add_argument("--plans", default="nnUNetPlans")
    parser.add_argument("--trials", type=int, default=40)
    found = find(**vars(parser.parse_args()))
    peak, plain = (found.measured[key] for key in ("peak_bytes", "plain_peak_bytes"))
    print(f"a step takes {peak / 1e9:.2f} GB, plain PyTorch takes {plain / 1e9:.2f} GB")
