"""The report: its content from plan and records, the same in the terminal, as JSON and on the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rowtune.cli.app import app
from rowtune.cost.predict import predict
from rowtune.cost.profile import Clock, Profile
from rowtune.plan.file import MEASURED, PlanFile, load_plan, save_plan
from rowtune.plan.plan import Plan, Segment
from rowtune.plan.uniform import uniform_plan
from rowtune.problem import Problem, Source, TensorSpec
from rowtune.report.build import make_page
from rowtune.report.html import html
from rowtune.report.knobs import importance
from rowtune.report.step import Unknown, curve, segment_costs, step_cost
from rowtune.train.opened import open_plan
from rowtune.tune.find import study_identity
from rowtune.tune.records import PLAIN, Record, RecordFile, digest
from rowtune.tune.step import prepare

PROBLEM = Problem(
    Source("zoo", "unet", (("base", 4), ("depth", 2))),
    (TensorSpec("input", (1, 3, 64, 32)),),
    "cpu",
    "cross_entropy",
    "sgd:lr=0.01,momentum=0.9",
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def costs(peak: int, seconds: float) -> dict[str, Any]:
    return {
        "peak_bytes": peak,
        "step_seconds": seconds,
        "predicted_bytes": peak,
        "predicted_seconds": seconds,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A plan of three segments, and its study: nothing is measured here, the figures are made up."""
    path = tmp_path_factory.mktemp("report")
    work = prepare(PROBLEM)
    nodes = [node.name for node in work.graph.nodes]
    third = len(nodes) // 3
    chosen = Plan(
        (
            Segment(nodes[0], nodes[third], "checkpoint"),
            Segment(nodes[third + 1], nodes[2 * third]),
            Segment(nodes[2 * third + 1], nodes[-1], "rows", 8, tapes="replay"),
        )
    )
    small, wide = (uniform_plan(work.graph, "rows", rows) for rows in (8, 32))
    file = PlanFile(
        problem=PROBLEM,
        fingerprint=work.graph.fingerprint,
        budget_bytes=1_000_000,
        plan=chosen,
        predicted={"peak_bytes": 900_000, "activation_bytes": 800_000, "seconds": 0.1, "peak_at": "relu"},
        measured=dict.fromkeys(MEASURED)
        | {"peak_bytes": 910_000, "activation_bytes": 400_000, "step_seconds": 0.118}
        | {"plain_peak_bytes": 3_100_000, "plain_step_seconds": 0.1, "max_relative_error": 2e-6},
        front=(
            {"peak_bytes": 500_000, "step_seconds": 0.2, "decisions": small.to_dict()},
            {"peak_bytes": 910_000, "step_seconds": 0.118, "decisions": chosen.to_dict()},
            {"peak_bytes": 1_500_000, "step_seconds": 0.105, "decisions": wide.to_dict()},
        ),
        study="plan.records.jsonl",
    )
    save_plan(file, path / "plan.json")
    records = RecordFile(path / "plan.records.jsonl", study_identity(work))
    for record in study(chosen, small, wide):
        records.append(record)
    yield path


def study(chosen: Plan, small: Plan, wide: Plan) -> list[Record]:
    def of(plan: Plan, status: str = "ok", reason: str = "", **more: Any) -> Record:
        return Record(digest(plan), status, reason, decisions=plan.to_dict(), **more)

    other = [replace(small, segments=(replace(small.segments[0], band_rows=n),)) for n in range(2, 7)]
    return [
        Record(PLAIN, "ok", peak_bytes=3_100_000, step_seconds=0.1),
        of(chosen, values={"band": "any", "halo": "any"}, **costs(910_000, 0.118)),
        of(small, values={"band": "low", "halo": "any"}, **costs(500_000, 0.2)),
        of(wide, values={"band": "high", "halo": "any"}, **costs(1_500_000, 0.105)),
        of(other[0], values={"band": "low", "halo": "sweep"}, **costs(510_000, 0.21)),
        of(other[1], "slow", "a step of 0.4 s cannot win", step_seconds=0.4),
        of(other[2], "rejected", "predicted 4.00 MB, over the budget", predicted_bytes=4_000_000),
        of(other[3], "oom", "killed (signal 9)", values={"band": "low", "halo": "cache"}),
        of(other[4], "oom", "killed (signal 9)", values={"band": "low", "halo": "cache"}),
    ]


def call(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def made(folder: Path) -> Any:
    return call("report", str(folder / "plan.json"))


def test_the_verdict_is_one_sentence(made: Any) -> None:
    text = "fits 1.00 MB: peak 910 kB, 1.18x plain's time; plain needs 3.10 MB"
    assert made["verdict"]["text"] == text and made["verdict"]["fits"]


def test_the_verdict_of_what_does_not_fit_or_had_no_plain(folder: Path) -> None:
    file = load_plan(folder / "plan.json")
    alone = {**file.measured, "plain_peak_bytes": None, "plain_step_seconds": None}
    page = make_page(replace(file, measured=alone, budget_bytes=900_000), [], "p", Unknown("closed"))
    assert page.verdict.text == "does not fit 900 kB: peak 910 kB; plain could not run here"
    assert page.note == "closed" and page.memory is None and len(page.segments) == 3


def test_segments_have_what_the_prediction_says(folder: Path, made: Any) -> None:
    """The most of all segments is the plan's peak; what they keep is there when backward begins."""
    file = load_plan(folder / "plan.json")
    _, predicted = open_plan(file)
    segments = made["segments"]
    assert [s["policy"] for s in segments] == ["checkpoint", "keep", "rows"]
    assert max(s["peak_bytes"] for s in segments) == predicted
    assert sum(s["share"] for s in segments) == pytest.approx(1.0)
    assert all(s["seconds"] > 0 and s["kept_bytes"] >= 0 for s in segments)


@pytest.mark.parametrize("barriers", ["store", "recompute", "narrow"])
def test_a_segment_that_runs_as_several_is_one(barriers: Any) -> None:
    """Where all rows must have passed, a stored tensor ends what runs, but not the plan's segment."""
    source = Source("zoo", "unet_bn", (("base", 4), ("depth", 1)))
    graph = prepare(replace(PROBLEM, model=source)).graph
    half = len(graph.nodes) // 2
    rows = Segment(graph.nodes[0].name, graph.nodes[half].name, "rows", 8, barriers=barriers)
    plan = Plan((rows, Segment(graph.nodes[half + 1].name, graph.nodes[-1].name)))
    found = segment_costs(graph, plan, 1, Clock(Profile()))
    assert len(found) == 2 and max(s.peak_bytes for s in found) == predict(graph, plan, 1).peak_bytes
    assert all(s.seconds > 0 and s.kept_bytes > 0 for s in found)


def test_memory_over_the_step(folder: Path, made: Any) -> None:
    plan, plain = made["memory"]["plan"], made["memory"]["plain"]
    for drawn in (plan, plain):
        assert max(size for _, size in drawn["points"]) == drawn["peak_bytes"]
        assert [at for at, _ in drawn["points"]] == sorted(at for at, _ in drawn["points"])
        assert 0 < drawn["backward_at"] < 1 and drawn["held"]
        assert sum(h["bytes"] for h in drawn["held"]) <= drawn["peak_bytes"]
        sizes = [h["bytes"] for h in drawn["held"]]
        assert sizes == sorted(sizes, reverse=True)
    _, predicted = open_plan(load_plan(folder / "plan.json"))
    assert plan["peak_bytes"] == pytest.approx(predicted, rel=0.05)
    assert plan["peak_bytes"] < plain["peak_bytes"]
    assert any(h["role"] == "activation" and "1x4x64x32" in h["name"] for h in plain["held"])


def test_a_step_of_too_many_calls_is_drawn_by_segments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowtune.report.step.MOST_CALLS", 10)
    file = load_plan(folder / "plan.json")
    work, predicted = open_plan(file)
    drawn = curve(work.graph, file.plan, work.optimizer.slots)
    assert drawn.detail == "segments" and len(drawn.points) == 3 * 2 * len(file.plan.segments)
    assert drawn.peak_bytes == predicted == max(size for _, size in drawn.points)


def test_knobs_failures_and_the_certificate(made: Any) -> None:
    band = next(k for k in made["knobs"] if k["name"] == "band")
    halo = next(k for k in made["knobs"] if k["name"] == "halo")
    assert made["knobs"][0] is band or band["matters"] >= halo["matters"]
    assert band["matters"] > 0.9
    low = next(c for c in band["choices"] if c["value"] == "low")
    assert low == {"value": "low", "measured": 2, "best_seconds": 0.2}
    assert made["failures"][0] | {"example": ""} == {
        "status": "oom", "reason": "killed (signal 9)", "count": 2, "example": "",
    }  # fmt: skip
    assert {f["status"] for f in made["failures"]} == {"oom", "slow", "rejected"}
    shown = made["certificate"]
    assert shown["bound_seconds"] == 0.118 and shown["over_bound"] == pytest.approx(0.0)
    assert shown["gradient_error"] == 2e-6 and shown["measured_plans"] == 7
    assert any("halo cache" in text for text in shown["unexplored"])
    assert any("1 plan was predicted only" in text for text in shown["unexplored"])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[1.0, 1.0], [2.0, 2.0]], 1.0),
        ([[1.0, 2.0], [1.0, 2.0]], 0.0),
        ([[1.0, 2.0, 3.0]], 0.0),
        ([[1.0], [2.0]], 0.0),
        ([[1.0, 1.0], [1.0]], 0.0),
    ],
)
def test_importance_is_what_chance_does_not_explain(groups: list[list[float]], expected: float) -> None:
    assert importance(groups) == pytest.approx(expected)


def test_every_command_that_is_advised_is_one(made: Any, folder: Path) -> None:
    """Up to its model and plan: flags that do not exist, or values of the wrong kind, are exit code 2."""
    commands = [a["command"] for a in made["advice"] if a["command"]]
    assert {c.split()[1] for c in commands} == {"run", "search", "fit"}
    assert any("--budget 500000" in c and c.startswith("rowtune run") for c in commands)
    assert any("--budget 1500000" in c for c in commands), "the front beyond the budget"
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "rowtune"
        shown = CliRunner().invoke(app, [*words, "--nonsense"])
        assert "--nonsense" in shown.output, "all before it was understood"


def test_the_terminal_shows_every_section(folder: Path) -> None:
    for columns in ("80", "120"):
        shown = CliRunner().invoke(app, ["report", str(folder / "plan.json")], env={"COLUMNS": columns})
        assert shown.exit_code == 0, shown.output
        lines = [line for line in shown.stdout.splitlines() if not line.startswith("    rowtune ")]
        assert max(map(len, lines)) <= int(columns)
        for words in (
            "1.18x plain's time", "along the network", "═ rows 8 ═", "Memory over the step",
            "at plain's peak", "★", "Knobs that mattered", "killed (signal 9)", "What to try",
            "Certificate", "unexplored",
        ):  # fmt: skip
            assert words in shown.stdout, words


def test_names_and_reasons_are_no_markup(folder: Path, tmp_path: Path) -> None:
    """Brackets in a path, and in what a worker said, are shown as they are."""
    path = tmp_path / "a[bold]b[red].json"
    save_plan(load_plan(folder / "plan.json"), path)
    records = (folder / "plan.records.jsonl").read_text().replace("killed (signal 9)", "[/x] enforce [red]")
    (tmp_path / "plan.records.jsonl").write_text(records)
    for more in ((), ("--compare", str(path))):
        words = ["report", str(path), "--no-model", *more]
        shown = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
        assert shown.exit_code == 0, shown.output
        assert "a[bold]b[red].json" in shown.stdout
        assert more or "[/x] enforce [red]" in shown.stdout


def test_without_its_model_the_files_speak(folder: Path) -> None:
    shown = call("report", str(folder / "plan.json"), "--no-model")
    assert shown["memory"] is None and "--no-model" in shown["note"] and len(shown["trials"]) == 9
    file = load_plan(folder / "plan.json")
    elsewhere = step_cost(replace(file, problem=replace(file.problem, device="cuda:7")))
    assert not isinstance(elsewhere, Unknown) and not elsewhere.timed
    changed = replace(file, fingerprint="0" * 16)
    step = step_cost(changed)
    assert isinstance(step, Unknown) and "fingerprint" in step.why


class Page(HTMLParser):
    """Scripts by id, and every attribute that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.id = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.fetched += [str(found[key]) for key in ("src", "href", "data") if key in found]
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.id = (found.get("id") or "") if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.id = ""

    def handle_data(self, data: str) -> None:
        if self.id:
            self.scripts[self.id] = self.scripts.get(self.id, "") + data


def test_the_page_holds_the_json_and_fetches_nothing(folder: Path, made: Any) -> None:
    out = folder / "report.html"
    shown = call("report", str(folder / "plan.json"), "--html", str(out))
    text = out.read_text()
    page = Page()
    page.feed(text)
    assert not page.open and not page.fetched
    assert json.loads(page.scripts["report"]) == shown == made
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and "@import" not in text


def test_no_name_ends_the_script(made: Any) -> None:
    hostile = {**made, "model": "</script><script>alert(1)</script><!--", "plan": "<b>&amp;/*data*/null"}
    page = Page()
    page.feed(html(hostile))
    assert not page.open and json.loads(page.scripts["report"]) == hostile


def test_a_page_replaces_only_a_page(folder: Path) -> None:
    mine = folder / "mine.html"
    mine.write_text("<p>my thesis</p>")
    words = ("report", str(folder / "plan.json"), "--no-model", "--html", str(mine))
    assert "--force" in call(*words, code=2)["error"] and mine.read_text() == "<p>my thesis</p>"
    call(*words, "--force")
    call(*words)
    assert "my thesis" not in mine.read_text()


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """Another plan, smaller and slower, of the same study."""
    file = load_plan(folder / "plan.json")
    member = file.front[0]
    figures = {k: member[k] for k in ("peak_bytes", "step_seconds")}
    path = folder / "other.json"
    save_plan(
        replace(file, plan=Plan.from_dict(member["decisions"]), measured={**file.measured, **figures}), path
    )
    return path


def test_two_plans_side_by_side(folder: Path, other: Path) -> None:
    words = ("report", str(folder / "plan.json"), "--compare", str(other))
    shown = call(*words)
    rows = {row["name"]: row for row in shown["compare"]["rows"]}
    assert rows["peak"]["better"] == "other" and rows["step"]["better"] == "one"
    assert rows["peak"]["one"] == "910 kB" and rows["of plain's time"]["other"] == "2.00x"
    assert shown["compare"]["note"] == "" and shown["compare"]["other"]["plan"] == str(other)
    assert shown["compare"]["other"]["memory"]["plan"] != shown["memory"]["plan"]
    printed = CliRunner().invoke(app, words, env={"COLUMNS": "100"})
    assert printed.exit_code == 0 and printed.stdout.count("Memory and time") == 1
    assert printed.stdout.count("the plan (") == 2


def test_what_cannot_be_compared_is_said(folder: Path, other: Path) -> None:
    data = json.loads(other.read_text())
    data["optimizer"] = "adam:lr=0.001"
    apart = folder / "apart.json"
    apart.write_text(json.dumps(data))
    shown = call("report", str(folder / "plan.json"), "--no-model", "--compare", str(apart))
    assert shown["compare"]["note"] == "not of the same thing: made for different training"


def drawn(page: Path, profile: Path) -> str:
    """The page's elements after its scripts ran, without the scripts."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    more = ["--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(
        [str(BROWSER), *words, *more], check=True, capture_output=True, text=True, timeout=120
    )
    return re.sub(r"<script.*?</script>", "", shown.stdout, flags=re.S)


browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the page is only parsed")


@browser
@pytest.mark.parametrize("words", [(), ("--compare", "other.json")])
def test_a_browser_draws_the_page(folder: Path, other: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    """Its scripts ran to their end, and every plot and table is there."""
    out = folder / "drawn.html"
    more = [str(folder / w) if w.endswith(".json") else w for w in words]
    shown = call("report", str(folder / "plan.json"), "--html", str(out), *more)
    dom = drawn(out, tmp_path)
    assert 'data-ready="yes"' in dom and "[object" not in dom and "undefined" not in dom
    for label in ("memory over the step", "memory and time of every plan measured"):
        assert f'aria-label="{label}"' in dom
    many = 2 if words else 1
    assert dom.count('class="strip"') == many and "Certificate" in dom
    measured = sum(t["status"] in ("ok", "slow") and bool(t["step_seconds"]) for t in shown["trials"])
    assert dom.count("<circle") >= many * (measured - 1) + 2
    assert dom.count("copy</button>") == sum(bool(a["command"]) for a in shown["advice"])


ACTIONS = """
const plot = document.querySelector('svg[aria-label="memory over the step"]');
const box = plot.getBoundingClientRect(), buttons = [...document.querySelectorAll("button")];
plot.dispatchEvent(new MouseEvent("mousemove", { clientX: box.left + box.width / 2, clientY: box.top + 9 }));
document.body.dataset.tip = document.getElementById("tip").textContent;
const dot = document.querySelector('svg[aria-label^="memory and time"] circle');
dot.dispatchEvent(new MouseEvent("mousemove", { clientX: 9, clientY: 9 }));
document.body.dataset.dot = document.getElementById("tip").textContent;
const press = (words) => buttons.find((button) => button.textContent === words).click();
const before = document.documentElement.dataset.theme;
press("light / dark");
document.body.dataset.themes = before + " " + document.documentElement.dataset.theme;
press("log scale");
const first = () => document.querySelector("main > section:last-of-type tbody td").textContent;
document.querySelector("main > section:last-of-type th").click();
document.body.dataset.first = first();
"""


@browser
def test_plots_answer(folder: Path, made: Any, tmp_path: Path) -> None:
    """Pointing says what is there; buttons change theme and scale; a column's head sorts."""
    page = tmp_path / "acted.html"
    page.write_text(html(made).replace("</body>", f"<script>{ACTIONS}</script></body>"))
    dom = drawn(page, tmp_path / "profile")
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom)[0]))  # type: ignore[index]
    assert "% of the step" in found["tip"] and "plain PyTorch" in found["tip"]
    assert "a step" in found["dot"] and set(found["themes"].split()) == {"light", "dark"}
    assert found["first"].startswith(min(t["plan"] for t in made["trials"])[:8])


def test_frozen_and_plain(folder: Path) -> None:
    """A page is a value: nested dataclasses that JSON can hold as they are."""
    file = load_plan(folder / "plan.json")
    page = make_page(file, [], "p", Unknown("closed"))
    assert (
        json.loads(json.dumps(page.to_dict()))["segments"] == json.loads(json.dumps(asdict(page)))["segments"]
    )
    with pytest.raises(AttributeError):
        page.plan = "q"  # type: ignore[misc]
