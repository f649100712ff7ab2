"""MONAI: a 3-D U-Net on whole volumes instead of patches.

MONAI's networks are nn.Modules that torch.export traces, and its losses are functions of (output, target):
the plan runs the network, the Dice loss is taken outside of it.

    pip install monai; python examples/monai_volume.py
"""

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from torch import Tensor

import rowtune


def volumes(count: int) -> list[tuple[Tensor, Tensor]]:
    """Noise with a bright cube, and where it is."""
    made = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        mask = torch.zeros(1, 1, 32, 32, 32)
        z, y, x = (int(torch.randint(0, s // 2, (), generator=made)) for s in mask.shape[2:])
        mask[:, :, z : z + 12, y : y + 12, x : x + 12] = 1
        found.append((torch.randn(mask.shape, generator=made) + 2 * mask, mask))
    return found


def main(budget: str = "70%", trials: int = 4, epochs: int = 2) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 16, 4))
    data = volumes(4)
    plan = rowtune.search(network, (data[0][0],), budget, optimizer="adam:lr=0.01", trials=trials)
    peak, plain = plan.measured["peak_bytes"], plan.measured["plain_peak_bytes"]
    print(f"a step takes {peak / 1e6:.1f} MB, plain PyTorch takes {plain / 1e6:.1f} MB")

    module = rowtune.apply(network, plan)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(epochs):
        for volume, mask in data:
            optimizer.zero_grad()
            value = loss(module(volume), mask)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")
