"""Profiles as data: what is shipped, and what they say of calls that nobody timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import rowtune
from rowtune.cli.app import app
from rowtune.cost.families import COLD, Sized, any_width, sized
from rowtune.cost.profile import Clock, Profile, load
from rowtune.cost.table import Table
from rowtune.graph.losses import parse
from rowtune.graph.training import with_loss
from rowtune.runtime.blank import Signature
from rowtune.tune.calibrate import RATED, calibrated, packed, rated, unpacked
from rowtune.tune.profiles import shipped
from rowtune.zoo import build

PROFILES = Path(__file__).resolve().parents[1] / "profiles"


def calls(width: int) -> list[Signature]:
    """Convolutions of a network on images of this width, by size."""
    x = torch.empty(1, 3, 48, width, device="meta")
    graph = with_loss(rowtune.trace(build("per_pixel").to("meta"), (x,)), parse("mse"))
    table = Table(graph)
    table.add([table.keep(0, len(table.cuts) - 1)], float("inf"))
    found = [call for call in table.work() if "convolution.default" in str(call.op)]
    return sorted(found, key=lambda c: sized(c).size)


def test_another_width_is_like_the_one_that_was_timed() -> None:
    timed = {sized(call).family: ((sized(call).size, 1.0),) for call in calls(64)}
    clock = Clock(Profile(curves=timed))
    for call in calls(128):
        assert sized(call).family not in timed and any_width(sized(call).family) in map(any_width, timed)
        assert clock.bare("keep", ((call, 3),), 0) == pytest.approx(3 * 2.0)  # twice the pixels
    assert any_width("add: float32 dense") == "add: float32 dense"


def test_whole_feature_maps_are_not_in_caches_and_bands_are() -> None:
    (call, *_) = calls(64)
    at = sized(call)
    assert call.cold and at.family.endswith(COLD)
    hot = at.family.removesuffix(COLD)
    both = Clock(Profile(curves={at.family: ((at.size, 2.0),), hot: ((at.size, 1.0),)}))
    one = Clock(Profile(curves={hot: ((at.size, 1.0),)}))
    for policy, want in (("keep", 2.0), ("checkpoint", 2.0), ("rows", 1.0)):
        assert both.bare(policy, ((call, 1),), 0) == want
        assert one.bare(policy, ((call, 1),), 0) == 1.0  # nobody told


def test_calls_are_timed_as_they_find_caches() -> None:
    (call, *_) = calls(64)
    profile = calibrated(None, {call: 1.0, call._replace(cold=False): 1.0}, "cpu", 10.0)
    assert {family.endswith(COLD) for family in profile.curves} == {True, False}
    assert unpacked(packed({call: 1.0})) == {call: 1.0}


def test_rates_are_medians_of_what_was_timed() -> None:
    busy = [(Sized(f"c{i}", 1, 1e12 * n, 10), 1.0 * n) for i, n in enumerate([1.0] * (RATED - 1) + [7.0])]
    wide = [(Sized(f"e{i}", 1, 1.0, 10**10), 1.0) for i in range(RATED)]
    tiny = [(Sized(f"t{i}", 1, 1e3, 10), 1e-6) for i in range(RATED)]  # the host's share
    profile = rated(Profile(), [*busy, *wide, *tiny])
    assert (profile.operations_per_second, profile.bytes_per_second) == (1e12, 1e10)
    assert rated(Profile(), wide[1:]) == Profile()  # too few to say


def test_what_is_shipped_is_what_the_folder_says() -> None:
    """Every profile is one of this schema, and has its row in the README with how far it is off."""
    readme = (PROFILES / "README.md").read_text()
    assert shipped().keys() == {p.stem for p in PROFILES.glob("*.json")} and shipped()
    for name, path in shipped().items():
        profile = load(path)
        assert f"| `{name}` | {profile.device}" in readme
        assert profile.curves and profile.torch and not profile.factors
        assert Profile.from_dict(json.loads(path.read_text())) == profile


def call(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_profile_predicts(name: str, tmp_path: Path) -> None:
    model = ["zoo:unet", "--model-arg", "base=4", "--model-arg", "depth=1", "--shape", "1x3x64x48"]
    words = ["--predict-only", "--timeout", "2", "-o", str(tmp_path / "plan.json")]
    found = call("search", *model, "--budget", "60%", "--device-profile", name, *words)
    assert found["predicted_for"].startswith(load(shipped()[name]).device) and found["front"]
    error = call("search", *model, "--budget", "60%", "--device-profile", "none-such", *words, code=2)[
        "error"
    ]
    assert "of those shipped" in error and name in error


def test_the_host_s_share_is_not_scaled_up() -> None:
    """A curve that ends where the host takes longer than the device says nothing of a million elements."""
    tiny = Profile(call_seconds=1e-5, curves={"add": ((1, 2e-5),)})
    at = Sized("add", 10**6, 1e6, 8 * 10**6)
    assert tiny.along(tiny.curves["add"], at) == pytest.approx(2e-5 + tiny.rough(at))
    long = Profile(call_seconds=1e-5, curves={"add": ((10**5, 1e-3),)})
    assert long.along(long.curves["add"], at) == pytest.approx(1e-2)
