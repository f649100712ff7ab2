"""The graph of a training step: the model's graph with a loss at its end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rowtune.errors import ModelError
from rowtune.graph.graph import Graph, Node, Ref, Value, check
from rowtune.graph.losses import Loss

LOSS = "loss"
SUMS = "loss_sums"
NORMS = "loss_norms"
TARGET = "target"


def with_loss(graph: Graph, loss: Loss, *, keep_outputs: bool = False) -> Graph:
    """Append `loss_sums` (a reduction over rows and images) and `loss` (its combine). The loss looks at the
    model's first output. Outputs: the loss, then the model's own where they are kept for metrics.

    Raises:
        ModelError: the first output is not a floating-point tensor.
    """
    output = graph.values[graph.outputs[0]]
    if not output.dtype.is_floating_point:
        raise ModelError(f"the model's first output is {output.dtype}; a loss needs floating-point values")
    target = Value(TARGET, "target", target_shape(loss, output.shape), target_dtype(loss, output.dtype))
    size = _sums_size(loss, output, target)
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    values = {
        **graph.values,
        TARGET: target,
        NORMS: Value(NORMS, "norms", (size,), dtype),
        SUMS: Value(SUMS, "node", (size,), dtype),
        LOSS: Value(LOSS, "node", (), dtype),
    }
    nodes = (
        *graph.nodes,
        Node(SUMS, "loss_sums", loss.terms, (Ref(output.name), Ref(TARGET))),
        Node(LOSS, "loss_combine", loss.combine, (Ref(SUMS), Ref(NORMS))),
    )
    outputs = (LOSS, *graph.outputs) if keep_outputs else (LOSS,)
    return check(
        replace(graph, nodes=nodes, values=values, outputs=outputs, targets=(TARGET,), loss=loss,
                loss_output=output.name)
    )  # fmt: skip


def target_shape(loss: Loss, output: tuple[int, ...]) -> tuple[int, ...]:
    return (output[0], *output[2:]) if loss.class_target else output


def target_dtype(loss: Loss, output: torch.dtype) -> torch.dtype:
    return torch.int64 if loss.class_target else output


def _sums_size(loss: Loss, output: Value, target: Value) -> int:
    """How many sums the loss keeps: asked of the loss itself, on tensors without data."""
    if not loss.row_local:
        return 1
    with torch.device("meta"):
        sums = loss.terms(
            torch.zeros(output.shape, dtype=output.dtype), torch.zeros(target.shape, dtype=target.dtype)
        )
    return sums.numel()


def synthetic_target(loss: Loss, output: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random target for this output shape: class indices, or values as the output's."""
    made = torch.Generator().manual_seed(seed)
    shape = target_shape(loss, output)
    if loss.class_target:
        return torch.randint(0, output[1], shape, generator=made)
    low = torch.rand(shape, generator=made, dtype=torch.float32)
    return low.to(dtype)
