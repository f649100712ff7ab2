"""Where the plain network can be run once, for plans to be compared with it.

Plans are for networks that do not fit, so the plain one may not fit either. It is run outside any cap: on the
device, else there on narrower images of the same height (which run the same bands), else on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rowtune.cost.predict import predict
from rowtune.errors import ModelError
from rowtune.plan.uniform import uniform_plan
from rowtune.problem import TensorSpec
from rowtune.tune.device import free_bytes
from rowtune.tune.step import Batch, Workload

# A reference may have to be run once more in float64, beside what the first one left in the allocator.
HEADROOM = 2.4


@dataclass(frozen=True)
class Place:
    """A batch on the host, and the device that the plain network runs it on."""

    batch: Batch
    device: str


def plain_peak(work: Workload) -> int:
    """Predicted peak of the network as PyTorch runs it."""
    keep = uniform_plan(work.graph, "keep")
    return int(predict(work.graph, keep, work.optimizer).peak_bytes)


def places(work: Workload) -> Iterator[Place]:
    """Where the plain network is predicted to fit, the best first."""
    device, specs = work.problem.device, work.problem.inputs
    most = HEADROOM * plain_peak(work)
    smaller: tuple[TensorSpec, ...] | None = specs
    need = most
    while smaller is not None:
        batch = _batch(work, smaller) if need <= free_bytes(device) else None
        if batch is not None:
            yield Place(batch, device)
        smaller, need = _smaller(smaller), need / 2
    # Whole tensors are drawn by the device's own generator, and another device draws others.
    drawn = any(node.random and node.op != "dropout" for node in work.graph.nodes)
    if device != "cpu" and not drawn and most <= free_bytes("cpu"):
        yield Place(work.batch(), "cpu")


def _batch(work: Workload, specs: tuple[TensorSpec, ...]) -> Batch | None:
    """None where the model is tied to its own sizes."""
    try:
        return work.batch(specs)
    except ModelError:
        return None


def _smaller(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...] | None:
    """Half the width, in multiples of 32 where it was one; else half the images; None where neither can be
    halved."""
    if all(len(s.shape) >= 4 and s.shape[-1] >= 64 for s in specs):
        return tuple(replace(s, shape=(*s.shape[:-1], _half(s.shape[-1]))) for s in specs)
    if all(s.shape and s.shape[0] >= 4 for s in specs):
        return tuple(replace(s, shape=(s.shape[0] // 2, *s.shape[1:])) for s in specs)
    return None


def _half(width: int) -> int:
    half = width // 2
    return half - half % 32 if half >= 32 else half
