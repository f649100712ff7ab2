"""A small segmentation network, as one has it in a file of one's own: what the examples train."""

import torch
from torch import Tensor, nn


def block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


class Segmenter(nn.Module):
    """Encoder and decoder with one skip: N x 3 x H x W to N x classes x H x W, H and W even."""

    def __init__(self, width: int = 8, classes: int = 2) -> None:
        super().__init__()
        self.fine, self.coarse = block(3, width), block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.joined, self.head = block(2 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.coarse(nn.functional.max_pool2d(fine, 2))
        return self.head(self.joined(torch.cat([fine, self.up(coarse)], 1)))


def pictures(count: int, height: int = 64, width: int = 48) -> torch.utils.data.TensorDataset:
    """Noise with a bright square, and where it is: something that can be learnt at once."""
    made = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, height, width, generator=made)
    masks = torch.zeros(count, height, width, dtype=torch.long)
    for i in range(count):
        top, left = (int(torch.randint(0, s // 2, (), generator=made)) for s in (height, width))
        masks[i, top : top + height // 3, left : left + width // 3] = 1
    return torch.utils.data.TensorDataset(images + 2 * masks[:, None], masks)
