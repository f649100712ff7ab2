"""What a step of a plan takes, from recordings of its segments.

A segment is recorded once for a graph and for what its neighbours make of it: which of its inputs want
gradients, how they lie in memory, which of its outputs have gradients. A plan of segments that were seen
before is a matter of adding up.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from rowtune.cost.compose import Peak, compose
from rowtune.cost.profile import Clock, Profile
from rowtune.cost.seen import GIVEN, RecordedStep, Seen
from rowtune.cost.state import Stateful, brought, state_bytes
from rowtune.graph.graph import Graph
from rowtune.plan.choices import Home
from rowtune.plan.plan import Plan
from rowtune.runtime.recorder import Brought
from rowtune.runtime.step_run import Engine


@dataclass(frozen=True)
class Cost:
    """`activation_bytes` leaves out parameters, gradients (but those that are used in backward, and live as
    short as activations) and optimizer state; `peak_at` names the largest
    tensor of the moment and the segment whose forward or backward sets the peak. Plans of one graph that run
    alike have the same `program`. `host_bytes` is what stores and the optimizer keep in the host's memory."""

    peak_bytes: int
    activation_bytes: int
    seconds: float
    peak_at: str
    program: str = ""
    host_bytes: int = 0


def predict(
    graph: Graph,
    plan: Plan,
    optimizer: Stateful = None,
    profile: Profile | None = None,
    engine: Engine = "listed",
) -> Cost:
    """Peak and time of one training step in steady state (gradients set to None between steps).

    Args:
        graph: with a loss, or without one: then every output has a gradient.
        optimizer: whose state is counted as well, or how many parameter-sized tensors it keeps (SGD with
            momentum 1, Adam 2).
        profile: of the device that the seconds are for; without one they serve to compare plans roughly.
        engine: what runs rows segments (see `apply`). From lists they mostly take less than by their
            schedules: as much as after the last use of each tensor. Inside a checkpoint they are predicted
            as by schedules.

    Raises:
        PlanError: the plan is not one of this graph.
    """
    step, peak = composed(graph, plan, optimizer, engine)
    clock = _clock(profile or ROUGH)
    seconds = sum(clock.seconds(s.policy, s.footprint.work, s.footprint.host) for s in step.segments)
    host = sum(s.footprint.host_bytes for s in step.segments)
    host += state_bytes(graph, optimizer) if plan.optimizer_state == "host" else 0
    return Cost(peak.total, peak.activations, seconds, peak.at, step.program, host)


def composed(
    graph: Graph,
    plan: Plan,
    optimizer: Stateful = None,
    engine: Engine = "listed",
) -> tuple[RecordedStep, Peak]:
    """A step's segments, and what is alive while they run."""
    away = plan.optimizer_state == "host"
    meanwhile = brought(graph, optimizer, plan.optimizer_state)
    step = seen(graph, engine).step(graph, plan, meanwhile)
    peak = alive(graph, step, None if away else optimizer)
    return step, peak if plan.step_in_backward else _with_update(graph, peak, meanwhile)


def _with_update(graph: Graph, peak: Peak, meanwhile: Brought) -> Peak:
    """The optimizer's step after backward, when no activations are left: what it takes comes and goes."""
    largest = max((size for _, size in meanwhile), default=0)
    if not largest:
        return peak
    batch = sum(v.bytes for v in graph.values.values() if v.kind in GIVEN)
    total, activations = peak.backward[0].after + largest, batch + largest
    at = peak.at if peak.total >= total else "the state of the optimizer, its step"
    return peak._replace(total=max(peak.total, total), activations=max(peak.activations, activations), at=at)


def alive(
    graph: Graph,
    step: RecordedStep,
    optimizer: Stateful = None,
    held: frozenset[int] = frozenset(),
) -> Peak:
    """What is alive while the step's segments run; see `compose`."""
    weights = sum(v.bytes for v in graph.values.values() if v.kind in _FIXED)
    batch = (v.bytes for v in graph.values.values() if v.kind in GIVEN)
    fixed = weights + state_bytes(graph, optimizer)
    return compose(step.segments, step.outer, batch, fixed, step.names, step.copies, held)


def fixed_bytes(graph: Graph, optimizer: Stateful, state: Home = "device") -> int:
    """What every plan takes: parameters, buffers, the batch, and the optimizer's state if it stays here."""
    here = sum(v.bytes for v in graph.values.values() if v.kind in (*_FIXED, *GIVEN))
    return here + (state_bytes(graph, optimizer) if state == "device" else 0)


def seen(graph: Graph, engine: Engine = "listed") -> Seen:
    """What was recorded of a graph so far."""
    known = _SEEN.setdefault(graph, {})
    if engine not in known:
        known[engine] = Seen(engine)
    return known[engine]


def _clock(profile: Profile) -> Clock:
    if _CLOCK[0].profile is not profile:
        _CLOCK[0] = Clock(profile)
    return _CLOCK[0]


_FIXED = ("parameter", "buffer")
ROUGH = Profile()
_CLOCK = [Clock(ROUGH)]
_SEEN: WeakKeyDictionary[Graph, dict[str, Seen]] = WeakKeyDictionary()
