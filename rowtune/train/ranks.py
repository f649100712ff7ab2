"""Several processes that train one model: what they do together.

`rowtune run` under torchrun, or a script that torchrun starts, that has made a process group and calls
`train` in each. Gradients are averaged over ranks once a step, and all ranks step down together: that is why
they are averaged after backward, when all have agreed that none ran out of memory, and not during it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowtune.errors import InfeasibleError

T = TypeVar("T")

BUCKET = 25_000_000
"""Bytes of gradients that travel together: one message for each small tensor would take the longest."""

_LOST = ("by peer", "broken pipe", "timed out waiting", "connection refused", "socket closed")


def several() -> bool:
    """Whether there is a group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process; 0 is the one that prints and writes."""
    return dist.get_rank() if several() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if several() else 1


def any_of(failed: bool, device: str) -> bool:
    """Whether it failed on any rank; every rank asks at the same place."""
    return bool(most(int(failed), device))


def most(number: int, device: str) -> int:
    """The largest of all ranks' numbers."""
    if not several():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


def from_first(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not several():
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held)
    return cast(T, held[0])


def gathered(value: T) -> list[T]:
    """All ranks' values, on rank 0; its own alone on any other."""
    if not several():
        return [value]
    held: list[Any] | None = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(value, held)
    return [value] if held is None else held


def begin_alike(model: nn.Module) -> None:
    """Rank 0's parameters and buffers, on every rank."""
    if several():
        with torch.no_grad():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)


def average(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become their mean over ranks."""
    own = [p.grad for p in parameters if p.grad is not None and not hasattr(p.grad, "full_tensor")]
    for grads in _buckets(own) if several() else ():  # what is sharded was averaged in backward
        together = grads[0] if len(grads) == 1 else torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(together)
        together.div_(dist.get_world_size())
        parts = torch.split(together.reshape(-1), [g.numel() for g in grads])
        for grad, part in zip(grads, parts, strict=True) if len(grads) > 1 else ():
            grad.copy_(part.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, as many as fit a bucket, or one that does not."""
    bucket: list[Tensor] = []
    for grad in grads:
        size = sum(g.numel() * g.itemsize for g in (*bucket, grad))
        if bucket and (size > BUCKET or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def total(loss: Tensor) -> Tensor:
    """The mean of a loss over ranks."""
    if not several():
        return loss
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def lost(error: BaseException) -> bool:
    """Whether an exception says that another rank is not there any more."""
    said = str(error).lower()
    return several() and (isinstance(error, dist.DistError) or any(words in said for words in _LOST))


def give_up(reason: str) -> InfeasibleError:
    """Leave the group, whose other ranks wait where this one does not come any more: they fail at once
    instead of at the end of a timeout."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    return InfeasibleError(
        f"rank {rank} ran out of memory ({reason}) where ranks wait for each other, and they cannot form "
        "another process group: weights sharded in this one (--fsdp), or other groups, hold on to it; start "
        "all ranks again with a smaller budget (rowtune run --budget, or rowtune.plan.file.at_budget), from "
        "the last checkpoint"
    )
