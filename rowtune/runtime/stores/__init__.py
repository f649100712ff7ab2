"""EXECUTED beside: where what a segment keeps from forward to backward stays; one file for each store."""

from __future__ import annotations

from collections.abc import Callable

from rowtune.plan.choices import Store as Name
from rowtune.runtime.stores.bf16 import BF16
from rowtune.runtime.stores.fp16 import FP16
from rowtune.runtime.stores.host import Host, HostPool
from rowtune.runtime.stores.int4 import Int4
from rowtune.runtime.stores.int8 import Int8
from rowtune.runtime.stores.store import Store

STORES: dict[Name, Callable[[HostPool], Store]] = {
    "host": Host,
    "bf16": lambda pool: BF16(),
    "fp16": lambda pool: FP16(),
    "int8": lambda pool: Int8(),
    "int4": lambda pool: Int4(),
}
"""By the name in a plan; `device`, which is none of these, leaves tensors where they are."""
