"""The knobs that a search turns: what a trial takes away from the programme's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rowtune.cost.candidates import ROUNDING, batch
from rowtune.cost.table import Table
from rowtune.graph.places import has_barriers

Values = Mapping[str, str]
"""A choice for every knob, by name."""

ZONES = ("front", "middle", "back")
POLICIES = ("any", "keep", "checkpoint", "rows")
"""What a zone may be beside kept."""
MARGINS = ("1", "0.97", "0.93", "0.88", "0.8")
"""The share of the memory that the programme is told of."""
HOMES = ("host", "device")
"""Of the optimizer's state, where it may be on the host."""
BANDS = {"any": (0, 1 << 40), "low": (0, 12), "middle": (12, 48), "high": (48, 1 << 40)}


@dataclass(frozen=True)
class Knob:
    name: str
    choices: tuple[str, ...]


def knobs(table: Table, savers: frozenset[str]) -> tuple[Knob, ...]:
    """The same for every search of a graph."""
    found = [Knob("margin", MARGINS), *(Knob(zone, POLICIES) for zone in ZONES)]
    found += [Knob("band", tuple(BANDS)), Knob("halo", ("any", "sweep", "recompute", "cache"))]
    found += [Knob("tapes", ("any", "split", "whole", "late", "replay")), Knob("turns", ("any", "no"))]
    if has_barriers(table.graph, table.axis):
        found.append(Knob("barriers", ("any", "store", "recompute", "narrow", "passes")))
    if batch(table) > 1:
        found.append(Knob("images", ("any", "whole", "split")))
    if "rounding" in savers:
        found.append(Knob("rounding", ("any", "none", *ROUNDING)))
    if "channels_last" in savers:
        found.append(Knob("layout", ("contiguous", "channels_last")))
    if "offload_state" in savers:
        found.append(Knob("state", HOMES))
    return tuple(found)


def guesses(among: Sequence[Knob], savers: frozenset[str]) -> list[dict[str, str]]:
    """The programme's own, with some memory to spare, and with each policy left out of all zones. What is
    kept, on the host or not, is not computed again: predictions are least wrong about that, so where the host
    may be used it comes early."""
    all_of = {knob.name: knob.choices[0] for knob in among}
    found = [all_of | {"margin": margin} for margin in MARGINS[:3]]
    if "offload" in savers:
        found.insert(1, all_of | dict.fromkeys(ZONES, "keep"))
    if "channels_last" in savers:
        found.insert(1, all_of | {"layout": "channels_last"})
    if "offload_state" in savers:
        found.insert(1, all_of | {"state": "device"})
    if "rounding" in savers:  # whether its error is within bounds, only a measurement tells
        found[1:1] = [all_of | {"rounding": which} for which in (*ROUNDING, "none")]
    found += [all_of | {"tapes": tapes} for tapes in ("replay", "late", "split")]
    found += [all_of | {"halo": halo} for halo in ("sweep", "recompute")]
    found += [all_of | dict.fromkeys(ZONES, policy) for policy in ("rows", "checkpoint")]
    found += [all_of | {"band": band} for band in ("high", "low")]
    return found


def usable(among: Sequence[Knob], values: Mapping[str, Any]) -> bool:
    """Whether these are of these knobs, not of an older search's."""
    choices = {knob.name: knob.choices for knob in among}
    return values.keys() == choices.keys() and all(v in choices[n] for n, v in values.items())
