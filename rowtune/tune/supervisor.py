"""The parent's side of the worker: it starts it, asks it, and survives its end.

A trial that runs out of memory, crashes or hangs costs a worker, never the search: it becomes a status with
a reason, and the next trial gets a fresh process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rowtune.cost.profile import Profile
from rowtune.errors import ModelError
from rowtune.plan.plan import Plan
from rowtune.problem import Problem
from rowtune.runtime.blank import Signature
from rowtune.tune.calibrate import packed
from rowtune.tune.measurement import Contender, Effort, Measurement, Timing

OPEN_TIMEOUT = 600.0


class Worker:
    """Measures plans of one problem in a process of its own, started when first needed.

    Use as a context manager. `budget` is the hard cap on CUDA.
    """

    def __init__(self, problem: Problem, budget: int | None = None) -> None:
        self._problem, self._budget = problem, budget
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: IO[bytes] | None = None
        self._overhead = 0
        self.starts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(
        self,
        plan: Plan | None,
        effort: Effort = "quick",
        timeout: float = 600.0,
        worth_seconds: float = math.inf,
    ) -> Measurement:
        """Measure a plan (None: plain PyTorch). Every way of failing is a status.

        Raises:
            ModelError: the worker cannot even load the model.
        """
        worth = worth_seconds if math.isfinite(worth_seconds) else None
        request = {"do": "measure", "plan": _decisions(plan), "effort": effort, "worth": worth}
        self.open()
        result = self._ask(request, timeout)[0]
        if result.status == "crash" and self._problem.device != "cpu":
            self.close()  # an error of a card's context stays: the next trial gets a process of its own
        return result

    def race(
        self, contenders: Sequence[Contender], rounds: int, timeout: float = 600.0
    ) -> list[Timing | None]:
        """Step times of plans that take turns; None for one that fails, or for all where the worker does."""
        plans = [[_decisions(c.plan), c.threads] for c in contenders]
        self.open()
        result, answer = self._ask({"do": "race", "plans": plans, "rounds": rounds}, timeout)
        if result.status != "ok":
            return [None] * len(contenders)
        return [None if taken is None else Timing(*taken) for taken in answer]

    def calibrate(
        self, work: Mapping[Signature, float], known: Profile | None, seconds: float
    ) -> Profile | None:
        """The device's profile with these calls, timed for so many seconds; None where that fails."""
        self.open()
        given = None if known is None else known.to_dict()
        request = {"do": "calibrate", "work": packed(work), "profile": given, "seconds": seconds}
        result, answer = self._ask(request, 2 * seconds + 60)
        return Profile.from_dict(answer) if result.status == "ok" else None

    @property
    def overhead_bytes(self) -> int:
        """What the device takes beside tensors: a context, libraries. 0 on the CPU."""
        self.open()
        return self._overhead

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def open(self) -> None:
        """Start the process, unless it runs."""
        if self._process is not None:
            return
        self._errors = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C is the parent's to handle.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rowtune.tune.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": python_path()},
        )
        self.starts += 1
        self._replies = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        request = {"do": "open", "problem": self._problem.to_dict(), "budget": self._budget}
        result, answer = self._ask(request, OPEN_TIMEOUT)
        if result.status != "ok":
            self.close()
            raise ModelError(f"the worker could not load {self._problem.model}: {result.reason}")
        self._overhead = int(answer)

    def _ask(self, request: dict[str, Any], timeout: float) -> tuple[Measurement, Any]:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.close()
            return Measurement("timeout", f"stopped after {timeout:.0f} s"), None
        except BrokenPipeError:
            line = None
        except BaseException:  # Ctrl-C: the trial is lost, the worker must not run on
            self.close()
            raise
        if line is None:
            return self._post_mortem(), None
        reply = json.loads(line)
        return Measurement(**reply["measurement"]), reply["answer"]

    def _post_mortem(self) -> Measurement:
        """Why the process is gone."""
        assert self._process is not None
        code = self._process.wait()
        last = self._last_error()
        self.close()
        if code == -signal.SIGKILL:
            return Measurement("oom", "killed (signal 9), as the system does when memory runs out")
        if code < 0:
            return Measurement("crash", f"the worker died of {signal.Signals(-code).name}{last}")
        return Measurement("crash", f"the worker left with code {code}{last}")

    def _last_error(self) -> str:
        assert self._errors is not None
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""


def _decisions(plan: Plan | None) -> dict[str, Any] | None:
    return None if plan is None else plan.to_dict()


def _read(stream: IO[str] | None, replies: queue.SimpleQueue[str | None]) -> None:
    assert stream is not None
    with contextlib.suppress(ValueError):  # closed by the parent
        for line in stream:
            replies.put(line)
    replies.put(None)


def python_path() -> str:
    """The parent's own import path, so that a factory it found is found by the worker too."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
