"""A train-mode batch norm on one band of rows: PyTorch's operator against moments and normalise.

    python benchmarks/norms.py

One thread; contenders take turns; medians, and the ratio to PyTorch's own, forward and backward.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from rowtune.kernels.moments import moments, normalise
from rowtune.tune.device import keep_freed_memory


def native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5, False)


def apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return normalise(x, moments(x), weight, bias, 0, 1e-5)


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    for shape in ((1, 64, 16, 512), (1, 64, 64, 512), (1, 64, 512, 512), (1, 256, 32, 128)):
        x = torch.randn(shape, requires_grad=True)
        weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
        grad = torch.randn(shape)
        times: dict[str, list[float]] = {"native": [], "apart": []}
        for _ in range(15):
            for name, run in (("native", native), ("apart", apart)):
                start = time.perf_counter()
                torch.autograd.grad(run(x, weight, bias), (x, weight, bias), grad)
                times[name].append(time.perf_counter() - start)
        own, ours = (statistics.median(times[n]) for n in ("native", "apart"))
        print(f"{'x'.join(map(str, shape)):>16s}: native {own * 1e3:7.2f} ms, apart {ours / own:.2f}x")


if __name__ == "__main__":
    main()
