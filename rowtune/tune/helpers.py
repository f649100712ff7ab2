"""Local processes that work on the same study as this one: a card each, or a share of the processor."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rowtune.tune.supervisor import python_path

if TYPE_CHECKING:
    from rowtune.tune.find import Request


class Helpers:
    """`count` more processes for a request whose storage is given; on cards one for each of the next ones."""

    def __init__(self, request: Request, budget: int, count: int) -> None:
        self.wanted = [_asked(request, budget, i + 1) for i in range(count)]
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        for asked in self.wanted:
            process = subprocess.Popen(
                [sys.executable, "-m", "rowtune.tune.helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": python_path()},
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            self._started.append(process)

    def stop(self) -> None:
        """End them: a plan that one is measuring is lost."""
        for process in self._started:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        self._started = []


def _asked(request: Request, budget: int, number: int) -> dict[str, Any]:
    problem = request.work.problem
    if problem.device.startswith("cuda"):
        first = int(problem.device.partition(":")[2] or 0)
        problem = replace(problem, device=f"cuda:{first + number}")
    return {
        "problem": problem.to_dict(), "budget": budget, "reserve": request.reserve, "trials": request.trials,
        "timeout": None if request.timeout == float("inf") else request.timeout,
        "seed": request.seed + 1000 * number, "savers": sorted(request.savers), "storage": request.storage,
        "max_grad_error": request.max_grad_error, "host_budget": request.host_budget,
    }  # fmt: skip


def most(device: str) -> int:
    """Local workers that do not share what they measure on: one a card, one a processor core."""
    if device.startswith("cuda"):
        return torch.cuda.device_count() - int(device.partition(":")[2] or 0)
    return os.cpu_count() or 1


def share_threads(workers: int) -> None:
    """Give each worker on this processor its share of the cores, this process's own measurements too."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
