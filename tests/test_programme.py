"""Seconds of plans, the table of options and the exact programme over it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import rowtune
from rowtune.cost.candidates import ROWS, around, first, rounded, shelved
from rowtune.cost.families import sized
from rowtune.cost.footprint import Footprint
from rowtune.cost.predict import composed, fixed_bytes, predict
from rowtune.cost.profile import Profile, along
from rowtune.cost.programme import Path, fastest, plan_of, smallest
from rowtune.cost.table import Table, within
from rowtune.errors import PlanError, UsageError
from rowtune.graph.graph import Graph
from rowtune.graph.losses import default_name, parse
from rowtune.graph.training import with_loss
from rowtune.plan.plan import Plan
from rowtune.runtime.blank import Like, Signature
from rowtune.tune import savers as named
from rowtune.tune.calibrate import calibrated, measured, missing, packed, unpacked
from rowtune.tune.savers import DEFAULT
from rowtune.tune.space import ProgrammeSpace
from rowtune.tune.task import Situation
from rowtune.zoo import build

NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unet": ({"base": 4, "depth": 2}, (1, 3, 64, 64)),
    "unet_bn": ({"base": 4, "depth": 2}, (2, 3, 64, 64)),
    "resnet50": ({"width": 8, "depths": (1, 1, 1, 1), "classes": 10}, (2, 3, 160, 160)),
}


@cache
def graph(name: str) -> Graph:
    options, shape = NETS[name]
    with torch.device("meta"):
        model = build(name, **options)
    found = rowtune.trace(model, (torch.empty(shape, device="meta"),))
    return with_loss(found, parse(default_name(found.values[found.outputs[0]].shape, shape)))


@cache
def table(name: str) -> Table:
    """With the coarse set, and one round around what it gives."""
    made = Table(graph(name))
    made.add(first(made), within(60))
    space = ProgrammeSpace(graph(name))
    space.table = made
    made.add(itertools.islice(around(made, space.paths()), 60), within(60))
    return made


def fixed(name: str) -> int:
    kinds = ("parameter", "buffer", "input", "target", "norms")
    return sum(v.bytes for v in graph(name).values.values() if v.kind in kinds)


# -- seconds -------------------------------------------------------------------------------------------------


def test_bands_that_are_left_out_of_a_recording_are_counted():
    """A shortened program and one of all its bands call the same operators as often."""
    plan = rowtune.uniform_plan(graph("unet"), "rows", 2, "sweep")
    short, _ = composed(graph("unet"), plan)
    with pytest.MonkeyPatch.context() as patch:
        from rowtune.cost import predict as module

        patch.setattr(module, "_SEEN", type(module._SEEN)())
        patch.setattr("rowtune.cost.seen.shortened", rowtune.plan.banded.by_policy)
        whole, _ = composed(graph("unet"), plan)

    def work(step: Any) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for linked in step.segments:
            for call, often in linked.footprint.work:
                name, size = sized(call).family, sized(call).size
                count, total = found.get(name, (0, 0))
                found[name] = count + often, total + often * size
        return found

    ours, theirs = work(short), work(whole)
    assert ours.keys() == theirs.keys()
    assert sum(s.footprint.host for s in short.segments) == sum(s.footprint.host for s in whole.segments)
    for name, (count, total) in theirs.items():
        assert ours[name][0] == count, name
        assert ours[name][1] == pytest.approx(total, rel=0.01), name


def test_rows_of_one_layer_are_one_family_and_other_layers_are_not():
    x, weight = Like((1, 8, 5, 64), (2560, 320, 64, 1), torch.float32), (8, 8, 3, 3)

    def convolution(rows: int, weight: tuple[int, ...], stride: int = 1) -> Signature:
        like = x._replace(shape=(1, 8, rows, 64), stride=(rows * 512, rows * 64, 64, 1))
        kernel = Like(weight, (weight[1] * 9, 9, 3, 1), torch.float32)
        pairs = [(int, stride), (int, stride)], [(int, 1)] * 2, [(int, 1)] * 2
        steps, pads, dilation = (tuple(p) for p in pairs)
        rest = ((type(None), None), steps, pads, dilation, (bool, False), ((int, 0), (int, 0)), (int, 1))
        return Signature(torch.ops.aten.convolution.default, (like, kernel, *rest), ())

    five, nine = sized(convolution(5, weight)), sized(convolution(9, weight))
    assert five.family == nine.family and (five.size, nine.size) == (5 * 64, 9 * 64)
    assert nine.operations == pytest.approx(9 / 5 * five.operations)
    assert sized(convolution(5, (16, 8, 3, 3))).family != five.family
    assert sized(convolution(5, weight, 2)).family != five.family
    assert measured(convolution(5, weight), "cpu") is not None


def test_curves_are_followed_between_and_beyond_what_was_measured():
    curve = ((100, 1e-3), (400, 4e-3), (1600, 64e-3))
    assert [along(curve, n) for n in (100, 400, 1600)] == [1e-3, 4e-3, 64e-3]
    assert along(curve, 200) == pytest.approx(2e-3) and along(curve, 800) == pytest.approx(16e-3)
    assert along(curve, 3200) == pytest.approx(128e-3)
    assert along(curve, 50) == pytest.approx(0.5e-3) and along(curve, 1) == pytest.approx(0.25e-3)


def test_a_profile_is_measured_once_and_survives_a_file():
    made = Table(graph("unet"))
    made.add([made.keep(k, k + 1) for k in range(len(made.cuts) - 1)], within(60))
    work = made.work()
    profile = calibrated(None, work, "cpu", 30.0)
    assert profile.curves and not [at for _, at in missing(profile, work) if at.family in profile.curves]
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    assert calibrated(profile, work, "cpu", 30.0).curves.keys() >= profile.curves.keys()
    with pytest.raises(PlanError, match="calibrate"):
        Profile.from_dict({"rowtune_profile": 1, "curves": {"a": [[1]]}})
    assert unpacked(packed(work)) == work


def test_seconds_follow_the_profile():
    plan = rowtune.uniform_plan(graph("unet"), "rows", 8)
    rough = predict(graph("unet"), plan, 0)
    families = {
        sized(c).family for s in composed(graph("unet"), plan)[0].segments for c, _ in s.footprint.work
    }
    slow = Profile().with_curves({f: [(1, 1.0)] for f in families if f.startswith("convolution")})
    assert predict(graph("unet"), plan, 0, slow).seconds > 100 * rough.seconds
    half = Profile(factors={"rows": 0.5})
    assert predict(graph("unet"), plan, 0, half).seconds == pytest.approx(0.5 * rough.seconds)


# -- the table and the programme -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_options_make_up_plans(name):
    """What the programme says of a path is what a whole plan's prediction says."""
    made = table(name)
    low, most = smallest(made), fastest(made, 1 << 60)
    assert low is not None and most is not None and low < 0.7 * most.peak
    policies = set()
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        limit = int(low + share * (most.peak - low))
        path = fastest(made, limit)
        assert path is not None and path.peak <= limit
        plan = plan_of(made, path)
        policies |= {s.policy for s in plan.segments}
        cost = predict(graph(name), plan, 0)
        assert cost.peak_bytes - fixed(name) == pytest.approx(path.peak, rel=0.005)
        assert cost.seconds == pytest.approx(path.seconds, rel=0.02)
    assert len(policies) > 1


@pytest.mark.parametrize("name", NETS)
def test_less_memory_takes_no_less_time(name):
    made = table(name)
    low, most = smallest(made), fastest(made, 1 << 60)
    assert low is not None and most is not None
    assert fastest(made, low - low // 100) is None
    times = []
    for i in range(9):
        path = fastest(made, int(low + i / 8 * (most.peak - low)))
        assert path is not None
        times.append(path.seconds)
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_the_programme_is_exact_on_its_table():
    """Against every path there is, on a table small enough to list them: at least as fast as what takes a
    tenth less memory (of tensors that cross a cut, some held and some not, it assumes the worse)."""
    made = Table(graph("unet"))
    made.cuts = made.cuts[::4] if made.cuts[-1] == made.cuts[::4][-1] else (*made.cuts[::4], made.cuts[-1])
    last = len(made.cuts) - 1
    pairs = list(itertools.combinations(range(last + 1), 2))
    keys = [made.keep(a, b) for a, b in pairs] + [made.checkpoint(a, b) for a, b in pairs]
    keys += [key for a, b in pairs if (key := made.rows(a, b, ROWS)) is not None]
    made.add(keys, within(120))

    def paths(at: int) -> Any:
        if at == last:
            yield ()
        for option in made.options:
            if option.start == at:
                for rest in paths(option.stop):
                    yield (option, *rest)

    every = []
    for path in paths(0):
        plan = plan_of(made, Path(0.0, 0, path))
        peak = predict(graph("unet"), plan, 0).peak_bytes - fixed("unet")
        every.append((peak, sum(map(made.seconds, path))))
    assert len(every) > 50
    low, high = min(p for p, _ in every), max(p for p, _ in every)
    assert low <= (smallest(made) or 0) <= 1.1 * low
    for limit in range(int(1.11 * low), high, max((high - low) // 15, 1)):
        found = fastest(made, limit)
        assert found is not None and found.peak <= limit
        assert predict(graph("unet"), plan_of(made, found), 0).peak_bytes - fixed("unet") <= 1.005 * limit
        assert found.seconds <= 1.001 * min(t for p, t in every if p <= limit / 1.1)


# -- the space -----------------------------------------------------------------------------------------------


def record(plan: Any, seconds: float) -> Any:
    from rowtune.tune.records import Record

    return Record("x", "ok", decisions=plan and plan.to_dict(), peak_bytes=1, step_seconds=seconds)


def space(name: str) -> ProgrammeSpace:
    made = ProgrammeSpace(graph(name), 1)
    made.table, made.prepared = table(name), True
    return made


@pytest.mark.parametrize("name", NETS)
def test_settings_give_plans_that_fit_and_keep_to_what_is_allowed(name):
    knobs = space(name)
    plain = predict(graph(name), rowtune.uniform_plan(graph(name), "keep"), 1).peak_bytes
    knobs.tell(Situation(0.7 * plain, None, (), 1e9))
    own, smallest_plan = knobs.guesses()[0], plan_of(knobs.table, knobs.smallest())
    assert predict(graph(name), knobs.plan(own), 1).peak_bytes <= 0.7 * plain
    for setting, allowed in (
        ({"tapes": "split"}, lambda s: s.halo != "sweep" or s.tapes == "split"),
        ({"halo": "recompute"}, lambda s: s.halo == "recompute"),
        ({"band": "low"}, lambda s: s.band_rows < 12),
    ):
        plan = knobs.plan(own | setting)
        bands = [s for s in plan.leaves() if s.policy == "rows" and s.band_rows]
        assert plan == smallest_plan or all(map(allowed, bands)), setting
    bare = knobs.plan(own | dict.fromkeys(("front", "middle", "back"), "checkpoint"))
    assert {s.policy for s in bare.segments} <= {"keep", "checkpoint"} or (
        predict(graph(name), bare, 1).peak_bytes > 0.7 * plain
    )


def test_measured_steps_correct_the_times():
    """Rows take twice what is predicted, and the programme then prefers checkpoints where they win."""
    knobs = space("unet")
    knobs.tell(Situation(1e9, None, (), 1e9))
    rows = rowtune.uniform_plan(graph("unet"), "rows", 8)
    keep = rowtune.uniform_plan(graph("unet"), "keep")
    for plan, factor in ((rows, 2.0), (keep, 1.0)):
        now = predict(graph("unet"), plan, 1).seconds
        plain = record(None, predict(graph("unet"), keep, 1).seconds)
        slow = record(rows, 2.0 * predict(graph("unet"), rows, 1).seconds)
        knobs.tell(Situation(1e9, plain, (slow,) * 5, 1e9))
        corrected = predict(graph("unet"), plan, 1, knobs.profile).seconds
        assert corrected == pytest.approx(factor * now, rel=0.15), plan


def test_after_a_measurement_more_is_known_around_what_was_measured():
    knobs = space("unet")
    most = knobs.smallest().peak + fixed_bytes(graph("unet"), 1)
    own, knobs.most = knobs.guesses()[0], most
    plan = knobs.plan(own)
    rows = {s.band_rows for s in plan.leaves() if s.policy == "rows"}
    assert rows
    before = set(knobs.table.known)
    measured = replace(record(plan, 0.05), values=own, predicted_bytes=1)
    knobs.box = 10.0
    assert knobs.tell(Situation(most, None, (measured,), 1e9))
    new = set(knobs.table.known) - before
    near = {h for r in rows for h in (r // 2, r, 2 * r)}
    assert any(s.policy == "rows" and s.band_rows in near for key in new for s in key[2])


def test_a_space_prepares_itself_in_the_time_it_has():
    asked: list[float] = []

    def calibrate(work: Any, seconds: float) -> Profile:
        asked.append(seconds)
        return Profile()

    made = ProgrammeSpace(graph("unet"), 1, calibrate)
    made.tell(Situation(1e9, record(None, 0.01), (), 20.0))
    assert asked and asked[0] <= 0.25 * 0.35 * 20.0
    assert made.plan(made.guesses()[0]).segments
    again = len(asked)
    made.tell(Situation(1e9, record(None, 0.01), (), 20.0))
    assert len(asked) == again


def test_footprints_say_how_often_everything_is_called():
    step, _ = composed(graph("unet"), rowtune.uniform_plan(graph("unet"), "keep"))
    (linked,) = step.segments
    assert isinstance(linked.footprint, Footprint) and linked.policy == "keep"
    convolutions = sum(n for c, n in linked.footprint.work if c.op is torch.ops.aten.convolution.default)
    assert convolutions == sum(n.op.startswith("conv") for n in graph("unet").nodes)
    assert linked.footprint.host >= sum(n for _, n in linked.footprint.work)


def test_savers_are_asked_for_by_name():
    assert named.parse("") == DEFAULT and named.parse("rows, offload") == {"rows", "offload"}
    assert named.parse("+offload,-turns") == (DEFAULT | {"offload"}) - {"turns"}
    for text, says in (("row", "none of rows, checkpoint"), ("+offload,rows", "either names"), ("-x", "'x'")):
        with pytest.raises(UsageError, match=says):
            named.parse(text)


def test_a_last_resort_is_what_nobody_forbade():
    assert named.last_resort("") == named.RESORT and not named.RESORT & DEFAULT
    assert named.last_resort("-offload_state,+bf16") == named.RESORT - {"offload_state"}
    assert named.last_resort("rows,offload") == frozenset()


def test_rows_that_wait_on_the_host_begin_and_end_where_the_height_changes():
    made = Table(graph("unet"))
    keys = [*shelved(made)]
    assert keys and all(s.store == "host" for _, _, segments in keys for s in segments if s.policy == "rows")
    assert {k[0] for k in keys} < {*range(len(made.cuts))} and len({k[:2] for k in keys}) < 20


@pytest.mark.parametrize(
    ("savers", "holds"),
    [
        ("checkpoint", lambda p: not any(s.policy == "rows" or s.inside for s in p.leaves())),
        ("rows,offload", lambda p: not any(s.policy == "checkpoint" for s in p.segments)),
        ("+step_in_backward,-rows", lambda p: p.step_in_backward),
        ("+bf16", lambda p: p.dtype == "bf16"),
        ("+offload_gradients", lambda p: p.waiting_gradients == "host"),
    ],
)
def test_plans_take_what_they_may(savers, holds):
    made = ProgrammeSpace(graph("unet"), 1, None, named.parse(savers))
    plain = predict(graph("unet"), rowtune.uniform_plan(graph("unet"), "keep"), 1).peak_bytes
    made.tell(Situation(0.9 * plain, record(None, 0.02), (), 1e9))
    plans = [made.plan(values) for values in made.guesses()]
    assert all(map(holds, plans))
    assert made.predict(plans[0]).peak_bytes <= 0.9 * plain
    layouts = {p.layout for p in plans}
    assert layouts == ({"contiguous", "channels_last"} if "+" in savers else {"contiguous"})
    if "offload" in made.savers:
        stored = [p for p in plans if any(s.store == "host" for s in p.segments)]
        assert stored and made.predict(stored[0]).host_bytes > 0


@pytest.mark.parametrize("more", ["", "step_in_backward"])
def test_the_optimizers_state_is_on_the_host_where_that_helps(more):
    """With room for all of it one plan leaves it on the device; below that none does. Peaks are as predicted
    for whole plans."""
    savers = DEFAULT | {"offload_state", *filter(None, [more])}
    host = 1 << 20
    made = ProgrammeSpace(graph("unet"), 2, None, savers, host_bytes=host)
    state = sum(v.bytes for v in graph("unet").parameters()) * 2
    assert made.table.host_bytes == host - state
    plain = predict(graph("unet"), rowtune.uniform_plan(graph("unet"), "keep"), 2).peak_bytes
    made.tell(Situation(plain, record(None, 0.02), (), 1e9))
    assert {"state": "device"}.items() <= made.guesses()[1].items()
    homes = {made.plan(values).optimizer_state for values in made.guesses()}
    assert homes == {"host", "device"}
    least = plan_of(made.table, made.smallest())
    assert least.optimizer_state == "host" and named.used(least) >= {"offload_state", *filter(None, [more])}
    cost = made.predict(least)
    here = predict(graph("unet"), replace(least, optimizer_state="device"), 2)
    assert cost.host_bytes == state and cost.peak_bytes < here.peak_bytes


def test_plans_round_what_they_keep_only_where_they_may():
    with pytest.raises(UsageError, match="how much they may be"):
        named.with_error(named.parse("+rounding"), 0.0)
    with pytest.raises(UsageError, match="a number of at least 0, not -1"):
        named.with_error(DEFAULT, -1.0)
    made = ProgrammeSpace(graph("unet"), 1, None, named.with_error(frozenset({"recompute"}), 0.05), 0.05)
    made.table.add([made.table.keep(k, k + 1) for k in range(len(made.table.cuts) - 1)], within(60))
    lean = [made.table.keep(k, k + 1, cheap="recompute") for k in range(len(made.table.cuts) - 1)]
    made.table.add([*lean, *rounded(made.table)], within(60))
    made.prepared = True
    exact = smallest(made.table, lambda o: named.of_segments(o.segments) <= {"recompute"})
    assert exact is not None
    made.most = 0.98 * exact + fixed_bytes(graph("unet"), 1)  # less than without rounding
    own = made.guesses()[0]
    found = {which: made.plan(own | {"rounding": which}) for which in ("any", "fp16", "int8")}
    for which, plan in found.items():
        stores = {s.store for s in plan.segments} & {"fp16", "int8"}
        assert stores and stores <= ({"fp16", "int8"} if which == "any" else {which})
        assert predict(graph("unet"), plan, 1).peak_bytes <= made.most
        assert plan.max_grad_error == 0.05 and Plan.from_dict(plan.to_dict()) == plan
        assert "rounding" in named.used(plan)
    made.most = 1e12
    assert "rounding" not in named.used(made.plan(own | {"rounding": "none"}))
