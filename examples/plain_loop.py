"""One's own training loop, inside a memory budget.

The search measures real training steps, once; the loop is the one that was there before. In the module's
place stands one that computes the same numbers with less memory: same parameters, same names.

    python examples/plain_loop.py
"""

import argparse

import torch
from own_network import Segmenter, pictures
from torch import nn
from torch.utils.data import DataLoader

import rowtune


def main(budget: str = "60%", trials: int = 6, epochs: int = 8) -> list[float]:
    """The mean loss of each epoch."""
    torch.manual_seed(0)
    model, loss = Segmenter(), nn.CrossEntropyLoss()
    data = DataLoader(pictures(16), batch_size=4, shuffle=True)
    images, _ = next(iter(data))

    found = rowtune.search(model, (images,), budget, loss=loss, optimizer="adam:lr=0.01", trials=trials)
    peak, plain = found.measured["peak_bytes"], found.measured["plain_peak_bytes"]
    print(f"a step takes {peak / 1e6:.2f} MB, plain PyTorch takes {plain / 1e6:.2f} MB")

    module = rowtune.apply(model, found, loss=loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for images, masks in data:
            optimizer.zero_grad()
            value = module(images, targets=masks)  # with targets: the loss, so that bands run into it
            value.backward()
            optimizer.step()
            total += value.item()
        losses.append(total / len(data))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}")

    module.eval()
    with torch.no_grad():
        prediction = module(images).argmax(1)  # without: what the model returns
    print(f"pixels that are right: {(prediction == masks).float().mean():.1%}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="60%")
    parser.add_argument("--trials", type=int, default=6)
    main(**vars(parser.parse_args()))
