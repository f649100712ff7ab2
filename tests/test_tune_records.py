"""Records: appended, torn, replayed, and kept apart by study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rowtune.errors import PlanError, UsageError
from rowtune.plan.plan import Plan, Segment
from rowtune.tune.records import PLAIN, Record, RecordFile, digest, front, read_records

STUDY = {"fingerprint": "abc", "device": "cpu"}


def record(name: str, peak: int | None = 100, seconds: float | None = 1.0, status: str = "ok") -> Record:
    return Record(name, status, values={"k": name}, peak_bytes=peak, step_seconds=seconds)


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, STUDY)
    for name in "abc":
        file.append(record(name))
    file.append(Record(PLAIN, "ok", peak_bytes=9, step_seconds=2.0))
    again = RecordFile(path, STUDY)
    assert again.records == file.records
    assert list(again.latest()) == ["a", "b", "c"]
    assert again.plain() == Record(PLAIN, "ok", peak_bytes=9, step_seconds=2.0)


def test_the_latest_record_of_a_plan_counts(tmp_path: Path) -> None:
    file = RecordFile(None, STUDY)
    file.append(record("a", 100))
    file.append(record("a", 120))
    assert [r.peak_bytes for r in file.latest().values()] == [120]


def test_every_cut_of_the_last_line_loses_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, STUDY)
    for name in "abc":
        file.append(record(name))
    data = path.read_bytes()
    last = len(data[:-1].rpartition(b"\n")[2]) + 1
    for cut in range(1, last):
        path.write_bytes(data[:-cut])
        again = RecordFile(path, STUDY)
        assert [r.digest for r in again.records] == ["a", "b"]
        again.append(record("d"))
        assert [r.digest for r in read_records(path)[1]] == ["a", "b", "d"]


def test_another_study_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, STUDY).append(record("a"))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"device is cpu, now cuda.*--fresh"):
        RecordFile(path, {**STUDY, "device": "cuda:0"})
    assert path.read_bytes() == before
    assert RecordFile(path, {**STUDY, "device": "cuda:0"}, fresh=True).records == []


@pytest.mark.parametrize(
    "text", ["", "hello\n", "{}\n", '{"rowtune_records": 9, "study": {}}\n', "[1]\n", "null\n"]
)
def test_what_is_no_record_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(PlanError, match="--fresh"):
        RecordFile(path, STUDY)
    assert path.read_text() == text


def test_a_broken_line_in_the_middle_is_not_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, STUDY).append(record("a"))
    path.write_text(path.read_text() + "garbage\n" + json.dumps({"digest": "b", "status": "ok"}) + "\n")
    with pytest.raises(PlanError):
        read_records(path)


def test_front_is_the_pareto_set() -> None:
    records = [
        record("big", 300, 1.0),
        record("small", 100, 3.0),
        record("beaten", 310, 2.0),
        record("middle", 200, 2.0),
        record("as big", 300, 1.5),
        record("failed", None, None, "oom"),
    ]
    assert [r.digest for r in front(records)] == ["small", "middle", "big"]


def test_digest_is_of_the_decisions() -> None:
    one, same = Plan((Segment("a", "b", "rows", 8),)), Plan((Segment("a", "b", "rows", 8),))
    assert digest(one) == digest(same) != digest(Plan((Segment("a", "b", "rows", 9),)))
