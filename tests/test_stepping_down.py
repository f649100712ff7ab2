"""Memory that runs out in training costs no step: the run is that of the smaller plan from there on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Fault
from safetensors.torch import load_file
from simulated_card import Card, insert
from torch.utils import _pytree as pytree
from training import MODELS, masks, plan_file, workload

from rowtune.errors import InfeasibleError
from rowtune.importers.source import parse_source
from rowtune.plan.file import PlanFile
from rowtune.plan.plan import Plan
from rowtune.plan.uniform import uniform_plan
from rowtune.train.loop import train
from rowtune.train.options import Options, Report, SteppedDown, StepReport, Trained
from rowtune.tune.step import Workload, define

SYNCED = """
class Synced(Pixels):
    def __init__(self):
        super().__init__()
        self.n = nn.SyncBatchNorm(4)
"""

PIXELS = ("held_models:Pixels", "2x3x16x12")
TOLD = Callable[[Report], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("held")
    (path / "held_models.py").write_text(MODELS + SYNCED)
    masks(path / "pictures", count=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        yield path


def ladder(work: Workload, **whole: Any) -> list[Plan]:
    """Plans by falling memory."""
    made = (uniform_plan(work.graph, "keep"), *(uniform_plan(work.graph, "rows", n) for n in (8, 4)))
    return [replace(plan, **whole) for plan in made]


def unet() -> Workload:
    return define(parse_source("zoo:unet", ["base=4", "depth=1"]), ["1x3x96x48"])


def with_front(work: Workload, plans: list[Plan], at: int = 0) -> PlanFile:
    front = tuple(
        {"peak_bytes": 1000 - i, "step_seconds": 1.0 + i, "decisions": plan.to_dict()}
        for i, plan in enumerate(plans)
    )
    file = plan_file(work)
    return replace(file, plan=plans[at], front=front, measured={"peak_bytes": 1000 - at})


def run(
    folder: Path, options: Options, at: int = 0, fault: Fault | None = None, when: int = 0, **whole: Any
) -> tuple[Trained, list[float], list[SteppedDown]]:
    """Train; `fault` is armed for step `when`."""
    work = workload(*PIXELS, dtype="float64")
    losses: list[float] = []
    down: list[SteppedDown] = []

    def watch(report: Report) -> None:
        if isinstance(report, StepReport):
            losses.append(report.loss)
            if fault is not None:
                fault.armed = report.step == when - 1
        elif isinstance(report, SteppedDown):
            down.append(report)

    if fault is not None:
        fault.armed = when == 1
    with fault or nullcontext():
        trained = train(with_front(work, ladder(work, **whole), at), work, options, watch)
    return trained, losses, down


def state(folder: Path, steps: int) -> list[Any]:
    """Weights, running statistics and the optimizer's state of a checkpoint."""
    kept = folder / f"step-{steps:08d}"
    rest = torch.load(kept / "state.pt", weights_only=True)
    tensors = load_file(kept / "weights.safetensors")
    return [*(tensors[k] for k in sorted(tensors)), *pytree.tree_leaves(rest["optimizer"]), rest["random"]]


def same(a: list[Any], b: list[Any], exactly: bool) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0 if exactly else 1e-10, atol=0 if exactly else 1e-12)
        elif isinstance(x, dict):
            assert x.keys() == y.keys() and torch.equal(x["torch"], y["torch"])
        else:
            assert x == y


SGD = Options(epochs=9, steps=5, data="pictures", optimizer="sgd:lr=0.1,momentum=0.9")
# A bias before a batch norm has a gradient of zero but for noise, which a small eps would make large.
ADAM = replace(SGD, optimizer="adam:lr=0.01,eps=0.001")
LOOP = replace(SGD, optimizer="rmsprop:lr=0.01,momentum=0.9,eps=0.001")


@pytest.mark.parametrize(
    ("options", "fault", "when", "whole"),
    [
        (SGD, Fault("convolution", 2), 3, {}),
        (SGD, Fault("relu"), 3, {}),
        (SGD, Fault("", 5, backward=True), 2, {}),  # while the step is metered
        (replace(SGD, clip=0.01), Fault("convolution_backward", 2, backward=True), 4, {}),
        (SGD, Fault("_fused_sgd"), 1, {}),
        (ADAM, Fault("zeros_like", 2), 1, {}),  # some of the optimizer's state is there already
        (ADAM, Fault("_fused_adam"), 3, {}),
        (LOOP, Fault("addcdiv", 3), 3, {}),  # parameters before this one were changed
        (LOOP, Fault("addcmul", 2), 5, {}),  # and its own state, the last step
        (ADAM, Fault("_fused_adam", 3, backward=True), 3, {"step_in_backward": True}),
        (ADAM, Fault("_fused_adam", 3), 3, {"optimizer_state": "host"}),
        (
            SGD,
            Fault("_fused_sgd", 3, backward=True),
            4,
            {"optimizer_state": "host", "step_in_backward": True},
        ),
        (replace(SGD, accumulate=2), Fault("convolution", 3), 2, {}),
        (replace(ADAM, accumulate=2), Fault("convolution_backward", 3, backward=True), 3, {}),
        (replace(LOOP, accumulate=2), Fault("addcdiv", 2), 3, {}),
    ],
)
def test_no_step_is_lost(
    folder: Path, tmp_path: Path, options: Options, fault: Fault, when: int, whole: dict[str, Any]
) -> None:
    held = replace(options, checkpoint=tmp_path / "held")
    trained, losses, down = run(folder, held, 0, fault, when, **whole)
    assert fault.raised == 1 and [d.step for d in down] == [when] and trained.steps == 5
    assert f"step {when} ran out of memory (simulated card" in trained.notes[0]
    # The same with the smaller plan from that step on, of a run that goes on with it.
    wanted = replace(options, checkpoint=tmp_path / "wanted")
    before = run(folder, replace(wanted, steps=when - 1), **whole)[1] if when > 1 else []
    after = run(folder, replace(wanted, resume=True), 1, **whole)[1]
    exactly = options.accumulate == 1  # or else the step's first batch was the larger plan's
    assert losses == (before + after if exactly else pytest.approx(before + after, rel=1e-10))
    same(state(tmp_path / "held", 5), state(tmp_path / "wanted", 5), exactly)


def test_as_often_as_the_front_has_plans(folder: Path) -> None:
    fault = Fault("convolution", 2, times=2)
    trained, losses, down = run(folder, SGD, 0, fault, 3)
    assert [(d.step, d.peak_bytes, d.step_seconds) for d in down] == [(3, 999, 2.0), (3, 998, 3.0)]
    assert trained.status == "ok" and len(losses) == 5 and trained.peak_bytes
    with pytest.raises(InfeasibleError, match=r"step 3 ran out of memory.*no plan that takes less: search"):
        run(folder, SGD, 0, Fault("convolution", 2, times=3), 3)


def test_what_the_run_s_options_forbid_is_left_out(folder: Path) -> None:
    work = workload(*PIXELS)
    plans = ladder(work)
    file = with_front(work, [plans[0], replace(plans[1], step_in_backward=True), plans[2]])
    fault, down = Fault("convolution"), []
    fault.armed = True
    with fault:
        train(
            file,
            work,
            replace(SGD, clip=1.0),
            lambda r: down.append(r) if isinstance(r, SteppedDown) else None,
        )
    assert [d.peak_bytes for d in down] == [998]


def test_a_validation_steps_down(folder: Path) -> None:
    """The first two steps are an epoch; validations run after each."""
    work = workload(*PIXELS)
    fault = Fault("convolution", 2)
    options = replace(SGD, epochs=2, steps=None, val="pictures")
    said: list[Report] = []

    def watch(report: Report) -> None:
        said.append(report)
        fault.armed = isinstance(report, StepReport) and report.step == 4

    with fault:
        held = train(with_front(work, ladder(work)), work, options, watch)
    wanted = train(with_front(work, ladder(work), 1), workload(*PIXELS), options)
    assert [r.step for r in said if isinstance(r, SteppedDown)] == [4] and fault.raised == 1
    assert held.validation == pytest.approx(wanted.validation, rel=1e-4)
    assert held.val_peak_bytes == wanted.val_peak_bytes


def test_a_card_that_is_too_small_for_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is injected: plans take what they take, and the cap lies between two of them."""
    peaks = []
    for at in range(2):
        work = unet()
        trained = train(with_front(work, ladder(work), at), work, Options(steps=3))
        peaks.append(trained.peak_bytes or 0)
    work = unet()
    limit = (peaks[0] + peaks[1]) // 2
    parameters = sum(t.numel() * t.itemsize for t in work.module.state_dict().values())
    card = insert(monkeypatch, Card(1 << 40, parameters))
    with card:
        file = replace(with_front(work, ladder(work)), budget_bytes=limit)
        trained = train(file, work, Options(steps=4))
    assert trained.status == "ok" and trained.steps == 4 and len(trained.notes) == 1 and card.refused == 1
    assert peaks[1] == trained.peak_bytes and trained.peak_bytes <= limit < peaks[0]


RANK = """
import json, os, sys
from dataclasses import replace
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from faults import Fault
from test_stepping_down import ladder, with_front, SGD
from training import workload
from rowtune.train.loop import train
from rowtune.train.options import StepReport, SteppedDown
from rowtune.errors import RowtuneError

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def trained(case, where=None, failing=1, **changed):
    # Losses and reasons, sums of parameters, an error.
    work = workload(f"held_models:{case}", "2x3x16x12", dtype="float64")
    fault = Fault(*where or ("",), backward=where is not None and "backward" in where[0])
    said, error = [], ""

    def watch(report):
        if isinstance(report, StepReport):
            said.append(report.loss)
            fault.armed = where is not None and rank == failing and report.step == 2
        elif isinstance(report, SteppedDown):
            said.append(report.reason)

    options = replace(SGD, steps=4, data=f"held_data:rank{rank}", **changed)
    with fault:
        try:
            train(with_front(work, ladder(work)), work, options, watch)
        except (RowtuneError, RuntimeError) as found:
            error = str(found)
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in work.module.parameters()]
    return said, [t.double().sum().tolist() for t in parts], error

cases = [
    trained("Pixels"), trained("Pixels", ("convolution", 2)), trained("Pixels", ("aten.cat",), 0),
    trained("Synced"), trained("Synced", ("convolution", 2)),
    trained("Synced", ("convolution_backward", 2), 0),
    trained("Synced", accumulate=2), trained("Synced", ("convolution", 3), accumulate=2),
    trained("Pixels", ("convolution", 2), fsdp=True),
]
print(json.dumps(cases), flush=True)
os._exit(0)  # a group that was given up is not left in order
"""
RANK_DATA = """
import torch
from training import workload
def make(seed):
    g = torch.Generator().manual_seed(seed)
    image = lambda: torch.rand(2, 3, 16, 12, generator=g)
    return [(image(), torch.randint(3, (2, 16, 12), generator=g)) for _ in range(4)]
def rank0(): return make(0)
def rank1(): return make(1)
"""


def test_ranks_step_down_together(folder: Path) -> None:
    """One of two runs out of memory in the third step: where it can tell the other at its end, and where the
    other waits for it in the middle, so that they go on in another group. What is trained is what is trained
    without that; only weights in parts hold on to their group, and nobody waits for ever."""
    (folder / "rank.py").write_text(RANK)
    (folder / "held_data.py").write_text(RANK_DATA)
    words = [str(folder / "group"), str(Path(__file__).parent)]
    started = [
        subprocess.Popen(
            [sys.executable, "rank.py", str(rank), *words],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in started]
    assert all(out for out, _ in ended), ended
    (*ranks, parts), (*others, other_parts) = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    undisturbed = {"Pixels": 0, "Synced": 3, "accumulated": 6}
    for at, failing, like in ((1, 1, "Pixels"), (2, 0, "Pixels"), (4, 1, "Synced"), (5, 0, "Synced"),
                              (7, 1, "accumulated")):  # fmt: skip
        here = ranks[at], others[at]
        reasons = [[s for s in said if isinstance(s, str)] for said, _, _ in here]
        assert reasons[failing] == ["simulated card out of memory"], (at, here)
        assert reasons[1 - failing] == ["on another rank"] and not here[0][2] and not here[1][2]
        losses = [[s for s in said if isinstance(s, float)] for said, _, _ in here]
        assert losses[0] == losses[1] and here[0][1] == here[1][1], "the ranks have one model"
        said, sums, _ = ranks[undisturbed[like]]
        assert losses[0] == pytest.approx(said, rel=1e-10) and here[0][1] == pytest.approx(sums, rel=1e-9)
    assert "rank 1 ran out of memory (simulated card out of memory) where ranks wait" in other_parts[2]
    assert "(--fsdp)" in other_parts[2] and parts[2] and not any(isinstance(s, str) for s in parts[0])
