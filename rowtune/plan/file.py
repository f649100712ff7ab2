"""plan.json: a plan, what it was made for, what it was predicted to cost and what it cost.

The file is read strictly: an unknown schema, key or value is a PlanError, never a guess. It is JSON and
nothing else, so opening a stranger's plan runs no code (opening the *model* it names may).
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rowtune import __version__
from rowtune.errors import InfeasibleError, PlanError
from rowtune.plan.plan import Plan
from rowtune.problem import Problem, typed

SCHEMA = 2
MOST = 2**60
"""Bytes, seconds, whatever a plan counts: there is nothing larger."""
MOST_THREADS = 1024
"""A library that is told to start more than there can be ends the process."""
LONGEST_NAME = 255
"""Bytes of a file's name."""
LARGEST = 64 << 20
"""Bytes of a plan's file."""
UNSURE = 1.1
"""How much longer than predicted a step is thought to take where plans that were measured are at hand."""

PREDICTED = ("peak_bytes", "activation_bytes", "host_bytes", "seconds", "peak_at")
MEASURED = (
    "peak_bytes",
    "allocator_peak_bytes",
    "activation_bytes",
    "step_seconds",
    "plain_peak_bytes",
    "plain_step_seconds",
    "max_relative_error",
    "cpu_seconds",
    "alloc_retries",
)
_KEYS = {
    "schema", "model", "inputs", "dtype", "device", "loss", "optimizer", "seed", "fingerprint",
    "budget_bytes", "reserve_bytes", "decisions", "predicted", "measured", "front", "study", "threads",
    "versions", "predicted_for",
}  # fmt: skip


@dataclass(frozen=True)
class PlanFile:
    """The content of a plan.json. Sizes in bytes, times in seconds; None where it could not be measured.

    `front` is the Pareto set: peak_bytes, step_seconds and decisions of each member, and `predicted` where it
    was not measured. `predicted_for` is the device of the profile that a plan was made with where nothing
    was measured at all, empty otherwise.
    `study` names the records file, beside the plan. `threads` is the number to run with on a CPU, 0 for
    torch's own.
    """

    problem: Problem
    fingerprint: str
    budget_bytes: int
    plan: Plan
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any]
    front: tuple[Mapping[str, Any], ...] = ()
    study: str = ""
    reserve_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    threads: int = 0
    predicted_for: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **self.problem.to_dict(),
            "fingerprint": self.fingerprint,
            "budget_bytes": self.budget_bytes,
            "reserve_bytes": self.reserve_bytes,
            "decisions": self.plan.to_dict(),
            "predicted": dict(self.predicted),
            "measured": dict(self.measured),
            "front": [dict(member) for member in self.front],
            "study": self.study,
            "threads": self.threads,
            "predicted_for": self.predicted_for,
            "versions": dict(self.versions),
        }

    @staticmethod
    def from_dict(data: Any) -> PlanFile:
        """The inverse, strict."""
        if not isinstance(data, dict):
            raise PlanError("a plan is a JSON object")
        if data.get("schema") != SCHEMA:
            raise PlanError(
                f"plan schema {data.get('schema')!r}; this rowtune reads schema {SCHEMA}. Make a new plan: "
                f"{_search(data)}"
            )
        data = {"threads": 0, "predicted_for": "", **data}
        if set(data) != _KEYS:
            odd = sorted(set(data) ^ _KEYS)[0]
            raise PlanError(f"{'unknown' if odd in data else 'missing'} key {odd!r}")
        for key, least in (("budget_bytes", 1), ("reserve_bytes", 0), ("threads", 0)):
            if not least <= typed(data, key, int) < MOST:
                raise PlanError(f"{key} is at least {least} and below 2^60, not {str(data[key])[:40]}")
        if data["threads"] > MOST_THREADS:
            raise PlanError(f"threads is at most {MOST_THREADS}, not {data['threads']}")
        study = typed(data, "study", str)
        if Path(study).name != study or len(study.encode()) > LONGEST_NAME:
            raise PlanError(f"study is the name of a file beside the plan, not {study[:80]!r}")
        return PlanFile(
            problem=Problem.from_dict(data),
            fingerprint=typed(data, "fingerprint", str),
            budget_bytes=data["budget_bytes"],
            plan=Plan.from_dict(data["decisions"]),
            predicted=_costs(data, "predicted", PREDICTED),
            measured=_costs(data, "measured", MEASURED),
            front=tuple(_member(item) for item in typed(data, "front", list)),
            study=study,
            reserve_bytes=data["reserve_bytes"],
            versions=typed(data, "versions", dict),
            threads=data["threads"],
            predicted_for=typed(data, "predicted_for", str),
        )


def _search(data: dict[str, Any]) -> str:
    """The command that makes such a plan, as far as an older file says how."""
    budget = data.get("budget_bytes")
    try:
        problem = Problem.from_dict(data)
        shapes = "".join(f" --shape {s.name}:{'x'.join(map(str, s.shape))}" for s in problem.inputs)
        asked = f"{problem.model}{shapes}"
    except (PlanError, TypeError, ValueError, KeyError, AttributeError):
        asked = "MODEL"
    return f"rowtune search {asked} --budget {budget if type(budget) is int else 'SIZE'}"


def versions() -> dict[str, str]:
    """What made a plan: a later surprise is often a version."""
    import torch

    return {"rowtune": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save_plan(file: PlanFile, path: Path) -> None:
    """Write whole or not at all: a temporary file beside it, then one rename."""
    write_text(path, dumps(file.to_dict()) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, so that an interrupted write leaves the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_plan(path: Path) -> PlanFile:
    """Read and check a plan.json; PlanError says what is wrong with it. The model's own file is looked for
    beside the plan first, then from the current folder."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise PlanError(f"{path} has {size} bytes, a plan at most {LARGEST}")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        json.dumps(data, ensure_ascii=False).encode()  # no text that cannot be printed
    except (OSError, ValueError, RecursionError) as error:  # also what is no UTF-8, and numbers without end
        raise PlanError(f"{path} is not a readable plan: {str(error).splitlines()[0]}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    try:
        file = PlanFile.from_dict(data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PlanError(f"{path}: decisions of the wrong type: {error}") from error
    source = file.problem.model
    if source.kind not in ("onnx", "pt2"):
        return file
    beside = path.parent / source.text
    try:
        here = [place for place in (beside, Path(source.text)) if place.exists()]
    except (OSError, ValueError) as error:  # a name that no file can have
        raise PlanError(f"{path}: its model has no name of a file: {error}") from error
    if not here:
        raise PlanError(f"{path}: its model {source.text} is neither beside the plan nor here")
    if here[0] != beside:
        return file
    return replace(file, problem=replace(file.problem, model=replace(source, text=str(beside))))


def _no_constant(text: str) -> float:
    raise PlanError(f"{text} is not a number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose keys is there once: of two, JSON would take the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise PlanError(f"the key {twice!r} is there twice")
    return found


def dumps(value: Any, indent: int = 0) -> str:
    """JSON with one line for whatever is short: a plan's segments read as a table."""
    flat = json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or (indent and len(flat) + indent <= 108):
        return flat
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        items = [f"{pad}{json.dumps(str(k))}: {dumps(v, indent + 2)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(pad + dumps(item, indent + 2) for item in value) + "\n" + " " * indent + "]"


def _costs(data: Mapping[str, Any], key: str, known: tuple[str, ...]) -> dict[str, Any]:
    costs = typed(data, key, dict)
    for name, value in costs.items():
        if name not in known:
            raise PlanError(f"{key} has an unknown key {name!r}")
        if not (value is None or _is_amount(value) or (name == "peak_at" and isinstance(value, str))):
            raise PlanError(f"{key}.{name} is a number of at least 0 or null, not {value!r}")
    return dict(costs)


def _is_amount(value: Any) -> bool:
    """Bytes or seconds, and no number that a float cannot hold."""
    return type(value) in (int, float) and 0 <= value < MOST and math.isfinite(value)


def at_budget(file: PlanFile, budget: int) -> PlanFile:
    """The same with the fastest plan of its front within another budget; one that was only predicted has to
    be faster by more than predictions are off.

    Raises:
        InfeasibleError: there is none; says which budget the smallest needs.
    """
    room = budget - file.reserve_bytes
    inside = [m for m in file.front if m["peak_bytes"] <= room]
    if not inside:
        least = min((m["peak_bytes"] for m in file.front), default=None)
        need = "" if least is None else f" (the smallest plan in it takes {least + file.reserve_bytes} bytes)"
        raise InfeasibleError(
            f"no plan of this file's front takes at most {budget} bytes{need}: search again with that "
            "budget; rowtune search --from the file uses what was measured before"
        )
    return _with(replace(file, budget_bytes=budget), min(inside, key=_seconds))


def _seconds(member: Mapping[str, Any]) -> float:
    return float(member["step_seconds"]) * (UNSURE if member.get("predicted") else 1.0)


def smaller(file: PlanFile, may: Callable[[Plan], bool] = lambda _: True) -> PlanFile | None:
    """The same with the next plan of its front: of those that take less memory than this one, compute in the
    same precision and `may` be taken, the one that takes most. None: there is none."""
    now = file.measured.get("peak_bytes") or file.predicted.get("peak_bytes") or math.inf
    for member in sorted(file.front, key=lambda m: -float(m["peak_bytes"])):
        plan = Plan.from_dict(member["decisions"])
        alike = (plan.dtype, plan.max_grad_error) == (file.plan.dtype, file.plan.max_grad_error)
        if member["peak_bytes"] < now and plan != file.plan and alike and may(plan):
            return _with(file, member)
    return None


def exact_one(file: PlanFile, may: Callable[[Plan], bool] = lambda _: True) -> PlanFile | None:
    """The same with the fastest plan of its front, within its budget, that rounds nothing, computes in the
    same precision and `may` be taken. None: there is none."""
    room = file.budget_bytes - file.reserve_bytes
    for member in sorted(file.front, key=_seconds):
        plan = Plan.from_dict(member["decisions"])
        fits = member["peak_bytes"] <= room and plan.dtype == file.plan.dtype
        if fits and not plan.allowed_error and may(plan):
            return _with(file, member)
    return None


def figures(file: PlanFile) -> tuple[int, float | None]:
    """Peak and seconds of a file's plan: measured, or else as predicted."""
    known = {**file.predicted, **{k: v for k, v in file.measured.items() if v is not None}}
    return known["peak_bytes"], known.get("step_seconds", known.get("seconds"))


def _with(file: PlanFile, member: Mapping[str, Any]) -> PlanFile:
    """Another plan of its front."""
    known = () if member.get("predicted") else ("peak_bytes", "step_seconds")
    measured = dict.fromkeys(MEASURED) | {k: member[k] for k in known}
    figures = {"peak_bytes": member["peak_bytes"], "seconds": member["step_seconds"]}
    plain = {k: file.measured.get(k) for k in ("plain_peak_bytes", "plain_step_seconds")}
    return replace(
        file,
        plan=Plan.from_dict(member["decisions"]),
        predicted=figures if member.get("predicted") else {},
        measured=measured | plain,
        threads=0,
    )


def _member(item: Any) -> dict[str, Any]:
    keys = {"peak_bytes", "step_seconds", "decisions"}
    if not isinstance(item, dict) or set(item) - {"predicted"} != keys:
        raise PlanError("a member of the front has peak_bytes, step_seconds and decisions")
    if item.get("predicted", True) is not True:
        raise PlanError(f"a member of the front is predicted: true or measured, not {item['predicted']!r}")
    for key in ("peak_bytes", "step_seconds"):
        if not _is_amount(item[key]):
            raise PlanError(f"front: {key} is a number of at least 0, not {item[key]!r}")
    return {**item, "decisions": Plan.from_dict(item["decisions"]).to_dict()}
