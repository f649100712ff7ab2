"""Options that an earlier search of the same graph recorded."""

from __future__ import annotations

import os
import pickle
import zlib
from itertools import islice
from pathlib import Path

import pytest
from test_programme import graph, record

from rowtune.cost.candidates import first
from rowtune.cost.programme import fastest
from rowtune.cost.table import Table, within
from rowtune.errors import RowtuneError
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.tables import MOST, CachedTables, packed, unpacked
from rowtune.tune.task import Situation


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ROWTUNE_CACHE", str(tmp_path))
    return tmp_path


def some(name: str = "unet_bn", count: int = 60) -> Table:
    made = Table(graph(name))
    made.add(islice(first(made), count), within(60))
    return made


def test_options_survive_a_file():
    made, other = some(), Table(graph("unet_bn"))
    CachedTables("cpu").remember(made)
    CachedTables("cpu").recall(other)
    assert other.known == made.known and other.sizes == made.sizes and other.work() == made.work()
    one, two = fastest(made, 1 << 60), fastest(other, 1 << 60)
    assert one is not None and one == two
    assert [made.seconds(o) for o in made.options] == [other.seconds(o) for o in other.options]


def test_a_search_begins_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch):
    """Nothing is recorded twice, and what is found is at least as fast."""
    recorded = []
    real = Table._recorded

    def counted(self: Table, *key):
        recorded.append(key)
        return real(self, *key)

    monkeypatch.setattr(Table, "_recorded", counted)
    times = []
    for _ in range(2):
        made = ProgrammeSpace(graph("unet"), 1, tables=CachedTables("cpu"))
        made.tell(Situation(1e9, record(None, 0.05), (), 1e9))
        path = fastest(made.table, 1 << 60)
        assert path is not None
        times.append(path.seconds)
    assert recorded and len(set(recorded)) == len(recorded)
    assert times[1] <= times[0]


def test_other_graphs_devices_and_dtypes_have_tables_of_their_own():
    kinds = (
        (CachedTables("cpu"), Table(graph("unet"))), (CachedTables("cuda:0"), Table(graph("unet"))),
        (CachedTables("cpu"), Table(graph("unet_bn"))), (CachedTables("cpu"), Table(graph("unet"), axis=3)),
        (CachedTables("cpu"), Table(graph("unet"), whole={"dtype": "bf16"})),
        (CachedTables("cpu"), Table(graph("unet"), max_grad_error=0.1)),
    )  # fmt: skip
    assert len({tables.path(table) for tables, table in kinds}) == len(kinds)


@pytest.mark.parametrize("spoil", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: zlib.compress(b"x")])
def test_what_cannot_be_read_is_no_table(spoil):
    CachedTables("cpu").remember(some(count=4))
    path = CachedTables("cpu").path(some(count=4))
    path.write_bytes(spoil(path.read_bytes()))
    made = Table(graph("unet_bn"))
    CachedTables("cpu").recall(made)
    assert not made.known


def test_a_file_runs_no_code():
    class Hostile:
        def __reduce__(self):
            return os.system, ("exit 1",)

    for thing in (Hostile(), {"a": 1}):
        with pytest.raises(RowtuneError, match=r"no part of an option|not a table of options"):
            unpacked(zlib.compress(pickle.dumps(thing)))
    assert unpacked(packed(some(count=2).kept)).known


def test_the_folder_does_not_grow_for_ever(cache: Path):
    folder = cache / "tables"
    folder.mkdir()
    for n in range(MOST + 5):
        old = folder / f"{n}.bin"
        old.write_bytes(b"")
        os.utime(old, (n, n))
    made = some(count=1)
    CachedTables("cpu").remember(made)
    left = {p.name for p in folder.iterdir()}
    assert len(left) == MOST and CachedTables("cpu").path(made).name in left and "0.bin" not in left


def test_a_cache_that_cannot_be_written_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROWTUNE_CACHE", str(tmp_path / "file"))
    CachedTables("cpu").remember(some(count=1))
    CachedTables("cpu").recall(some(count=1))
