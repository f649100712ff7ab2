"""The process that measures: `python -m rowtune.tune.worker`, JSON lines in, JSON lines out.

Requests: {"do": "open", "problem": ..., "budget": bytes or null} and {"do": "measure", "plan": decisions or
null, "effort": "quick" or "full"}. One reply a request. What the model prints goes to stderr, and when the
parent dies (its end of the pipe closes) so does this process, even in mid-step.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import warnings
from typing import IO, Any


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, requests), daemon=True).start()
    warnings.simplefilter("ignore")
    serve(requests, replies)


def _listen(stream: IO[str], requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in stream:
        requests.put(json.loads(line))
    os._exit(0)


def serve(requests: queue.SimpleQueue[dict[str, Any]], replies: IO[str]) -> None:
    """One reply line a request."""
    from rowtune.plan.file import Problem
    from rowtune.plan.plan import Plan
    from rowtune.tune.device import cap_memory
    from rowtune.tune.measure import Bench
    from rowtune.tune.measurement import Measurement, failure

    bench: Bench | None = None
    while True:
        request = requests.get()
        try:
            if request["do"] == "open":
                problem = Problem.from_dict(request["problem"])
                if problem.device == "cpu":
                    cap_memory("cpu", None)
                bench = Bench(problem, request["budget"])
                answer = Measurement("ok")
            else:
                assert bench is not None
                plan = None if request["plan"] is None else Plan.from_dict(request["plan"])
                answer = bench.measure(plan, request["effort"])
        except Exception as error:
            answer = failure(error)
        replies.write(json.dumps(answer.to_dict()) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
