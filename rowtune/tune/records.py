"""What was tried, appended to a JSON-lines file as it happens: a kill loses no finished trial.

The first line says which study the file belongs to; every other line is one Record. The file is all a
later search needs: it is replayed into the study without running anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rowtune.errors import PlanError, UsageError
from rowtune.plan.file import write_text
from rowtune.plan.plan import Plan

SCHEMA = 3
PLAIN = "plain"


@dataclass(frozen=True)
class Record:
    """One plan tried. `digest` is PLAIN for the network as PyTorch runs it; `seconds` is the trial's own
    duration; `effort` is full for a plan that was measured once more with care.

    status: ok, oom, crash, timeout, wrong (gradients), slow (one step was enough), rejected (predicted too
    big, never run). `threads` is the number that suits it best where that is not torch's own, else 0.
    """

    digest: str
    status: str
    reason: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, Any] | None = None
    predicted_bytes: int | None = None
    predicted_seconds: float | None = None
    peak_at: str = ""
    peak_bytes: int | None = None
    activation_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    step_seconds: float | None = None
    max_relative_error: float | None = None
    effort: str = "quick"
    seconds: float = 0.0
    cpu_seconds: float | None = None
    alloc_retries: int | None = None
    threads: int = 0
    program: str = ""
    limit: int = 0

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.peak_bytes is not None and self.step_seconds is not None


def digest(plan: Plan) -> str:
    """Identity of a plan's decisions."""
    text = json.dumps(plan.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RecordFile:
    """Records of one study, in memory and in a file (None: in memory only)."""

    def __init__(self, path: Path | None, study: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Open or begin. UsageError where the file belongs to another study, unless `fresh`."""
        self.path = path
        self.records: list[Record] = []
        self.unwritten = ""
        if path is None:
            return
        if path.exists() and not fresh:
            found, self.records, sound = read_records(path)
            if found != dict(study):
                raise UsageError(f"{path} holds trials of another study ({difference(found, study)}): "
                                 "give --fresh to begin anew, or another -o")  # fmt: skip
            if not sound:
                _truncate_torn_line(path)
        else:
            begin = json.dumps({"rowtune_records": SCHEMA, "study": dict(study)}) + "\n"
            try:
                write_text(path, begin)
            except OSError as error:
                raise UsageError(f"cannot write {path}: {error.strerror}") from error

    def append(self, record: Record) -> None:
        """Remember a record; on return it is on the disk, or `unwritten` says why not: a full disk costs the
        file, not the search."""
        self.records.append(record)
        if self.path is None:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(record)) + "\n")
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            self.unwritten = f"{self.path}: {error.strerror or error}"
            with contextlib.suppress(OSError):  # half a line would make the next one unreadable
                os.truncate(self.path, size)

    def latest(self) -> dict[str, Record]:
        """The last record of each plan, plain excepted."""
        return {r.digest: r for r in self.records if r.digest != PLAIN}

    def plain(self) -> Record | None:
        return next((r for r in reversed(self.records) if r.digest == PLAIN), None)


def read_records(path: Path) -> tuple[dict[str, Any], list[Record], bool]:
    """Study, records, and whether the last line is whole. A torn last line (a kill while writing) is left
    out; anything else that is no record is a PlanError."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    *lines, rest = text.split("\n")
    sound = rest == ""
    try:
        header = json.loads(lines[0])
        if header["rowtune_records"] != SCHEMA:
            raise PlanError(
                f"{path} has records of schema {header['rowtune_records']!r}, not {SCHEMA}: give --fresh"
            )
        return dict(header["study"]), [Record(**json.loads(line)) for line in lines[1:]], sound
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PlanError(
            f"{path} is not a file of rowtune records: give --fresh to begin anew, or another -o"
        ) from error


def readable_records(path: Path) -> tuple[list[Record], int]:
    """The records of a file that may be damaged, and how many lines are none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    found, bad = [], 0
    for line in lines:
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            bad += 1
    return found, bad


def _truncate_torn_line(path: Path) -> None:
    data = path.read_bytes()
    with open(path, "r+b") as out:
        out.truncate(data.rfind(b"\n") + 1)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing in which two studies differ."""
    for key in (*wanted, *found):
        if found.get(key) != wanted.get(key):
            return f"{key} is {found.get(key)}, now {wanted.get(key)}"
    return "same"


def correction(records: Sequence[Record], overhead: int) -> float:
    """Measured over predicted peak, as seen so far; `overhead` is what the device takes beside tensors."""
    ratios = [((r.peak_bytes or 0) - overhead) / r.predicted_bytes for r in records
              if r.ok and r.predicted_bytes]  # fmt: skip
    return min(max(statistics.median(ratios), 0.8), 1.5) if ratios else 1.0


def front(records: Sequence[Record]) -> list[Record]:
    """The Pareto set: no other is both smaller and faster. By increasing peak."""
    kept: list[Record] = []
    for record in sorted((r for r in records if r.ok), key=lambda r: (r.peak_bytes, r.step_seconds)):
        assert record.step_seconds is not None
        if not kept or record.step_seconds < (kept[-1].step_seconds or 0.0):
            kept.append(record)
    return kept
