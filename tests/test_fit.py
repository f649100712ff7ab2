"""What fits, and how large it could be."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.cli.fit import command
from rowtune.cost.predict import fixed_bytes, predict
from rowtune.cost.profile import Profile, load
from rowtune.errors import UsageError
from rowtune.graph.training import with_loss
from rowtune.importers.source import parse_source
from rowtune.plan.uniform import uniform_plan
from rowtune.tune.fit import GLIMPSE, WAYS, Fit, Found, _Search, _Sizes, fit, resized
from rowtune.tune.reference import plain_peak
from rowtune.tune.step import Workload, define, plain_graph


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Little time for recording: these networks have little to record."""
    monkeypatch.setattr("rowtune.tune.fit.SECONDS", 2.0)
    monkeypatch.setattr("rowtune.tune.fit.LOOK", 4.0)


@cache
def work(shape: str = "1x3x128x64") -> Workload:
    return define(parse_source("zoo:unet", ["base=4", "depth=2"]), [shape])


@cache
def found(share: float, over: str) -> dict[str, Fit]:
    return {f.way: f for f in fit(work(), int(share * plain_peak(work())), over)}


def peak(lengths: tuple[int, ...], over: str) -> int:
    """Of plain PyTorch at that size."""
    graph = with_loss(plain_graph(work().module, resized(work(), over, lengths)), work().loss)
    return predict(graph, uniform_plan(graph, "keep"), 1).peak_bytes


def test_more_fits_with_every_way():
    ways = found(0.6, "H,W")
    assert [*ways] == [*WAYS]
    assert ways["plain"].here.plan is None and ways["rowtune"].here.plan is not None
    areas = [f.largest[0] * f.largest[1] if f.largest else 0 for f in ways.values()]
    assert 0 < areas[0] <= areas[1] < areas[2] and areas[2] > 4 * areas[0]
    least = [f.here.peak_bytes for f in ways.values()]
    assert least == sorted(least, reverse=True)


def test_the_largest_size_is_the_largest():
    """Proportions stay; a step more is too large."""
    limit = int(0.6 * plain_peak(work()))
    largest = found(0.6, "H,W")["plain"].largest
    assert largest is not None and largest[0] == 2 * largest[1] and largest[1] % 32 == 0
    assert peak(largest, "H,W") <= limit < peak((largest[0] + 64, largest[1] + 32), "H,W")


def test_most_of_the_time_goes_to_a_size_near_the_answer(monkeypatch):
    """Twelve bytes a pixel are found by looking long at a large image, thirty in a moment, and a size that
    was too large for that is tried again. (Of a square: k times 32 pixels a side, and its halos.)"""
    own, looks = 4, list[tuple[int, int, float]]()

    def at(self, k, begin=(), share=1.0):
        looks.append((k, len(begin), share))
        good = share == 1.0 or begin
        peak = always + (12 if good and k > own else 30) * (32 * k) ** 2 + 4000 * k
        self.left *= 1 - share / 2
        return Found(peak, None, None, (((0, 1, ()),) if share == 1.0 and k > own else ()))

    square = work("1x3x128x128")
    always = fixed_bytes(square.graph, square.optimizer)
    limit = always + 12 * (32 * 100) ** 2 + 4000 * 100
    search = _Search(square, _Sizes(square, "H,W"), "rowtune", limit, None, 0, 64.0, lambda _: None)
    monkeypatch.setattr(_Search, "at", at)
    lengths, there = search.largest(search.at(own)) or ((), None)
    assert 97 * 32 <= lengths[0] <= 100 * 32 and there is not None and there.peak_bytes <= limit
    assert [share for k, _, share in looks if share < 1.0] == [GLIMPSE] and len(looks) <= 6
    assert all(begin for k, begin, _ in looks[3:]), "what was found begins the next"


def test_a_batch_grows_by_single_images():
    largest = found(2.6, "N")["plain"].largest
    assert largest is not None and largest[0] == 2
    assert (found(2.6, "N")["rowtune"].largest or (0,))[0] > 8


def test_what_grows_must_be_there():
    for over in ("Q", "D", ""):
        with pytest.raises(UsageError, match="--over"):
            fit(work(), 1 << 30, over)


def test_fit_on_the_command_line():
    size = int(0.6 * plain_peak(work()))
    model = ["zoo:unet", "--model-arg", "base=4", "--model-arg", "depth=2", "--shape", "1x3x128x64"]
    done = CliRunner().invoke(
        app, ["fit", *model, "--budget", f"{size}B", "--over", "W", "--confirm", "--seconds", "4", "--json"]
    )
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["plain"]["fits"] is False and made["rowtune"]["fits"] is True
    assert made["rowtune"]["largest_bytes"] <= size
    assert made["confirmed"]["status"] == "ok" and made["confirmed"]["peak_bytes"] <= size
    assert made["plain"]["seconds"] is None, "nobody timed this device"
    none = CliRunner().invoke(app, ["fit", *model, "--budget", "20kB", "--json"])
    assert none.exit_code == 4 and json.loads(none.stdout.splitlines()[-1])["status"] == "infeasible"


def test_times_come_from_a_profile(tmp_path):
    profile = tmp_path / "card.json"
    profile.write_text(json.dumps(Profile("a card", operations_per_second=1e6).to_dict()))
    model = ["zoo:unet", "--model-arg", "base=4", "--model-arg", "depth=1", "--shape", "1x3x64x32"]
    flags = ["--budget", "1GB", "--over", "N", "--json", "--device-profile"]
    done = CliRunner().invoke(app, ["fit", *model, *flags, str(profile)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["plain"]["seconds"] > 1.0
    lost = CliRunner().invoke(app, ["fit", *model, *flags, "nobody-has-this-card"])
    assert lost.exit_code == 2 and "nobody-has-this-card" in lost.output


def test_a_device_is_timed_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ROWTUNE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "here.json"
    model = ["zoo:unet", "--model-arg", "base=4", "--model-arg", "depth=1", "--shape", "1x3x64x32"]
    flags = ["--seconds", "2", "-o", str(out), "--json"]
    done = CliRunner().invoke(app, ["calibrate", *model, *flags])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["points"] >= made["families"] > 5 and Path(made["cache"]).parent == tmp_path / "cache"
    assert load(out).curves.keys() == load(Path(made["cache"])).curves.keys()
    again = CliRunner().invoke(app, ["calibrate", *model, *flags])
    assert again.exit_code == 2 and "--force" in again.output
    fitted = CliRunner().invoke(app, ["fit", *model, "--budget", "1GB", "--over", "N", "--json"])
    assert json.loads(fitted.stdout.splitlines()[-1])["plain"]["seconds"] > 0, "from the cache"


def test_the_command_looks_as_long_as_the_function():
    """The command line names the seconds itself: it imports nothing of what it calls."""
    (option,) = (p for p in inspect.signature(command).parameters.values() if p.name == "seconds")
    assert option.default == inspect.signature(fit).parameters["seconds"].default
