"""A process that takes part in a search of this machine: `rowtune search --workers N` starts them.

`python -m rowtune.tune.helper` reads one line of JSON and takes part until there is nothing left, or its
parent is gone. It has a process of its own that measures.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import IO

from rowtune.problem import Problem
from rowtune.tune.find import Request, explored
from rowtune.tune.step import prepare


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, args=(sys.stdin,), daemon=True).start()
    warnings.simplefilter("ignore")
    timeout = float("inf") if asked["timeout"] is None else asked["timeout"]
    request = Request(
        prepare(Problem.from_dict(asked["problem"])), asked["budget"], Path("plan.json"), asked["trials"],
        timeout, asked["seed"], asked["reserve"], savers=frozenset(asked["savers"]), storage=asked["storage"],
        max_grad_error=asked["max_grad_error"], host_budget=asked["host_budget"],
    )  # fmt: skip
    explored(request)


def _listen(stream: IO[str]) -> None:
    for _ in stream:
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
