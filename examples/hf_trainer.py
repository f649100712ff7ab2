"""The Hugging Face Trainer on a network that runs by a plan.

The Trainer wants a module that takes keyword arguments and returns the loss: a wrapper of ten lines. Its
checkpoints hold the network's own parameters, by their own names.

    pip install transformers accelerate; python examples/hf_trainer.py
"""

import tempfile

import torch
from own_network import Segmenter, pictures
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import rowtune


class Pictures(Dataset[dict[str, Tensor]]):
    """Items as the Trainer's collator wants them."""

    def __init__(self, count: int) -> None:
        self.items = pictures(count)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, mask = self.items[index]
        return {"pixel_values": image, "labels": mask}


class Planned(nn.Module):
    """`network` by a plan, in the calling convention of the Trainer."""

    def __init__(self, network: nn.Module, plan: rowtune.PlanFile, loss: nn.Module) -> None:
        super().__init__()
        self.network = rowtune.apply(network, plan, loss=loss)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if labels is None:
            return {"logits": self.network(pixel_values)}
        loss, logits = self.network(pixel_values, targets=labels, outputs=True)
        return {"loss": loss, "logits": logits}


def main(budget: str = "70%", trials: int = 4, epochs: int = 2) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    network, loss, data = Segmenter(), nn.CrossEntropyLoss(), Pictures(16)
    images = torch.stack([data[i]["pixel_values"] for i in range(4)])
    plan = rowtune.search(network, (images,), budget, loss=loss, optimizer="adamw:lr=0.01", trials=trials)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=4, num_train_epochs=epochs, learning_rate=0.01,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=Planned(network, plan, loss), args=arguments, train_dataset=data)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")
