"""PyTorch Lightning: a callback that puts a plan under a LightningModule when training begins.

The LightningModule stays as it is. Its network is searched once, in the process of rank 0; its `forward` then
goes through the plan, and the loss is taken outside, as Lightning modules do.

    pip install lightning; python examples/lightning_callback.py
"""

import lightning
import torch
from own_network import Segmenter, pictures
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rowtune


class MemoryBudget(lightning.pytorch.callbacks.Callback):
    """Train `module.<name>` by a plan: one that was searched before (a plan.json or what `rowtune.search`
    returned)."""

    def __init__(self, plan: rowtune.PlanFile | str, name: str = "network") -> None:
        self.plan = rowtune.load(plan) if isinstance(plan, str) else plan
        self.name = name

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Before optimizers are made and processes are joined: they see the same parameters, by the same
        names."""
        network = getattr(pl_module, self.name)
        setattr(pl_module, self.name, rowtune.apply(network, self.plan))


class Segmentation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.loss = Segmenter(), nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        value = self.loss(self.network(images), masks)
        self.losses.append(value.item())
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(budget: str = "70%", trials: int = 4, epochs: int = 2) -> list[float]:
    """The loss of every step."""
    lightning.seed_everything(0, verbose=False)
    module = Segmentation()
    data = DataLoader(pictures(16), batch_size=4)
    images, _ = next(iter(data))
    plan = rowtune.search(module.network, (images,), budget, loss=module.loss, trials=trials)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, callbacks=[MemoryBudget(plan)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")
