"""Several processes that train one model: what they do together.

`rowtune run` trains in one process; a script that torchrun starts, and that has made a process group, may
call `train` in each. Gradients are averaged over ranks once a step, and all ranks step down together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowtune.errors import InfeasibleError
from rowtune.tune.measurement import first_line, out_of_memory


def several() -> bool:
    """Whether there is a group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def any_of(failed: bool, device: str) -> bool:
    """Whether it failed on any rank; every rank asks at the same place."""
    if not several():
        return failed
    flag = torch.tensor(int(failed), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def average(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become their mean over ranks.

    Raises:
        InfeasibleError: this rank ran out of memory in the middle of it.
    """
    try:
        for p in parameters if several() else ():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad.div_(dist.get_world_size())
    except Exception as error:
        if out_of_memory(error):
            raise give_up(first_line(error)) from None
        raise


def total(loss: Tensor) -> Tensor:
    """The mean of a loss over ranks."""
    if not several():
        return loss
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def wait_inside(model: nn.Module) -> bool:
    """Whether ranks wait for each other in the middle of a forward."""
    return several() and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def give_up(reason: str) -> InfeasibleError:
    """Leave the group, whose other ranks wait where this one does not come any more: they fail at once
    instead of at the end of a timeout."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    return InfeasibleError(
        f"rank {rank} ran out of memory ({reason}) where ranks wait for each other (SyncBatchNorm, the mean "
        "of gradients), so they cannot agree on a smaller plan: the process group is given up; start all "
        "ranks again with a smaller budget (rowtune.plan.file.at_budget), from the last checkpoint"
    )
