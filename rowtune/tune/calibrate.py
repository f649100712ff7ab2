"""A device's profile: calls of a model's own recordings, run and timed on their own.

Only sizes that its plans ask for are measured, a few of each family (rowtune/cost/families.py), those that
are thought to take most of a step first, for as long as there is time.
"""

from __future__ import annotations

import base64
import functools
import pickle
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rowtune.cost.families import FREE, Sized, is_value, named, sized
from rowtune.cost.profile import HOST_BOUND, Profile
from rowtune.plan.lower import uncollected
from rowtune.runtime.blank import Like, Signature
from rowtune.torch_private import below_autograd
from rowtune.tune.device import device_name, step_clock, synchronize

APART = 4
"""Sizes of one family are measured when they are this many times apart."""
LONG = 1.0
"""Seconds: a call that is thought to take longer is not measured where a smaller one was."""
RATED = 8
"""Calls that make a rate."""
COLD_TIMES, CLEAR, ELSEWHERE = 3, 1e-4, 1 << 23
"""How often a call is measured with nothing in caches; seconds of one that a clock can tell; elements to read
before."""
BOX, MOST = 0.03, 9
"""Seconds that one call is measured for, and how often at most."""


def calibrated(
    profile: Profile | None,
    work: Mapping[Signature, float],
    device: str,
    seconds: float,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Profile:
    """The profile with what is missing of these calls.

    Args:
        profile: of this device; None begins one.
        work: calls, and how much each of them matters (how often plans call it, say).
        seconds: after which no more calls are measured.
        watch: told how many were measured, of how many.
    """
    started = time.perf_counter()
    profile = profile or fresh(device)
    if device != "cpu":
        work = warm(work)
    wanted = missing(profile, work)
    timed: list[tuple[Sized, float]] = []
    for done, (call, at) in enumerate(wanted):
        if time.perf_counter() - started > seconds:
            break
        curve = profile.curves.get(at.family)
        if curve and curve[-1][0] < at.size and profile.rough(at) > LONG:
            continue
        taken = measured(call, device)
        if taken is not None:
            taken = float(f"{taken:.4g}")
            profile = profile.with_curves({at.family: [(at.size, taken)]})
            timed.append((at, taken))
        watch(done + 1, len(wanted))
    return rated(profile, timed)


def warm(work: Mapping[Signature, float]) -> dict[Signature, float]:
    """Calls whatever is in caches: a card's hold little beside feature maps."""
    found: dict[Signature, float] = {}
    for call, often in work.items():
        call = call._replace(cold=False)
        found[call] = found.get(call, 0.0) + often
    return found


def rated(profile: Profile, timed: Sequence[tuple[Sized, float]]) -> Profile:
    """The profile with rates for what nobody measures: medians over calls that arithmetic bounds, and over
    those that memory does, by the profile's own rates; too few of a kind leave the rate as it is."""
    bound: dict[bool, list[float]] = {True: [], False: []}
    for at, taken in timed:
        if taken > HOST_BOUND * profile.call_seconds:
            busy = at.operations / profile.operations_per_second > at.bytes / profile.bytes_per_second
            bound[busy].append((at.operations if busy else at.bytes) / taken)
    rates = (profile.operations_per_second, profile.bytes_per_second)
    fast, wide = (
        statistics.median(found) if len(found) >= RATED else rate
        for found, rate in zip((bound[True], bound[False]), rates, strict=True)
    )
    return replace(profile, operations_per_second=fast, bytes_per_second=wide)


def fresh(device: str) -> Profile:
    """A profile of which only the host's own share is known."""
    name = device_name(device)
    threads = torch.get_num_threads() if device == "cpu" else 0
    return Profile(name, threads, str(torch.__version__), call_seconds=_call_seconds())


def missing(profile: Profile, work: Mapping[Signature, float]) -> list[tuple[Signature, Sized]]:
    """Calls to be measured: of each family the smallest and the largest size, and some between; what is
    thought to take most comes first, and of a family the smallest size."""
    families: dict[str, list[tuple[Signature, Sized]]] = {}
    weight: dict[str, float] = {}
    for call, often in work.items():
        if call.op in FREE:
            continue
        at = sized(call)
        if not at.size:
            continue
        families.setdefault(at.family, []).append((call, at))
        weight[at.family] = weight.get(at.family, 0.0) + often * profile.rough(at)
    found: list[tuple[Signature, Sized]] = []
    for family in sorted(families, key=lambda f: -weight[f]):
        ordered = sorted(families[family], key=lambda item: item[1].size)
        known = [n for n, _ in profile.curves.get(family, ())]
        ends = (ordered[0], ordered[-1]) if len(ordered) > 1 else (ordered[0],)
        for call, at in (*ends, *ordered[1:-1]):
            if all(max(at.size, n) >= APART * max(min(at.size, n), 1) for n in known) or (
                (call, at) in ends and not any(_near(at.size, n) for n in known)
            ):
                known.append(at.size)
                found.append((call, at))
    return found


def _near(a: int, b: int) -> bool:
    return max(a, b) <= 1.2 * max(min(a, b), 1)


def measured(call: Signature, device: str) -> float | None:
    """Least seconds of a call on tensors like those that it was recorded with, its result made anew each
    time as in a step. None where it does not run on its own, for lack of memory say."""
    try:
        args = [_argument(a, device) for a in call.args]
        kwargs = {name: _argument(a, device) for name, a in named(call)}
        run = call.op._op
        with uncollected(), torch.no_grad(), below_autograd():
            run(*args, **kwargs)
            if call.cold and (taken := _cold_seconds(lambda: run(*args, **kwargs))):
                return taken
            return min(_times(lambda: run(*args, **kwargs), device))
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, MemoryError):
        return None


def _cold_seconds(run: Callable[[], object]) -> float | None:
    """Of a call on a processor that reads its tensors from memory; None where it is too short to tell."""
    clock, found = step_clock("cpu", torch.get_num_threads()), []
    other = _elsewhere()
    for _ in range(COLD_TIMES):
        other.sum()
        start = clock()
        run()
        found.append(clock() - start)
        if found[0] < CLEAR:
            return None
    return statistics.median(found)


@functools.cache
def _elsewhere() -> Tensor:
    """Reading it leaves nothing else in caches."""
    return torch.ones(ELSEWHERE)


def _times(run: Callable[[], object], device: str) -> Iterable[float]:
    """Of single calls, or of many in a row where one is too short for the clock or waits for a device."""
    clock = step_clock(device, torch.get_num_threads())
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    first = clock() - start
    many = 1 if device == "cpu" and first > 1e-4 else max(1, min(50, int(1e-3 / max(first, 1e-6))))
    found = [first] if many == 1 else []
    spent = first
    while len(found) < MOST and (spent < BOX or not found):
        start = clock()
        for _ in range(many):
            run()
        synchronize(device)
        taken = clock() - start
        spent += taken
        found.append(taken / many)
    return found


def _argument(argument: Any, device: str) -> Any:
    if isinstance(argument, Like):
        return _tensor(argument, device)
    if isinstance(argument, tuple):
        if is_value(argument):
            found = argument[1]
            return torch.device(device) if isinstance(found, torch.device) else found
        return [_argument(a, device) for a in argument]
    return argument


def _tensor(like: Like, device: str) -> Tensor:
    """Numbers between 0.1 and 1; zeros where they are indices."""
    size = (
        1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride, strict=True))
        if 0 not in like.shape
        else 0
    )
    flat = torch.zeros(max(size, 0), dtype=like.dtype, device=device)
    if like.dtype.is_floating_point:
        flat.uniform_(0.1, 1.0)
    return flat.as_strided(like.shape, like.stride)


def packed(work: Mapping[Signature, float]) -> str:
    """Calls as text, for a worker."""
    plain = [(c.op._schema.name, c.op._overloadname, *c[1:], n) for c, n in work.items()]
    return base64.b64encode(zlib.compress(pickle.dumps(plain))).decode("ascii")


def unpacked(text: str) -> dict[Signature, float]:
    """The inverse, for what this program's own parent sent: unpickling runs code."""
    found = pickle.loads(zlib.decompress(base64.b64decode(text)))
    return {Signature(operator(name, overload), *rest): n for name, overload, *rest, n in found}


def operator(name: str, overload: str) -> Any:
    """By the name of its schema, "aten::relu" say, and of its overload."""
    namespace, _, packet = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _call_seconds() -> float:
    """What the host takes for a call that does nothing: a view."""
    x = torch.empty(4, 4)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            torch.narrow(x, 0, 1, 2)
        times.append((time.perf_counter() - start) / 1000)
    return min(times)
