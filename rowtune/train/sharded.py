"""`run --fsdp`: parameters, gradients and the optimizer's state lie in parts, one with each process (FSDP2).

The planned module is sharded as a whole: its weights are gathered before a forward and before a backward, and
gradients go to the processes whose parts they belong to. Everything that asks for whole weights (checkpoints,
files) gathers them first, in all processes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowtune.errors import UsageError
from rowtune.plan.plan import Plan
from rowtune.torch_private import pytree
from rowtune.train import ranks
from rowtune.train.options import Options


def check(options: Options, plan: Plan) -> None:
    """UsageError where --fsdp has nothing to shard among, or the run wants what needs whole weights."""
    if not ranks.several():
        raise UsageError(
            "--fsdp shards weights among processes, and this is one: torchrun --nproc-per-node N -m rowtune "
            "run ... --fsdp"
        )
    wants = {"--ema": options.ema > 0, "--verify-every": options.verify_every > 0,
             "a plan of fp16 (take bf16)": plan.dtype == "fp16",
             "a plan with optimizer_state host": plan.optimizer_state == "host",
             "a plan that rounds and --check-error-every": plan.allowed_error > 0 < options.check_error_every,
            }  # fmt: skip
    for what in (name for name, wanted in wants.items() if wanted):
        raise UsageError(f"--fsdp does not go with {what}: it needs whole weights; leave out one of the two")


def shard(planned: nn.Module, device: str) -> None:
    """Parameters become parts of themselves, in the model too, whose they are; an optimizer is made after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    fully_shard(planned, mesh=mesh)


def is_part(tensor: Any) -> bool:
    """Whether a tensor is a process's part of a larger one."""
    return hasattr(tensor, "full_tensor")


def any_part(model: nn.Module) -> bool:
    return any(map(is_part, model.parameters()))


def whole(value: Any) -> Any:
    """The same with whole tensors in the places of parts; every process asks."""
    return pytree.tree_map_only(Tensor, lambda t: t.full_tensor() if is_part(t) else t, value)


def _part_like(tensor: Tensor, example: Any) -> Tensor:
    """This process's part of a whole tensor, as `example` is of its own."""
    if not is_part(example) or tensor.shape != example.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    made: Tensor = distribute_tensor(
        tensor.to(example.device, example.dtype), example.device_mesh, example.placements
    )
    return made


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into a model that may be sharded."""
    now = model.state_dict()
    model.load_state_dict({name: _part_like(tensor, now.get(name)) for name, tensor in weights.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The whole state of an optimizer into one whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        at: {k: _part_like(v, parameters[at]) if isinstance(v, Tensor) else v for k, v in slots.items()}
        for at, slots in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def make_whole(model: nn.Module) -> None:
    """Parts give way to whole parameters, at the end of a run; every process asks."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and is_part(tensor):
                module._parameters[name] = nn.Parameter(whole(tensor.detach()), tensor.requires_grad)


@contextmanager
def gathered(planned: Any) -> Iterator[None]:
    """Whole weights inside, where the module is looked at and not called."""
    if not hasattr(planned, "unshard"):
        yield
        return
    planned.unshard()
    try:
        yield
    finally:
        planned.reshard()
