"""The worker survives whatever a model does to it: killed, aborted, hanging, out of memory, noisy."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rowtune.errors import ModelError
from rowtune.importers.source import parse_source
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.uniform import uniform_plan
from rowtune.tune.measurement import Contender
from rowtune.tune.step import Workload, define
from rowtune.tune.supervisor import Worker

FACTORY = '''
"""A network that does what the file `fault` says, unless it is being exported."""
import ctypes, os, pathlib, signal, sys, time
import torch
from torch import nn

def fault():
    path = pathlib.Path(__file__).with_name("fault")
    return path.read_text() if path.exists() else ""

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        if torch.compiler.is_exporting() and fault() == "doze while tracing":
            time.sleep(3.5)
        if not torch.compiler.is_exporting():
            kind = fault()
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "abort":
                os.abort()
            if kind == "exit":
                print("about to leave", file=sys.stderr, flush=True)
                os._exit(3)
            if kind == "sleep":
                time.sleep(60)
            if kind == "memory":
                torch.empty(1 << 50)
            if kind == "python memory":
                raise MemoryError
            if kind == "raise":
                raise ValueError("bad\\nday")
            if kind == "print":
                print("noise {not json")
                os.write(1, b"more noise")
        return self.conv(x).relu()

def net():
    if fault() == "load":
        raise RuntimeError("no weights")
    return Net()
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workload, Path]]:
    folder = tmp_path_factory.mktemp("worker")
    (folder / "faulty_factory.py").write_text(FACTORY)
    sys.path.insert(0, str(folder))
    yield define(parse_source("faulty_factory:net"), ["1x2x8x8"]), folder / "fault"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def worker(work: tuple[Workload, Path]) -> Iterator[Worker]:
    with Worker(work[0].problem) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "status", "says", "restarts"),
    [
        ("raise", "crash", "ValueError: bad", False),
        ("memory", "oom", "", False),
        ("python memory", "oom", "", False),
        ("print", "ok", "", False),
        ("kill", "oom", "signal 9", True),
        ("abort", "crash", "SIGABRT", True),
        ("exit", "crash", "about to leave", True),
        ("sleep", "timeout", "after 2 s", True),
    ],
)
def test_every_end_is_a_status_and_the_next_trial_works(
    work: tuple[Workload, Path], worker: Worker, kind: str, status: str, says: str, restarts: bool
) -> None:
    assert worker.measure(None).status == "ok"
    starts = worker.starts
    work[1].write_text(kind)
    try:
        result = worker.measure(None, timeout=2.0 if kind == "sleep" else 120.0)
    finally:
        work[1].unlink()
    assert result.status == status and says in result.reason
    if status != "ok":
        assert result.peak_bytes is None and result.step_seconds is None
    healed = worker.measure(None)
    assert healed.status == "ok" and (healed.peak_bytes or 0) > 0 and (healed.step_seconds or 0) > 0
    assert worker.starts == starts + restarts


def test_a_plan_is_verified_timed_and_metered(work: tuple[Workload, Path], worker: Worker) -> None:
    plan = uniform_plan(work[0].graph, "rows", 4)
    quick = worker.measure(plan)
    assert quick.status == "ok" and quick.allocator_peak_bytes is None
    assert quick.max_relative_error is not None and quick.max_relative_error < 1e-3
    full = worker.measure(plan, "full")
    assert (full.allocator_peak_bytes or 0) > 0 and full.peak_bytes == quick.peak_bytes
    assert (full.activation_bytes or 0) < (full.peak_bytes or 0)


def test_contenders_take_turns(work: tuple[Workload, Path], worker: Worker) -> None:
    plan = uniform_plan(work[0].graph, "rows", 4)
    unknown = Plan((Segment("nonsense", "loss"),))
    timings = worker.race([Contender(None), Contender(plan), Contender(unknown), Contender(plan, 1)], 2)
    assert timings[2] is None
    found = [t for t in timings if t is not None]
    assert len(found) == 3 and all(t.seconds > 0 and t.cpu_seconds > 0 for t in found)
    assert worker.measure(plan).status == "ok"
    work[1].write_text("kill")  # plain runs into it, and with it the worker
    try:
        assert worker.race([Contender(None), Contender(plan)], 1) == [None, None]
    finally:
        work[1].unlink()
    assert worker.overhead_bytes == 0


def test_a_slow_plan_is_stopped(work: tuple[Workload, Path], worker: Worker) -> None:
    plan = uniform_plan(work[0].graph, "rows", 4)
    assert worker.measure(plan, worth_seconds=1e-9).status == "slow"
    assert worker.measure(plan, worth_seconds=1e9).status == "ok"


def test_the_first_step_is_never_the_step_time(work: tuple[Workload, Path], worker: Worker) -> None:
    """It traces and lowers: with a sleep in it, which every trace runs into, a warm step shows none of it."""
    work[1].write_text("doze while tracing")
    try:
        made = worker.measure(uniform_plan(work[0].graph, "rows", 4))
    finally:
        work[1].unlink()
    assert made.status == "ok" and (made.step_seconds or 9) < 2.0


def test_a_timeout_that_is_over_is_one(work: tuple[Workload, Path], worker: Worker) -> None:
    assert worker.measure(None, timeout=-1.0).status == "timeout"
    assert worker.measure(None).status == "ok"


def test_after_a_crash_on_a_card_the_next_trial_gets_a_process_of_its_own(
    work: tuple[Workload, Path], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.open()
    starts = worker.starts
    work[1].write_text("raise")
    try:
        assert worker.measure(None).status == "crash" and worker._process is not None
        with monkeypatch.context() as patch:
            patch.setattr(worker, "_problem", replace(work[0].problem, device="cuda:0"))
            assert worker.measure(None).status == "crash" and worker._process is None
    finally:
        work[1].unlink()
    assert worker.measure(None).status == "ok" and worker.starts == starts + 1


def test_measuring_does_not_change_what_is_measured(work: tuple[Workload, Path], worker: Worker) -> None:
    plan = uniform_plan(work[0].graph, "keep")
    first, plain, again = worker.measure(plan), worker.measure(None), worker.measure(plan)
    assert first.peak_bytes == again.peak_bytes and first.max_relative_error == again.max_relative_error
    assert plain.max_relative_error is None


def test_a_plan_for_another_graph_is_rejected_with_the_reason(worker: Worker) -> None:
    result = worker.measure(Plan((Segment("nonsense", "loss"),)))
    assert result.status == "rejected" and "nonsense" in result.reason


def test_a_model_that_does_not_load_is_an_error(work: tuple[Workload, Path]) -> None:
    work[1].write_text("load")
    try:
        with Worker(work[0].problem) as worker, pytest.raises(ModelError, match="no weights"):
            worker.measure(None)
    finally:
        work[1].unlink()


def test_the_worker_dies_with_its_parent(work: tuple[Workload, Path]) -> None:
    """Its parent's end of the pipe closes: it leaves, though nobody tells it to."""
    with Worker(work[0].problem) as worker:
        assert worker.measure(None).status == "ok"
        process = worker._process
        assert process is not None and process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 0


def test_closing_ends_a_running_trial(work: tuple[Workload, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the parent: the worker, in mid-trial, is gone when the error reaches the caller."""
    work[1].write_text("sleep")
    worker = Worker(work[0].problem)
    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        worker.open()
        assert worker._process is not None
        pid = worker._process.pid
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            worker.measure(None, timeout=50.0)
        time.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
        work[1].unlink()
        worker.close()
