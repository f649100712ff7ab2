"""One study, several processes: on a journal file, behind a gRPC proxy, on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from test_front import MODEL, call
from test_tune_study import Bench, optimum, task

from rowtune.errors import UsageError
from rowtune.tune.records import RecordFile
from rowtune.tune.shared import Shared, open_storage
from rowtune.tune.study import search

KIND = {"machine": "a processor", "torch": "2"}
WORKER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_shared import KIND
from test_tune_study import Bench, task
from rowtune.tune.shared import Shared
from rowtune.tune.study import search

url, trials, count, here = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])

def wait(plan, number):
    # With the first plan, until all have one.
    (here / str(os.getpid())).touch()
    while len(list(here.iterdir())) < count:
        time.sleep(0.01)

bench = Bench(wait)
result = search(task(bench, trials=trials, limit=500_000, shared=Shared(url, "one", KIND)))
known = sorted(r.digest for r in result.records if r.ok)
best = [result.best.step_seconds, result.best.peak_bytes]
print(json.dumps([bench.asked, best, known, result.plain.step_seconds]))
"""


def work_together(url: str, here: Path, count: int = 2, trials: int = 30) -> list[Any]:
    """What each process was asked to measure, its best plan, all it knows of, and plain's time."""
    (here / "at work").mkdir()
    words = [sys.executable, "-c", WORKER, str(Path(__file__).parent), url, str(trials), str(count)]
    started = [
        subprocess.Popen([*words, str(here / "at work")], stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    ended = [process.communicate(timeout=300)[0] for process in started]
    return [json.loads(out) for out in ended]


def check(found: list[Any], trials: int) -> None:
    """All together measured what one would have, no plan twice, and know of each other's."""
    quick = [[name for name, how in asked if how == "quick" and name != "plain"] for asked, *_ in found]
    together = [name for names in quick for name in names]
    assert len(together) == len(set(together)) and trials <= len(together) < trials + len(found)
    assert all(quick)
    for own, (_, best, known, plain) in zip(quick, found, strict=True):
        assert set(own) <= set(known) <= set(together) and len(known) >= trials and plain == 0.9
        assert best[0] <= 1.1 * optimum(500_000) and best[1] <= 500_000


def test_two_processes_share_a_journal(tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'study.journal'}"
    check(work_together(url, tmp_path), 30)
    # A third that comes later finds all done.
    bench = Bench()
    result = search(task(bench, trials=30, limit=500_000, shared=Shared(url, "one", KIND)))
    assert bench.runs("quick") == [] and result.measured >= 30 and ("plain", "quick") not in bench.asked
    # Any of Optuna's tools opens it, and shows what happened.
    study = optuna.load_study(study_name="one", storage=open_storage(url))
    shown = [t for t in study.trials if t.user_attrs.get("status") == "ok"]
    assert len(shown) >= 30 and study.best_value == result.best.step_seconds
    # Another kind of device is refused.
    with pytest.raises(UsageError, match=r"measured with machine a processor, and this is a card: their"):
        Shared(url, "one", {**KIND, "machine": "a card"})


def test_a_shared_study_takes_over_what_was_measured_alone(tmp_path: Path) -> None:
    path, url = tmp_path / "r.jsonl", f"journal:{tmp_path / 'study.journal'}"
    alone = search(task(Bench(), path=path, trials=6))
    bench = Bench()
    shared = Shared(url, "one", KIND)
    search(task(bench, path=path, trials=9, shared=shared))
    assert len(bench.runs("quick")) == 3
    other = Bench()
    result = search(task(other, records=RecordFile(None, {}), trials=9, shared=Shared(url, "one", KIND)))
    assert other.runs("quick") == [] and result.measured == 9
    assert {r.digest for r in alone.records if r.ok} <= {r.digest for r in result.records}


def test_a_plan_is_claimed_once(tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'study.journal'}"
    first, second = (Shared(url, "one", KIND) for _ in range(2))
    second.me = f"{second.me.rpartition(':')[0]}:1"  # a process that lives
    a, b = first.study.ask(), second.study.ask()
    assert first.claim(a, "plan") and not second.claim(b, "plan")
    assert second.claim(second.study.ask(), "another")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    first.me = f"{first.me.rpartition(':')[0]}:{gone.pid}"
    assert first.claim(first.study.ask(), "left behind")
    assert second.claim(second.study.ask(), "left behind")  # whoever began it is dead


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("study.log", r"--storage is journal:FILE, grpc://HOST:PORT"),
        ("journal:no/such/folder/x", r"--storage journal:no/such/folder/x cannot be"),
        ("nothing://there", r"--storage nothing://there cannot be opened"),
        ("sqlite:////no/such/folder/x.db", r"--storage sqlite.* cannot be"),
    ],
)
def test_storages_that_are_none(url: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Shared(url, "one", KIND)


def test_a_password_is_not_shown() -> None:
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    with pytest.raises(UsageError, match=r"postgresql://me:\*\*\*@127.0.0.1:1/x cannot be"):
        open_storage("postgresql://me:secret@127.0.0.1:1/x")


def test_behind_a_grpc_proxy(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = (
        "import optuna, sys; optuna.storages.run_grpc_proxy_server("
        "optuna.storages.RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    url = f"sqlite:///{tmp_path / 'study.db'}"
    server = subprocess.Popen([sys.executable, "-c", serve, url, str(port)], stderr=subprocess.DEVNULL)
    try:
        proxy = open_storage(f"grpc://127.0.0.1:{port}")
        proxy.wait_server_ready(timeout=120)
        bench = Bench()
        search(task(bench, trials=6, shared=Shared(f"grpc://127.0.0.1:{port}", "one", KIND)))
        assert len(bench.runs("quick")) == 6
    finally:
        server.kill()
        server.wait()
    again = Bench()
    result = search(task(again, trials=6, shared=Shared(url, "one", KIND)))  # as the database is
    assert again.runs("quick") == [] and result.measured == 6


def binary(name: str) -> str | None:
    """A program of PostgreSQL's server, which distributions keep out of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(places[-1]) if places else None)


@contextmanager
def postgres() -> Iterator[str]:
    """A server of our own, on a socket in a folder of its own; as root it runs as nobody."""
    initdb, server = binary("initdb"), binary("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL server is installed (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    folder = tempfile.mkdtemp(prefix="rowtune-")
    as_user: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    if as_user:
        shutil.chown(folder, "nobody")
    data, quiet = f"{folder}/data", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [initdb, "-D", data, "-U", "rowtune", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
    made = subprocess.run(words, cwd=folder, capture_output=True, text=True, **as_user)
    assert made.returncode == 0, made.stderr
    running = subprocess.Popen(
        [server, "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
        cwd=folder, **quiet, **as_user,
    )  # fmt: skip
    try:
        import psycopg

        for _ in range(6000):
            try:
                psycopg.connect(host=folder, user="rowtune", dbname="postgres").close()
                break
            except psycopg.OperationalError:
                assert running.poll() is None, "the server ended"
                subprocess.run(["sleep", "0.05"], check=True)
        yield f"postgresql://rowtune@/postgres?host={folder}"
    finally:
        running.terminate()
        running.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_processes_share_a_real_postgresql(tmp_path: Path) -> None:
    with postgres() as url:
        check(work_together(url, tmp_path, trials=12), 12)


def measured_once() -> set[str]:
    """What the workers of the study measured, each plan once."""
    study = optuna.load_study(study_name=None, storage=open_storage("journal:plan.journal"))
    assert any("worker" in t.user_attrs for t in study.trials)
    tried = [t.user_attrs["digest"] for t in study.trials if t.user_attrs.get("status") == "ok"]
    assert len(tried) == len(set(tried))
    return set(tried)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_search_with_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is typed; whoever measured it, a plan is tried once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["search", *MODEL, "--budget", "70%", "--trials", "4", "--workers", "2"]
    found = call(*words)
    assert found["status"] == "ok" and 1 <= found["trials"]  # it may end where no plan can win
    assert Path("plan.journal").exists()
    tried = measured_once()
    again = call(*words)  # all is known the next time; with more of its options recorded it may find another
    assert tried <= measured_once() and found["trials"] <= again["trials"] <= 4
    refused = call(*words[:-1], "999", code=2)
    assert "--workers 999: there are" in refused["error"]
