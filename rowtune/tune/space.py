"""What the search turns, and the plan that follows: the exact programme's, under what the knobs allow.

The programme (rowtune/cost/programme.py) knows the best plan there is by prediction. What it cannot know is
how far predictions are off. So a trial takes away some of its options: it leaves memory free, or allows a
part of the network one policy, or one way to order bands, to make tapes, to carry barriers; and measures
what the programme then finds best. Every trial's plan is the best of its kind.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import numpy as np

from rowtune.cost.candidates import around, first, heights, offloaded, rounded, shelved
from rowtune.cost.lean import descend
from rowtune.cost.predict import Cost, composed, fixed_bytes, predict
from rowtune.cost.profile import Clock, Profile
from rowtune.cost.programme import Path, fastest, plan_of, smallest
from rowtune.cost.state import Stateful, brought, state_bytes
from rowtune.cost.table import UNBOUNDED, Option, Table, within
from rowtune.errors import RowtuneError
from rowtune.graph.graph import Graph
from rowtune.plan.choices import LOSSY, Home, Store
from rowtune.plan.plan import Plan
from rowtune.runtime.blank import Signature
from rowtune.tune.knobs import BANDS, ZONES, Values, guesses, knobs, usable
from rowtune.tune.savers import DEFAULT, of_segments
from rowtune.tune.task import Situation

Calibrate = Callable[[Mapping[Signature, float], float], Profile]
"""Measures calls, by how much they matter, for so many seconds at most."""


class Tables(Protocol):
    """Where a table's options may be known from, and where they are remembered."""

    def recall(self, table: Table) -> None: ...

    def remember(self, table: Table) -> None: ...


LEAST, MOST, STEPS = 4.0, 45.0, 80.0
"""Planning takes as long as so many plain steps, and so many seconds at least and at most."""
FIRST, TIMES, LATER = 0.4, 0.25, 0.35
"""The shares of that: recording the first options, timing calls, recording those around the best paths."""
AGAIN = 0.1
"""The share of it that a search takes at least which finds what others recorded."""
LOOK = 0.05
"""The share of it that is spent after each measurement on options around what now looks best."""
FRONT = 8
"""Limits for which the fastest path is looked at, from the smallest that will do up to plain's."""
TRIES, CLOSE = 8, 0.01
"""Times that a path is looked for whose plan takes more than its options by themselves; how close to the
most that may be told of is close enough."""
UNTRIED = 0.6
"""What a plan of another layout takes of its time, as long as none was measured: one is to be tried."""
PULL = 0.1
"""How much a factor of the time model is drawn to 1."""


class ProgrammeSpace:
    """The programme's plans for a training graph (with its loss).

    Args:
        optimizer: what the optimizer keeps: so many parameter-sized tensors, say.
        calibrate: makes the profile; without one, times are rough.
        savers: those that plans may use (rowtune/tune/savers.py).
        max_grad_error: of gradients, relative, that stores which round may cost.
        tables: of earlier searches; without them all options are recorded anew.
        host_bytes: that a plan may keep on the host.
    """

    def __init__(
        self,
        graph: Graph,
        optimizer: Stateful = 0,
        calibrate: Calibrate | None = None,
        savers: frozenset[str] = DEFAULT,
        max_grad_error: float = 0.0,
        tables: Tables | None = None,
        host_bytes: int = UNBOUNDED,
    ) -> None:
        self.graph, self.optimizer, self.calibrate, self.savers = graph, optimizer, calibrate, savers
        self.tables = tables
        whole: dict[str, Any] = {"dtype": "bf16"} if "bf16" in savers else {}
        if "capture" in savers:
            whole |= {"capture": "on"}
        if "step_in_backward" in savers:
            whole |= {"step_in_backward": True}
        if "offload_gradients" in savers:
            whole |= {"waiting_gradients": "host"}
        self.home: Home = "host" if "offload_state" in savers else "device"
        if self.home == "host":
            whole |= {"optimizer_state": "host"}
            host_bytes -= state_bytes(graph, optimizer)
        meanwhile = brought(graph, optimizer, self.home)
        self.table = Table(graph, 2, whole, max_grad_error, host_bytes, meanwhile)
        self.layouts: dict[str, float] = {}
        self.profile = Profile()
        self.most = float("inf")
        self.prepared = False
        self.knobs = knobs(self.table, savers)
        self.box = 0.0

    def guesses(self) -> list[dict[str, str]]:
        return guesses(self.knobs, self.savers)

    def plan(self, values: Values) -> Plan:
        """The fastest allowed plan within the memory there is; where none fits, the smallest of all.

        Neighbours share or hold what an option by itself does not, and another layout takes more: where a
        plan takes more than its options by themselves, the programme is told of less, and how much less is
        found by halving.
        """
        most = min(float(values["margin"]) * self.most, 1 << 60)
        home: Any = values.get("state", self.home)
        limit, allowed = int(most) - fixed_bytes(self.graph, self.optimizer, home), self._allowed(values)
        layout: Any = values.get("layout", "contiguous")
        best: Plan | None = None
        low, high = 0, limit
        for _ in range(TRIES):
            found = fastest(self.table, limit, allowed)
            if found is None:
                low = limit
            else:
                plan = replace(plan_of(self.table, found), layout=layout, optimizer_state=home)
                over = composed(self.graph, plan, self.optimizer)[1].total - most
                if over <= 0:
                    best, low = plan, limit
                else:
                    high = min(found.peak, limit) - 1
            if high - low <= CLOSE * high:
                break
            limit = (low + high) // 2 if low else limit - int(over) - 1
        return best or self.least()

    def predict(self, plan: Plan) -> Cost:
        """Bytes and seconds. Calls in another layout are not timed: a plan takes what it does in this one,
        times what measured plans of that layout took more or less; it may win where none was."""
        cost = predict(self.graph, plan, self.optimizer, self.profile)
        if plan.layout == "contiguous":
            return cost
        like = predict(self.graph, replace(plan, layout="contiguous"), self.optimizer, self.profile)
        return replace(cost, seconds=like.seconds * self.layouts.get(plan.layout, UNTRIED))

    def least(self) -> Plan:
        """The plan with the least peak."""
        return plan_of(self.table, self.smallest())

    def smallest(self) -> Path:
        """Its path."""
        found = fastest(self.table, smallest(self.table, self._may) or 1 << 60, self._may)
        assert found is not None, "to keep everything is always an option"
        return found

    # -- what is learnt ------------------------------------------------------------------------------------

    def tell(self, now: Situation) -> bool:
        """Called before the first plan is asked for, and after each measurement. Whether there are more
        options now."""
        self.most = now.most
        if self.prepared:
            self._correct(now)
            return self._look_around(now)
        self.prepared = True
        self._prepare(now)
        return True

    def _prepare(self, now: Situation) -> None:
        """Record options and time their calls; then record more around the fastest paths."""
        step = (now.plain.step_seconds if now.plain else None) or MOST / STEPS
        box, begun = min(max(STEPS * step, LEAST), MOST, 0.35 * now.left), time.monotonic()
        self.box = box
        wanted = ",".join(sorted(self.savers))
        if self.tables is not None:
            self.tables.recall(self.table)
            box = max(box - self.table.spent.get(wanted, 0.0), AGAIN * box)
        self.table.add([self.table.keep(k, k + 1) for k in range(len(self.table.cuts) - 1)], math.inf)
        stores = chain(
            chain(offloaded(self.table), shelved(self.table)) if "offload" in self.savers else (),
            rounded(self.table) if "rounding" in self.savers else (),
        )
        self.table.add(chain(stores, first(self.table)), within(FIRST * box))
        if self.calibrate is not None:
            self.profile = self.calibrate(self.table.work(), TIMES * box)
            self.table.price(self.profile)
        until = within(LATER * box)
        while time.monotonic() < until and self.table.add(
            [k for k in around(self.table, self.paths()) if k not in self.table.known], until
        ):
            pass
        self._until_one_fits(now)
        self.table.spent[wanted] = self.table.spent.get(wanted, 0.0) + time.monotonic() - begun
        if self.tables is not None:
            self.tables.remember(self.table)
        self._correct(now)

    def _look_around(self, now: Situation) -> bool:
        """Measurements move what looks best to where fewer options are known: record some around the plan
        that was measured last, and around the best of all."""
        asked = [r.values for r in now.records if r.ok and usable(self.knobs, r.values)][-1:]
        ways = [*map(self._allowed, asked), self._may]
        found = [fastest(self.table, self._room(), way) for way in ways]
        near = around(self.table, [path for path in found if path is not None])
        new = [key for key in near if key not in self.table.known and of_segments(key[2]) <= self.savers]
        added = self.table.add(new, within(LOOK * self.box))
        if added and self.tables is not None:
            self.tables.remember(self.table)
        return added > 0

    def _until_one_fits(self, now: Situation) -> None:
        """Whether a plan fits should not hang on how busy this machine is: while none does, options are
        recorded that may take less where the smallest plan takes most."""
        until = within(min(MOST, 0.1 * now.left))
        stores: tuple[Store, ...] = ("host", "device") if "offload" in self.savers else ("device",)
        descend(
            self.table,
            lambda: until - time.monotonic(),
            lambda segments: of_segments(segments) <= self.savers,
            stores=stores,
            enough=self._room(),
        )

    def _room(self) -> int:
        """Bytes that the memory there is leaves for what plans decide on."""
        return int(min(self.most, 1 << 60)) - fixed_bytes(self.graph, self.optimizer, self.home)

    def paths(self) -> list[Path]:
        """The fastest paths under limits from the least that will do to what plain takes, and under the
        limit of this search."""
        low = smallest(self.table, self._may)
        most = fastest(self.table, 1 << 60, self._may)
        if low is None or most is None:
            return []
        share = (max(most.peak, low) / max(low, 1)) ** (1 / (FRONT - 1))
        limits = [int(low * share**i) + 1 for i in range(FRONT)]
        if self.most < 1e300:
            limits.append(self._room())
        found = [fastest(self.table, limit, self._may) for limit in limits]
        return [path for path in found if path is not None]

    def _correct(self, now: Situation) -> None:
        """Factors of the time model by policy, so that plans that were measured are predicted as measured:
        least squares, drawn to 1. And what plans of another layout took."""
        names = ("keep", "checkpoint", "rows")
        clock = Clock(replace(self.profile, factors={}))
        seen = self._timed(now)
        rows: list[list[float]] = []
        for plan, seconds in seen:
            spent = dict.fromkeys(names, 0.0)
            for linked in composed(self.graph, plan)[0].segments if plan.layout == "contiguous" else ():
                spent[linked.policy] += clock.bare(
                    linked.policy, linked.footprint.work, linked.footprint.host
                )
            rows.append([spent[name] / seconds for name in names])
        shares = np.array([row for row in rows if any(row)])
        if not len(shares):
            return
        left = shares.T @ shares + PULL * np.eye(len(names))
        right = shares.T @ np.ones(len(shares)) + PULL * np.ones(len(names))
        found = np.clip(np.linalg.solve(left, right), 0.3, 3.0)
        self.profile = replace(self.profile, factors=dict(zip(names, map(float, found), strict=True)))
        self.table.price(self.profile)
        others = [(replace(p, layout="contiguous"), t) for p, t in seen if p.layout == "channels_last"]
        if others:
            ratios = [t / predict(self.graph, p, 0, self.profile).seconds for p, t in others]
            self.layouts["channels_last"] = min(ratios)

    def _timed(self, now: Situation) -> list[tuple[Plan, float]]:
        """Plans that were measured, and what their steps took; plain PyTorch is to keep everything."""
        found = []
        if now.plain is not None and now.plain.step_seconds and not self.table.whole:
            keep = self.table.segment(0, len(self.graph.nodes), "keep")
            found.append((Plan((keep,), self.table.axis), now.plain.step_seconds))
        for record in now.records:
            if record.ok and record.step_seconds and record.decisions:
                with contextlib.suppress(RowtuneError):  # a record of another version of this program
                    found.append((Plan.from_dict(dict(record.decisions)), record.step_seconds))
        return found

    # -- what is allowed -----------------------------------------------------------------------------------

    def _allowed(self, values: Values) -> Callable[[Option], bool]:
        """Whether the knobs leave an option in."""
        low, high = BANDS[values["band"]]
        tallest = max(heights(self.table), default=1)
        rounding = values.get("rounding", "any")

        def may_round(store: str) -> bool:
            return rounding in ("any", store)

        def allowed(option: Option) -> bool:
            main = option.main
            if not self._may(option):
                return False
            if any(s.store in LOSSY and not may_round(s.store) for s in option.segments):
                return False
            if main.policy != "keep" and values[self._zone(option)] not in ("any", main.policy):
                return False
            if main.inside and values["turns"] == "no":
                return False
            if main.policy != "rows":
                return True
            asked = (("halo", main.halo), ("barriers", main.barriers))
            if any(values.get(name, "any") not in ("any", now) for name, now in asked):
                return False
            if main.halo == "sweep" and values["tapes"] not in ("any", main.tapes):
                return False
            if values.get("images", "any") != "any" and (values["images"] == "split") != bool(main.images):
                return False
            return not main.band_rows or low <= min(main.band_rows, tallest) < high

        return allowed

    def _may(self, option: Option) -> bool:
        """Whether the savers leave an option in."""
        return of_segments(option.segments) <= self.savers

    def _zone(self, option: Option) -> str:
        """Where the middle of an option lies."""
        return ZONES[min((option.start + option.stop) * 3 // (2 * (len(self.table.cuts) - 1)), 2)]
