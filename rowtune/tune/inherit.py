"""What a search takes over from another one: `rowtune search --from plan.json`.

A plan's cost does not depend on the budget, nor on what else a search may use. So all that was measured of a
network on a device holds for the next search of it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rowtune.errors import UsageError
from rowtune.plan.file import PlanFile, load_plan
from rowtune.plan.plan import Plan
from rowtune.tune.records import PLAIN, Record, RecordFile, difference, digest, read_records


def inherit(origin: Path, records: RecordFile, identity: Mapping[str, Any]) -> frozenset[str]:
    """Add to `records` what was measured for the plan file `origin`; returns which plans that were.

    Raises:
        UsageError: it was measured of another network or on another device.
    """
    file = load_plan(origin)
    theirs = origin.parent / Path(file.study).name
    if not file.study or not theirs.is_file():
        found = _of_front(origin, file, identity)
    elif records.path is not None and theirs.resolve() == records.path.resolve():
        return frozenset(records.latest())
    else:
        study, found, _ = read_records(theirs)
        _check(origin, study, identity)
    known = records.latest()
    for record in found:
        if record.digest == PLAIN:
            new = records.plain() is None
        else:
            new = record.status != "rejected" and record.digest not in known
        if new:
            records.append(record)
    return frozenset(r.digest for r in found if r.status != "rejected" and r.digest != PLAIN)


def _of_front(origin: Path, file: PlanFile, identity: Mapping[str, Any]) -> list[Record]:
    """The measured points of the file itself, where its records are gone."""
    study = {
        "fingerprint": file.fingerprint,
        "inputs": [str(spec) for spec in file.problem.inputs],
        "dtype": file.problem.dtype,
        "device": file.problem.device,
        "loss": file.problem.loss,
        "optimizer": file.problem.optimizer,
    }
    _check(origin, study, {key: identity[key] for key in study})
    made = []
    for point in file.front:
        if not point.get("predicted"):
            plan = Plan.from_dict(point["decisions"])
            made.append(
                Record(
                    digest(plan), "ok", decisions=plan.to_dict(), peak_bytes=point["peak_bytes"],
                    step_seconds=point["step_seconds"],
                )
            )  # fmt: skip
    return made


def _check(origin: Path, study: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if dict(study) != dict(identity):
        raise UsageError(
            f"--from {origin} was measured for something else ({difference(study, identity)}), and its times "
            "do not hold here: search without --from"
        )
