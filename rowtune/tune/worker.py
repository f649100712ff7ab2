"""The process that measures: `python -m rowtune.tune.worker`, JSON lines in, JSON lines out.

Requests: {"do": "open", "problem": ..., "budget": bytes or null}, answered with the device's overhead;
{"do": "measure", "plan": decisions or null, "effort": "quick" or "full", "worth": seconds or null};
{"do": "calibrate", "work": packed calls, "profile": profile or null, "seconds": n}, answered with a profile;
and {"do": "race", "plans": [[decisions or null, threads], ...], "rounds": n}, answered with [seconds,
processor seconds] or null for each. One reply a request: {"measurement": ..., "answer": ...}. What the model
prints goes to stderr, and when the parent dies (its end of the pipe closes) so does this process, even in
mid-step.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import warnings
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rowtune.plan.plan import Plan
    from rowtune.tune.measure import Bench


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
    from rowtune.problem import Problem
    from rowtune.tune.device import guard_host, keep_freed_memory
    from rowtune.tune.measure import Bench
    from rowtune.tune.measurement import Measurement, failure

    bench: Bench | None = None
    while True:
        request = requests.get()
        result = Measurement("ok")
        answer: Any = None
        try:
            if request["do"] == "open":
                problem = Problem.from_dict(request["problem"])
                if problem.device == "cpu":  # a card's driver reserves more addresses than there is memory
                    guard_host()
                    keep_freed_memory()
                bench = Bench(problem, request["budget"])
                answer = bench.overhead_bytes
            elif request["do"] == "calibrate":
                assert bench is not None
                answer = _calibrated(bench.device, request)
            elif request["do"] == "race":
                assert bench is not None
                answer = _race(bench, request)
            else:
                assert bench is not None
                worth = math.inf if request["worth"] is None else request["worth"]
                result = bench.measure(_plan(request["plan"]), request["effort"], worth)
        except Exception as error:
            result = failure(error)
        replies.write(json.dumps({"measurement": result.to_dict(), "answer": answer}) + "\n")
        replies.flush()


def _plan(decisions: dict[str, Any] | None) -> Plan | None:
    from rowtune.plan.plan import Plan

    return None if decisions is None else Plan.from_dict(decisions)


def _calibrated(device: str, request: dict[str, Any]) -> dict[str, Any]:
    from rowtune.cost.profile import Profile
    from rowtune.tune.calibrate import calibrated, unpacked

    known = None if request["profile"] is None else Profile.from_dict(request["profile"])
    return calibrated(known, unpacked(request["work"]), device, request["seconds"]).to_dict()


def _race(bench: Bench, request: dict[str, Any]) -> Any:
    from rowtune.tune.measurement import Contender

    contenders = [Contender(_plan(decisions), threads) for decisions, threads in request["plans"]]
    return bench.race(contenders, request["rounds"])


if __name__ == "__main__":
    main()
