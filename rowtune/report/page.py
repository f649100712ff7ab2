"""The content of a report, as frozen values: sizes in bytes, times in seconds, None for what is not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Verdict:
    """`limit_bytes` is the budget less the reserve; `times_plain` is the plan's step over plain's."""

    text: str
    fits: bool
    peak_bytes: int
    budget_bytes: int
    limit_bytes: int
    step_seconds: float | None
    plain_peak_bytes: int | None
    plain_step_seconds: float | None
    times_plain: float | None


@dataclass(frozen=True)
class Stretch:
    """A segment of the plan. `depth` is above 0 for those inside a checkpoint, of which only the decisions
    are known. `share` of the network's feature maps lie in it; `kept_bytes` is what its forward leaves for
    its backward, `peak_bytes` the most that is alive while it runs, `seconds` its forward and backward."""

    first: str
    last: str
    depth: int
    policy: str
    band_rows: int
    images: int
    halo: str
    tapes: str
    barriers: str
    store: str
    cheap: str
    share: float | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Held:
    """Tensors of one name, shape and role that are alive together."""

    name: str
    role: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Curve:
    """Bytes alive over a step's calls: `points` are (share of the calls, the most alive around there),
    `backward_at` the share at which backward begins, `where` the segment that runs at the peak and `held`
    what is alive then, the largest first. `detail` is "calls", or "segments" where a step has too many."""

    detail: Literal["calls", "segments"]
    calls: int
    points: tuple[tuple[float, int], ...]
    backward_at: float
    peak_bytes: int
    peak_at: float
    where: str
    held: tuple[Held, ...]


@dataclass(frozen=True)
class Memory:
    plan: Curve
    plain: Curve


@dataclass(frozen=True)
class Point:
    """A plan tried. `kind` is rows, checkpoint, keep or plain; `best` says that no other plan is both smaller
    and faster."""

    plan: str
    kind: str
    status: str
    reason: str
    peak_bytes: int | None
    predicted_bytes: int | None
    step_seconds: float | None
    predicted_seconds: float | None
    fits: bool
    best: bool
    chosen: bool


@dataclass(frozen=True)
class Choice:
    """Of a knob: how many plans with it were measured, and the fastest of them that fits."""

    value: str
    measured: int
    best_seconds: float | None


@dataclass(frozen=True)
class Knob:
    """`matters`: the share of the spread of (logarithms of) step times that goes with this knob's value,
    corrected for chance; 0 to 1."""

    name: str
    matters: float
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Saving:
    """What a saver takes off the predicted peak: that of the same plan without it is `bytes` higher."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Failure:
    """Plans that ended alike, or were not run for the like reason."""

    status: str
    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Advice:
    """`goal` is memory, time or size: what following it gives less (of size: more) of."""

    goal: Literal["memory", "time", "size"]
    text: str
    command: str = ""


@dataclass(frozen=True)
class Certificate:
    """What is known for sure of the chosen plan, and what is not.

    `bound_seconds` is the fastest step that the planner predicted for any plan within the limit, and
    `over_bound` how much longer the chosen plan's measured step takes, as a share.
    """

    peak_bytes: int | None
    limit_bytes: int
    allocator_peak_bytes: int | None
    predicted_peak_bytes: int | None
    gradient_error: float | None
    allowed_error: float
    step_seconds: float | None
    bound_seconds: float | None
    over_bound: float | None
    measured_plans: int
    unexplored: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """All of it. `words` is the plan in a few words; `note` says why there is no memory over the step, or why
    times are rough; `host_bytes` is what the plan keeps in the host's memory, as predicted."""

    plan: str
    model: str
    inputs: tuple[str, ...]
    training: str
    device: str
    words: str
    verdict: Verdict
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any]
    segments: tuple[Stretch, ...]
    memory: Memory | None
    note: str
    trials: tuple[Point, ...]
    front: tuple[Mapping[str, Any], ...]
    knobs: tuple[Knob, ...]
    failures: tuple[Failure, ...]
    advice: tuple[Advice, ...]
    certificate: Certificate
    versions: Mapping[str, str]
    savings: tuple[Saving, ...] = ()
    host_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what `rowtune report --json` prints and the HTML page holds."""
        return {"status": "ok", "budget_bytes": self.verdict.budget_bytes, **asdict(self)}
