"""What each decision of a plan may be."""

from __future__ import annotations

from typing import Any, Literal

Policy = Literal["keep", "checkpoint", "rows"]
Halo = Literal["recompute", "cache", "sweep"]
Tapes = Literal["split", "whole", "late", "replay"]
Barriers = Literal["store", "recompute", "narrow", "passes"]
Layout = Literal["contiguous", "channels_last"]
Precision = Literal["as given", "bf16", "fp16"]
Cheap = Literal["store", "recompute"]
Home = Literal["device", "host"]
Capture = Literal["off", "on"]
Store = Literal["device", "host", "bf16", "fp16", "int8", "int4"]

LOSSY: frozenset[Store] = frozenset({"bf16", "fp16", "int8", "int4"})
"""Stores that give back something else than they were given."""

OF_A_PLAN: dict[str, Any] = {
    "layout": Layout, "dtype": Precision, "optimizer_state": Home, "waiting_gradients": Home,
    "capture": Capture,
}  # fmt: skip
OF_A_SEGMENT: dict[str, Any] = {
    "policy": Policy, "halo": Halo, "tapes": Tapes, "barriers": Barriers, "store": Store, "cheap": Cheap,
}  # fmt: skip
