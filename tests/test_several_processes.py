"""`rowtune run` under torchrun: two processes are one with twice the batch, go on bit for bit, and what fails
says so once. A launch starts two interpreters, so each runs several commands, one after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import plan_file, workload
from typer.testing import CliRunner

import rowtune
from rowtune.cli.app import app
from rowtune.errors import UsageError
from rowtune.importers.synced import share_statistics
from rowtune.plan.file import save_plan
from rowtune.train.data import Stream
from rowtune.train.launch import Team, launched
from rowtune.train.options import Shard

NETS = """
import os, signal
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.a, self.n, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(drop)
        self.b, self.m, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.c(torch.relu(self.m(self.b(self.drop(torch.relu(self.n(self.a(x))))))))

def net(): return Net()
def dropping(): return Net(0.3)

class Items(torch.utils.data.Dataset):
    def __init__(self, bad=-1, deadly=-1):
        self.bad, self.deadly = bad, deadly

    def __len__(self):
        return 9  # one too many for two times two

    def __getitem__(self, i):
        if i == self.bad:
            raise OSError("bad sector")
        if i == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        g = torch.Generator().manual_seed(i)
        image = torch.randn(3, 16, 12, generator=g) + torch.rand(3, 1, 1)
        return image, torch.randint(3, (16, 12), generator=g)

def items(): return Items()
def bad(): return Items(bad=BROKEN)
def deadly(): return Items(deadly=BROKEN)
"""
EACH = """
import contextlib, json, sys
from pathlib import Path
import rowtune.cli.run as run
from rowtune.cli.app import app
from rowtune.errors import RowtuneError
from rowtune.train.launch import joined, launched

run.joined = lambda team: contextlib.nullcontext()  # one group for all commands
try:
    with joined(launched()):
        for words in json.loads(sys.argv[1]):
            assert not app(words, standalone_mode=False), words
        run.command(Path("two.json"), data="rank_nets:bad", epochs=2)
except RowtuneError as error:
    print(f"rowtune: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
RUN = ("run", "two.json", "--data", "rank_nets:items", "--epochs", "2", "--clip", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("ranks")
    # What rank 1 reads in the first epoch's second step.
    from rowtune.train.random_state import seed_of

    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed_of(0, 0))).tolist()
    (path / "rank_nets.py").write_text(NETS.replace("BROKEN", str(order[6])))
    (path / "each.py").write_text(EACH)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        for name, net, batch in (("two", "net", 2), ("one", "net", 4), ("drop", "dropping", 2)):
            work = workload(f"rank_nets:{net}", f"{batch}x3x16x12", dtype="float64")
            save_plan(plan_file(work), path / f"{name}.json")
        yield path


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in each of two processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )  # fmt: skip


def ours(ended: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in ended.stderr.splitlines() if line.startswith("rowtune: ")]


def weights(path: Path) -> dict[str, Any]:
    return load_file(path)


def test_two_are_one_with_twice_the_batch_and_go_on_bit_for_bit(folder: Path) -> None:
    drop = ["run", "drop.json", *RUN[2:], "--ema", "0.9", "--val", "rank_nets:items", "-q"]
    commands = [
        [*RUN, "--save", "two.safetensors", "--metrics", "two.jsonl", "--json"],
        [*drop, "--checkpoint", "whole"],
        [*drop, "--checkpoint", "part", "--steps", "3"],
        [*drop, "--checkpoint", "part", "--resume"],
        [*RUN, "--fsdp", "--steps", "2", "--checkpoint", "parts", "-q"],
        [
            *RUN,
            "--fsdp",
            "--val",
            "rank_nets:items",
            "--checkpoint",
            "parts",
            "--resume",
            "-q",
            "--save",
            "parts.safetensors",
        ],
    ]
    ended = torchrun(folder, "each.py", json.dumps(commands))
    one = CliRunner().invoke(app, ["run", "one.json", *RUN[2:], "--save", "one.safetensors", "--json"])
    said, other = json.loads(ended.stdout.splitlines()[0]), json.loads(one.stdout)
    assert said["steps"] == other["steps"] == 4 and said["status"] == "ok"
    assert said["loss"] == pytest.approx(other["loss"], rel=1e-10)
    assert len((folder / "two.jsonl").read_text().splitlines()) == 4  # one process writes
    first, second = weights(folder / "two.safetensors"), weights(folder / "one.safetensors")
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)
    assert float(first["n.running_mean"].abs().max()) > 0
    kept = weights(folder / "parts/step-00000004/weights.safetensors")
    for name, value in weights(folder / "parts.safetensors").items():
        assert torch.equal(kept[name], value)
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)  # in parts (FSDP2), the same

    found = {name: sorted(p.name for p in (folder / name).iterdir()) for name in ("whole", "part")}
    assert found == {"whole": ["step-00000004"], "part": ["step-00000004"]}
    whole, part = (folder / name / "step-00000004" for name in ("whole", "part"))
    for kind in ("weights", "ema"):
        a, b = (weights(path / f"{kind}.safetensors") for path in (whole, part))
        assert all(torch.equal(a[k], v) for k, v in b.items())
    a, b = (torch.load(path / "state.pt", weights_only=True) for path in (whole, part))
    assert len(a["others"]) == 1 and torch.equal(a["random"]["torch"], b["random"]["torch"])
    assert torch.equal(a["others"][0]["random"]["torch"], b["others"][0]["random"]["torch"])
    assert not torch.equal(a["random"]["torch"], a["others"][0]["random"]["torch"])  # masks of its own

    # The last command's item could not be read, by rank 1 alone.
    assert ended.returncode == 1  # torchrun's own
    assert ours(ended) == ["rowtune: rank 1 of 2: --data rank_nets:bad: OSError: bad sector"]


def test_a_killed_rank_is_said_by_the_other(folder: Path) -> None:
    words = [*RUN[:2], "--data", "rank_nets:deadly", "--epochs", "2"]
    ended = torchrun(folder, "-m", "rowtune", *words)
    assert ended.returncode == 1 and len(ours(ended)) == 1
    assert "rank 0 of 2 lost another one" in ours(ended)[0] and "--resume" in ours(ended)[0]


def test_one_process_of_two_s_run_is_refused(folder: Path) -> None:
    """What was trained by two is not gone on with by one."""
    from rowtune.train.checkpoint import PROCESSES, check_same

    check_same({}, {PROCESSES: 1}, folder)  # made before there were several
    with pytest.raises(UsageError, match="the number of processes 2, this run has 1"):
        check_same({PROCESSES: 2}, {PROCESSES: 1}, folder)


def test_a_loader_s_batches_are_dealt_out() -> None:
    parts = [[*Stream(range(7), lambda b: b, Shard(rank, 3)).epoch(0)] for rank in range(3)]  # type: ignore[arg-type,return-value]
    assert parts == [[0, 3], [1, 4], [2, 5]]
    later = Stream(range(7), lambda b: b, Shard(1, 3)).epoch(0, 1)  # type: ignore[arg-type,return-value]
    assert [*later] == [4]


@pytest.mark.parametrize("words", [[], ["--ema", "0.9"]])
def test_one_process_has_nothing_to_shard(folder: Path, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["run", "two.json", "--fsdp", *words])
    assert result.exit_code == 2 and "torchrun --nproc-per-node N" in result.stderr


def test_norms_without_modules_share_their_statistics() -> None:
    """As an ONNX file's: called by its network, not by a module of their own."""

    class Functional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.nn.functional.batch_norm(self.a(x), None, None, training=True))

    model, x = Functional(), torch.randn(2, 3, 8, 8)

    def shared() -> list[bool]:
        graph = rowtune.trace(model, (x,))
        return [node.args[3] for node in graph.nodes if node.op == "moments"]

    before = rowtune.trace(model, (x,)).fingerprint
    assert shared() == [False, False]
    share_statistics(model)
    assert shared() == [True, False]  # a group norm's are an image's own
    assert rowtune.trace(model, (x,)).fingerprint == before  # plans are for it as before


def test_who_started_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == Team()
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**said, "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    team = launched()
    assert team == Team(3, 4, 1, 2)
    assert team.device("auto", "cuda:0") == team.device("cuda", "cuda:0") == "cuda:1"
    assert team.device("auto", "cpu") == "auto" and team.device("cpu", "cuda:0") == "cpu"
    assert Team().device("cuda:3", "cuda:0") == "cuda:3"
    with pytest.raises(UsageError, match="a card each; give --device cuda"):
        team.device("cuda:0", "cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == Team()


ORDERS = """
import sys
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import rowtune

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
x = torch.randn(1, 3, 12, 8, dtype=torch.float64)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())).double()

plain, graph = net(), rowtune.trace(net(), (x,))
plan = rowtune.uniform_plan(graph, "rows", 4)
plain(x).square().mean().backward()

def after(model):
    return fully_shard(rowtune.apply(model, plan), mesh=mesh)

def before(model):
    return rowtune.apply(fully_shard(model, mesh=mesh), plan)

def part_before(model):
    fully_shard(model[1], mesh=mesh)
    return rowtune.apply(model, plan)

def part_after(model):
    module = rowtune.apply(model, plan, graph=graph)
    fully_shard(model[1], mesh=mesh)
    return module

def both_after(model):
    return fully_shard(part_after(model), mesh=mesh)

def traced(model):
    rowtune.trace(fully_shard(model, mesh=mesh), (x,))

for order in (after, before, part_before, part_after, both_after, traced):
    model = net()
    try:
        order(model)(x).square().mean().backward()
        alike = [torch.allclose(a.grad, b.grad.full_tensor()) for a, b in
                 zip(plain.parameters(), model.parameters(), strict=True)]
        print(order.__name__, "exact" if all(alike) else "wrong")
    except Exception as error:
        print(order.__name__, type(error).__name__, error)
"""


def test_weights_are_sharded_after_the_plan_or_refused(tmp_path: Path) -> None:
    """Around what apply returned they may be; any other order is refused, with the one that works."""
    ended = subprocess.run(
        [sys.executable, "-c", ORDERS, str(tmp_path / "meet")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = dict(line.split(" ", 1) for line in ended.stdout.splitlines())
    assert said.pop("after") == "exact", ended.stderr
    assert sorted(said) == ["before", "both_after", "part_after", "part_before", "traced"]
    for order, text in said.items():
        part = "its part 1" if "part" in order or order == "both_after" else "the model"
        assert text.startswith(f"UsageError {part} was sharded"), text
        assert "first module = rowtune.apply(model, plan), then fully_shard(module)" in text
