"""What to try next, from what was measured: each rule looks at the study and may say something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rowtune.plan.file import PlanFile
from rowtune.report.certificate import unused_savers
from rowtune.report.page import Advice
from rowtune.tune.records import Record
from rowtune.tune.sizes import format_bytes, format_seconds

STATE, SPARE = 0.3, 0.9
"""Shares of the limit: model state that is worth a remark, and a peak that leaves room."""


class Study(NamedTuple):
    """`name` is the plan file's."""

    file: PlanFile
    name: str
    records: Sequence[Record]
    front: Sequence[Record]
    limit: int

    @property
    def peak(self) -> int:
        return self.file.measured.get("peak_bytes") or 0

    @property
    def seconds(self) -> float:
        return self.file.measured.get("step_seconds") or 0.0

    def search(self, flags: str) -> str:
        """The command that goes on with this study."""
        problem = self.file.problem
        shapes = "".join(f" --shape {s.name}:{'x'.join(map(str, s.shape))}" for s in problem.inputs)
        args = "".join(f" --model-arg {k}={_argument(v)}" for k, v in problem.model.args)
        return f"rowtune search {problem.model}{args}{shapes} -o {self.name} {flags}"

    @property
    def budget(self) -> int:
        return self.file.budget_bytes


Rule = Callable[[Study], Iterator[Advice]]


def advice(study: Study) -> tuple[Advice, ...]:
    """Less memory first, then less time, then larger inputs."""
    found = [item for rule in RULES for item in rule(study)]
    return tuple(sorted(found, key=lambda a: ("memory", "time", "size").index(a.goal)))


def smaller(study: Study) -> Iterator[Advice]:
    """The plan before the chosen one on the file's front, and the smallest."""
    members = sorted(study.file.front, key=lambda m: float(m["peak_bytes"]))
    below = [m for m in members if m["peak_bytes"] < study.peak]
    for plan in {m["peak_bytes"]: m for m in (*below[-1:], *below[:1])}.values():
        known = "predicted" if plan.get("predicted") else "measured"
        yield Advice(
            "memory",
            f"a plan that was {known} takes {format_bytes(plan['peak_bytes'])} and "
            f"{format_seconds(plan['step_seconds'])} a step{_times(plan['step_seconds'], study)}",
            f"rowtune run {study.name} --budget {plan['peak_bytes'] + study.file.reserve_bytes}",
        )


def faster(study: Study) -> Iterator[Advice]:
    """The front beyond the budget."""
    beyond = [r for r in study.front if (r.peak_bytes or 0) > study.limit and r.decisions]
    if beyond:
        plan = beyond[0]
        size = (plan.peak_bytes or 0) + study.file.reserve_bytes
        yield Advice(
            "time",
            f"a budget of {format_bytes(size)} would allow a plan of {format_seconds(plan.step_seconds)} a "
            f"step{_times(plan.step_seconds, study)}",
            study.search(f"--budget {size}"),
        )


OPTIMIZER = {
    "step_in_backward": "without gradients that wait for each other",
    "offload_state": "with the optimizer's state on the host",
}
"""Savers of what the optimizer needs."""


def model_state(study: Study) -> Iterator[Advice]:
    """Parameters, gradients and the optimizer's state, which few savers change."""
    state = study.peak - (study.file.measured.get("activation_bytes") or study.peak)
    if state < STATE * study.limit:
        return
    text = f"parameters, gradients and optimizer state take {format_bytes(state)} of the peak"
    for name, how in OPTIMIZER.items():
        if name in unused_savers(study.records):
            command = study.search(f"--budget {study.budget} --savers +{name}")
            yield Advice("memory", f"{text}: {how} they take less", command)
    if not study.file.problem.optimizer.startswith("sgd:lr") or "momentum" in study.file.problem.optimizer:
        yield Advice("memory", f"{text}: an optimizer with less state is sgd without momentum")


def half_precision(study: Study) -> Iterator[Advice]:
    if "bf16" in unused_savers(study.records) and study.file.problem.dtype in ("", "float32"):
        yield Advice(
            "memory",
            "autocast to bfloat16 halves most feature maps; it is compared with plain PyTorch under bf16",
            study.search(f"--budget {study.budget} --savers +bf16"),
        )


def offload(study: Study) -> Iterator[Advice]:
    if "offload" in unused_savers(study.records) and study.file.problem.device.startswith("cuda"):
        yield Advice(
            "memory",
            "what backward needs can wait in the host's memory",
            study.search(f"--budget {study.budget} --savers +offload"),
        )


def more_trials(study: Study) -> Iterator[Advice]:
    measured = sum(r.status != "rejected" and r.decisions is not None for r in study.records)
    plain = study.file.measured.get("plain_step_seconds")
    if plain and study.seconds > plain:
        yield Advice(
            "time",
            f"{'1 plan was' if measured == 1 else f'{measured} plans were'} measured; a longer search goes "
            "on where this one stopped",
            study.search(f"--budget {study.budget} --trials {max(40, 2 * measured)}"),
        )


def room_left(study: Study) -> Iterator[Advice]:
    if study.peak < SPARE * study.limit:
        spare = format_bytes(study.limit - study.peak)
        yield Advice("size", f"{spare} of the budget are free: a larger image or batch may fit", _fit(study))
    else:
        yield Advice("size", "how large an image or batch this budget would hold", _fit(study))


def _fit(study: Study) -> str:
    command = study.search("").replace("rowtune search", "rowtune fit").partition(" -o ")[0]
    return f"{command} --budget {study.budget}"


def _times(seconds: float | None, study: Study) -> str:
    return f", {seconds / study.seconds:.2f}x this one's" if seconds and study.seconds else ""


def _argument(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


RULES: tuple[Rule, ...] = (smaller, model_state, half_precision, offload, faster, more_trials, room_left)
