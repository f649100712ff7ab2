"""A trainer of nnU-Net's kind whose network runs by a plan, deep supervision included.

nnU-Net's trainers make their network in one place, `build_network_architecture`; patches, deep supervision,
mirroring and checkpoints are theirs and need not know. So a subclass changes that one place:

    class RowtuneTrainer(nnUNetTrainer):
        @staticmethod
        def build_network_architecture(*args, **kwargs):
            network = nnUNetTrainer.build_network_architecture(*args, **kwargs)
            return rowtune.apply(network, rowtune.load(os.environ["ROWTUNE_PLAN"]))

with a plan that was searched once for the configuration's patch and batch size. Here the trainer is a small
one of that shape, so that the example needs no data set of nnU-Net's.

    python examples/nnunet_like.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rowtune


class Supervised(nn.Module):
    """A U-Net of nnU-Net's kind: instance norm, strided convolutions, a head at each resolution. In training
    it returns the logits of all resolutions, the finest first; in eval mode the finest."""

    def __init__(self, widths: tuple[int, ...] = (4, 8, 8), classes: int = 2) -> None:
        super().__init__()
        pairs = zip((1, *widths), widths, strict=False)
        self.encoder = nn.ModuleList(stage(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs))
        back = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, stride=2) for a, b in back)
        self.decoder = nn.ModuleList(stage(2 * b, b, 1) for _, b in back)
        self.heads = nn.ModuleList(nn.Conv3d(b, classes, 1) for _, b in back)

    def forward(self, x: Tensor) -> Any:
        skips = []
        for each in self.encoder:
            x = each(x)
            skips.append(x)
        logits = []
        for up, each, head, skip in zip(self.ups, self.decoder, self.heads, skips[-2::-1], strict=True):
            x = each(torch.cat([up(x), skip], 1))
            logits.append(head(x))
        return logits[::-1] if self.training else logits[-1]


def stage(before: int, after: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, step in ((before, stride), (after, 1)):
        layers += [nn.Conv3d(channels, after, 3, stride=step, padding=1)]
        layers += [nn.InstanceNorm3d(after, affine=True), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers)


def deep_supervision(outputs: list[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy at every resolution, each half as important as the one above."""
    weights = [0.5**i for i in range(len(outputs))]
    total = outputs[0].new_zeros(())
    for weight, output in zip(weights, outputs, strict=True):
        labels = nn.functional.interpolate(target, output.shape[2:], mode="nearest")[:, 0].long()
        total = total + weight / sum(weights) * nn.functional.cross_entropy(output, labels)
    return total


class Trainer:
    """What stays as it is."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = self.build_network_architecture()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9)

    @staticmethod
    def build_network_architecture() -> nn.Module:
        return Supervised()

    def train_step(self, volume: Tensor, target: Tensor) -> float:
        self.optimizer.zero_grad()
        value = deep_supervision(self.network(volume), target)
        value.backward()
        self.optimizer.step()
        return value.item()


class RowtuneTrainer(Trainer):
    """The one place that changes."""

    plan = "plan.json"

    @staticmethod
    def build_network_architecture() -> nn.Module:
        return rowtune.apply(Trainer.build_network_architecture(), rowtune.load(RowtuneTrainer.plan))


def main(budget: str = "75%", trials: int = 4, steps: int = 8) -> tuple[list[float], list[float]]:
    """The loss of every step, with the plan and as PyTorch runs the network."""
    volume = torch.randn(1, 1, 32, 24, 24, generator=torch.Generator().manual_seed(1))
    target = (volume > 0.5).float()
    with tempfile.TemporaryDirectory() as folder:
        RowtuneTrainer.plan = str(Path(folder) / "plan.json")
        rowtune.search(Supervised(), (volume,), budget, trials=trials, out=RowtuneTrainer.plan)
        planned, plain = RowtuneTrainer(), Trainer()
    return tuple([t.train_step(volume, target) for _ in range(steps)] for t in (planned, plain))


if __name__ == "__main__":
    planned, plain = main()
    for ours, theirs in zip(planned, plain, strict=True):
        print(f"loss {ours:.6f} by the plan, {theirs:.6f} by PyTorch")
