"""Models whose weights fully_shard (FSDP2) spread over processes before rowtune saw them."""

from __future__ import annotations

import sys

from torch import nn

from rowtune.errors import UsageError

_HOME = "torch.distributed.fsdp"


def check_whole(model: nn.Module) -> None:
    """A sharded module gathers its weights when it is called itself, and a planned model's parts are not: it
    cannot be traced, nor run in bands. What `apply` returned can be sharded as a whole.

    Raises:
        UsageError: `model` or a part of it is sharded already.
    """
    fsdp = sys.modules.get(_HOME)  # not loaded: nothing was sharded
    kinds = tuple(
        kind
        for name in ("FSDPModule", "FullyShardedDataParallel")
        if isinstance(kind := getattr(fsdp, name, None), type)
    )
    for name, module in model.named_modules() if kinds else ():
        if isinstance(module, kinds):
            what = f"its part {name}" if name else "the model"
            raise UsageError(
                f"{what} was sharded (FSDP) before rowtune could plan it: first module = rowtune.apply(model"
                ", plan), then fully_shard(module) on what that returned, and on no part of it"
            )
