"""A device's profile: what calls take there, measured, and what follows for a segment's time."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rowtune.cost.families import COLD, FREE, Sized, any_width, sized
from rowtune.errors import PlanError
from rowtune.runtime.blank import Signature
from rowtune.runtime.segment_recording import Work

SCHEMA = 1

HOST_BOUND = 10.0
"""A call that takes less than so many times the host's share says nothing of the device's rates."""

Curve = tuple[tuple[int, float], ...]
"""(size, seconds), by increasing size."""


@dataclass(frozen=True)
class Profile:
    """`curves` are measured, by family; for what is not among them a call's operations and bytes at these
    rates count, which are medians over what was measured. `call_seconds` is what the host takes for a call,
    whatever it does. What steps take beside the sum of their calls is corrected by `factors`, by the policy
    of a segment."""

    device: str = "a processor like many"
    threads: int = 0
    torch: str = ""
    operations_per_second: float = 5e10
    bytes_per_second: float = 8e9
    call_seconds: float = 5e-6
    curves: Mapping[str, Curve] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Where a plan with these times may run: on a card there are no threads, and something was timed."""
        return "cpu" if self.threads or not self.curves else "cuda:0"

    def seconds(self, call: Signature) -> float:
        """One call of this kind."""
        if call.op in FREE:
            return 0.0
        at = sized(call)
        if not at.size:
            return 0.0
        curve = self.curve(at.family)
        return self.rough(at) if curve is None else self.along(curve, at)

    def curve(self, family: str) -> Curve | None:
        """What was measured of a family; else of the same calls in a cache, or not in one."""
        other = family.removesuffix(COLD) if family.endswith(COLD) else family + COLD
        return self.curves.get(family) or self.curves.get(other)

    def along(self, curve: Curve, at: Sized) -> float:
        """A call of this size by its family's curve. Beyond sizes of which the host takes longer than the
        device what is added goes by the rates: to scale the host's share up would be far too long."""
        found, (size, seconds) = along(curve, at.size), curve[-1]
        if at.size > size and seconds < HOST_BOUND * self.call_seconds:
            return min(found, seconds + self.rough(at))
        return found

    def rough(self, at: Sized) -> float:
        """What nobody measured."""
        return max(at.operations / self.operations_per_second, at.bytes / self.bytes_per_second)

    def with_curves(self, more: Mapping[str, Iterable[tuple[int, float]]]) -> Profile:
        """Of sizes measured twice, the later measurement counts."""
        curves = dict(self.curves)
        for family, points in more.items():
            curves[family] = tuple(sorted((dict(curves.get(family, ())) | dict(points)).items()))
        return Profile(**{**self.__dict__, "curves": curves})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        curves = {family: [list(p) for p in points] for family, points in sorted(self.curves.items())}
        return {"rowtune_profile": SCHEMA, **self.__dict__, "curves": curves, "factors": dict(self.factors)}

    @staticmethod
    def from_dict(data: Any) -> Profile:
        """The inverse; PlanError where it is no profile of this version."""
        if not isinstance(data, dict) or data.get("rowtune_profile") != SCHEMA:
            raise PlanError(f"this is no profile of schema {SCHEMA}: `rowtune calibrate` makes one")
        rest = {k: v for k, v in data.items() if k != "rowtune_profile"}
        try:
            curves = {f: tuple((int(n), float(t)) for n, t in points) for f, points in rest["curves"].items()}
            return Profile(**{**rest, "curves": curves})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"this profile is damaged ({error}): `rowtune calibrate` makes one") from error


def along(curve: Curve, size: int) -> float:
    """Seconds at a size: a power law between two measured ones, in proportion to the size beyond them, and
    never less than a quarter of the smallest below."""
    at = bisect_left(curve, (size, 0.0))
    if at < len(curve) and curve[at][0] == size:
        return curve[at][1]
    if at == 0:
        return curve[0][1] * max(size / max(curve[0][0], 1), 0.25)
    if at == len(curve):
        return curve[-1][1] * size / max(curve[-1][0], 1)
    (n, t), (m, u) = curve[at - 1 : at + 1]
    if not n or not t or not u:
        return u
    slope = math.log(u / t) / math.log(m / n)
    return float(t * (size / n) ** slope)


def is_cold(policy: str) -> bool:
    """Whether calls find nothing of their tensors in a processor's caches: bands of rows are still there,
    whole feature maps are not."""
    return policy != "rows"


class Clock:
    """Times of segments by one profile; each call's time is looked up once. What was timed on images of other
    widths alone is taken from there."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._known: dict[bool, dict[Signature, float]] = {False: {}, True: {}}
        self._kin: dict[str, Curve] | None = None

    def seconds(self, policy: str, work: Work, host: int) -> float:
        """All of a segment's calls, one after another."""
        return self.bare(policy, work, host) * self.profile.factors.get(policy, 1.0)

    def bare(self, policy: str, work: Work, host: int) -> float:
        """The same without corrections."""
        cold, profile, total = is_cold(policy), self.profile, 0.0
        known = self._known[cold]
        for call, often in work:
            taken = known.get(call)
            if taken is None:
                taken = known[call] = self._seconds(call._replace(cold=cold))
            total += often * taken
        return total + host * profile.call_seconds

    def _seconds(self, call: Signature) -> float:
        at = sized(call)
        if call.op in FREE or self.profile.curve(at.family) is not None:
            return self.profile.seconds(call)
        if self._kin is None:
            found: dict[str, dict[int, float]] = {}
            for family, curve in sorted(self.profile.curves.items()):
                found.setdefault(any_width(family), {}).update(curve)
            self._kin = {name: tuple(sorted(points.items())) for name, points in found.items()}
        curve = self._kin.get(any_width(at.family), ())
        return self.profile.along(curve, at) if curve and at.size else self.profile.seconds(call)


def load(path: Path) -> Profile:
    """A profile from a file. PlanError where there is none."""
    try:
        return Profile.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the profile {path}: {error}") from error
