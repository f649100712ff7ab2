"""Damaged and hostile plan.json and .onnx files, by the thousand, through the commands that read them.

    python benchmarks/fuzz.py --plans 10000 --models 10000

Each file is a seeded mutation of a good one: of its bytes, or of its structure (values of other types, huge
numbers, paths that lead away, keys twice, shapes and operators changed). A file must end in success or in a
documented exit code, in one line, in time, with every other file as it was. What does not is counted, and
named by its seed: `--only plan:123` makes that one again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

CHUNK = 100
"""Files to a process: what ends the process itself costs no more than the rest of its chunk's time."""
SECONDS, BYTES = 30, 6 << 30
"""Of the processor, for a command on one file (a busy machine is no hang), and of memory."""
BY_THE_CLOCK = 20
"""As many times the seconds pass by the clock at most: what sleeps hangs as well."""
DOCUMENTED = {0, 2, 3, 4, 5, 6}
NETWORK = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
"""
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "../../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "x" * 100_000, [], {}, [None], {"": {}}, DEEP,
    [[1, 2], 3], "rows", "keep", "checkpoint", "relu", "loss", "sgd:lr=nan", "sgd:lr=-1", "mse",
    "cross_entropy", "cuda:0", "zoo",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What one file did. kind: fine, or traceback, hang, overwritten, crash, undocumented, long."""

    name: str
    kind: str
    code: int
    said: str


class Late(BaseException):
    """The alarm rang; not an Exception, so that nothing takes it for an error of the file's."""


# -- mutations -----------------------------------------------------------------------------------------------


def any_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few changes to bytes: flipped, cut off, left out, put in, doubled."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, size = rng.randrange(len(made) + 1), rng.choice((1, 1, 2, 8, 64))
        way = rng.randrange(5)
        if way == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif way == 1 and rng.random() < 0.2:
            del made[at:]
        elif way == 2:
            del made[at : at + size]
        elif way == 3:
            made[at:at] = rng.randbytes(size)
        else:
            made[at:at] = made[at : at + size]
    return bytes(made)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        found.append((value, key))
        _places(inner, found)
    return found


def some_plan(rng: random.Random, good: bytes) -> bytes:
    """A plan with a few values of another kind, missing, added, moved or twice; or its bytes changed."""
    if rng.random() < 0.25:
        return any_bytes(rng, good)
    data = json.loads(good)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            places = _places(data, [])
        except RecursionError:  # deep in deep
            break
        if not places:
            break
        (holder, key), (other, place) = rng.choice(places), rng.choice(places)
        way = rng.randrange(8)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[rng.choice(("extra", "", "segments", "inside", "store", "predicted"))] = rng.choice(
                HOSTILE
            )
        elif way == 2:
            holder[key] = json.loads(json.dumps(other[place]))
        elif way == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice((-holder[key], holder[key] * 2, holder[key] + 1, holder[key] / 3, 0))
        else:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))  # later changes are in this file alone
    text = json.dumps(data)
    if rng.random() < 0.1:
        key = rng.choice(list(json.loads(good)))
        text = text[:-1] + f', "{key}": {json.dumps(rng.choice(HOSTILE))}}}'
    if rng.random() < 0.02:
        text = text.replace("[", "[" * rng.choice((2, 1000, 100_000)), 1)
    return text.encode("utf-8", "surrogatepass")


def some_model(rng: random.Random, good: bytes) -> bytes:
    """An ONNX file with other operators, wiring, attributes, shapes, types or data; or its bytes changed."""
    import onnx

    if rng.random() < 0.35:
        return any_bytes(rng, good)
    model = onnx.ModelProto.FromString(good)
    for _ in range(rng.choice((1, 1, 2, 3))):
        with contextlib.suppress(IndexError, ValueError, TypeError):  # nothing there to change so
            rng.choice(STRUCTURAL)(rng, model)
    made: bytes = model.SerializeToString()
    return made


BIG = (0, 1, -1, 2, 3, 5, 2**16, 2**31 - 1, 2**40, 2**62, -(2**63))


def _operator(rng: random.Random, model: Any) -> None:
    rng.choice(model.graph.node).op_type = rng.choice(
        ("Relu", "Conv", "MaxPool", "Loop", "If", "Reshape", "Resize", "Nonsense", "", "BatchNormalization",
         "Concat", "Gather", "Softmax", "MatMul", "Range", "Expand", "ConstantOfShape", "Transpose", "Pad"),
    )  # fmt: skip


def _wiring(rng: random.Random, model: Any) -> None:
    node = rng.choice(model.graph.node)
    names = [name for n in model.graph.node for name in (*n.input, *n.output)] + ["", "nobody"]
    ends = rng.choice((node.input, node.output))
    ends[rng.randrange(len(ends))] = rng.choice(names)


def _attribute(rng: random.Random, model: Any) -> None:
    item = rng.choice([a for n in model.graph.node for a in n.attribute])
    item.i, item.f = rng.choice(BIG), rng.choice((float("nan"), float("inf"), -1.0, 1e30))
    if item.ints:
        item.ints[rng.randrange(len(item.ints))] = rng.choice(BIG)
    if rng.random() < 0.3:
        item.type = rng.randrange(15)
    if rng.random() < 0.2:
        item.name = rng.choice(("kernel_shape", "axis", "mode", "to", "value", "body"))


def _shape(rng: random.Random, model: Any) -> None:
    info = rng.choice([*model.graph.input, *model.graph.output])
    rng.choice(info.type.tensor_type.shape.dim).dim_value = rng.choice(BIG)


def _weight(rng: random.Random, model: Any) -> None:
    tensor = rng.choice(model.graph.initializer)
    way = rng.randrange(5)
    if way == 0:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(BIG)
    elif way == 1:
        tensor.data_type = rng.randrange(30)
    elif way == 2:
        tensor.raw_data = any_bytes(rng, tensor.raw_data)
    elif way == 3:
        size = len(tensor.raw_data)
        tensor.raw_data = (b"\x00\x00\xc0\x7f" * (size // 4 + 1))[:size]  # not a number
    else:
        tensor.data_location = 1
        where = rng.choice(("../precious.txt", "/etc/passwd", "precious.txt", "x\0"))
        numbers = str(rng.choice(BIG)), str(rng.choice(BIG))
        for key, value in zip(("location", "offset", "length"), (where, *numbers), strict=True):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value


def _missing(rng: random.Random, model: Any) -> None:
    graph = model.graph
    items = rng.choice((graph.node, graph.initializer, graph.input, graph.output, model.opset_import))
    del items[rng.randrange(len(items))]


def _twice(rng: random.Random, model: Any) -> None:
    items = rng.choice((model.graph.node, model.graph.initializer, model.graph.input, model.graph.output))
    items.add().CopyFrom(rng.choice(items))


def _version(rng: random.Random, model: Any) -> None:
    model.opset_import[0].version = rng.choice((*BIG, 6, 7, 13, 99))
    model.opset_import[0].domain = rng.choice(("", "", "ai.onnx", "com.acme"))
    model.ir_version = rng.choice((model.ir_version, 0, 2**40))


STRUCTURAL: tuple[Callable[[random.Random, Any], None], ...] = (
    _operator, _wiring, _attribute, _attribute, _shape, _weight, _weight, _missing, _twice, _version,
)  # fmt: skip


# -- one file ------------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """The good files, and one that must stay as it is."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from rowtune.importers.source import parse_source
    from rowtune.plan.file import PlanFile, save_plan
    from rowtune.plan.uniform import uniform_plan
    from rowtune.tune.step import define

    (folder / "fuzz_net.py").write_text(NETWORK)
    (folder / "precious.txt").write_text("mine")
    sys.path.insert(0, str(folder))
    work = define(parse_source("fuzz_net:net"), ["1x3x8x6"])
    plans = [uniform_plan(work.graph, *how) for how in (("rows", 4), ("keep",), ("checkpoint",))]
    front = tuple(
        {"peak_bytes": 9000 - i, "step_seconds": 1.0 + i, "decisions": plan.to_dict()}
        for i, plan in enumerate(plans)
    )
    file = PlanFile(work.problem, work.graph.fingerprint, 10**6, plans[0], {"peak_bytes": 9000}, {}, front)
    save_plan(file, folder / "plan.json")
    rng = np.random.default_rng(0)
    stored = {"w": (4, 3, 3, 3), "scale": (4,), "shift": (4,), "mean": (4,), "var": (4,), "v": (2, 4, 1, 1)}
    weights = [numpy_helper.from_array(rng.random(s, np.float32), name) for name, s in stored.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"], epsilon=1e-5),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MaxPool", ["c"], ["d"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["d", "v"], ["y"], dilations=[1, 1], group=1),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in
            (("x", (1, 3, 8, 6)), ("y", (1, 2, 4, 3)))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "model.onnx")


COMMANDS = {
    "plan": (some_plan, "plan.json", (("report", "--no-model"), ("run", "--steps", "1", "--device", "cpu"))),
    "model": (some_model, "model.onnx", (("inspect",),)),
}


def tried(folder: Path, kind: str, seed: int, seconds: float = SECONDS) -> Verdict:
    """Make the file of this seed and give it to the commands that read such files."""
    mutate, good, commands = COMMANDS[kind]
    rng = random.Random(f"{kind}:{seed}")
    path = folder / f"fuzzed{Path(good).suffix}"
    path.write_bytes(mutate(rng, (folder / good).read_bytes()))
    before = _snapshot(folder)
    verdict = Verdict(f"{kind}:{seed}", "fine", 0, "")
    for command, *flags in commands:
        kind_, code, said = _called([command, path.name, *flags], seconds)
        if _snapshot(folder) != before:
            kind_, said = "overwritten", str(sorted(set(_snapshot(folder).items()) ^ set(before.items())))
        verdict = Verdict(verdict.name, kind_, code, said)
        if kind_ != "fine":
            break
    return verdict


@functools.cache
def _app() -> Any:
    """Made of its functions once: that takes a third of the time of a file that is refused."""
    import typer

    from rowtune.cli.app import app

    return typer.main.get_command(app)


def _called(words: list[str], seconds: float) -> tuple[str, int, str]:
    from typer.testing import CliRunner

    rang = []

    def ring(number: int, frame: FrameType | None) -> None:
        rang.append("".join(traceback.format_stack(frame)[-6:]))
        raise Late

    signal.signal(signal.SIGPROF, ring)
    signal.signal(signal.SIGALRM, ring)
    # Again after a second: raised in a destructor, the first one is only printed.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    signal.setitimer(signal.ITIMER_REAL, BY_THE_CLOCK * seconds, 1)
    result: Any = None
    try:
        with mock.patch("typer.testing._get_command", lambda made: made):  # which is one already
            result = CliRunner().invoke(_app(), words)
    except Late:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if rang:
        return "hang", -1, rang[0]
    said, error = result.stderr, result.exception
    lines = [line for line in said.splitlines() if line.startswith("rowtune: ")]
    if "Traceback" in said or (error is not None and not isinstance(error, SystemExit)):
        return "traceback", result.exit_code, said + repr(error)
    if result.exit_code not in DOCUMENTED:
        return "undocumented", result.exit_code, said
    if result.exit_code == 4 and "over the budget" in result.stdout:
        return "fine", 4, ""  # it ran, and took more than its plan's budget
    if result.exit_code and (len(lines) != 1 or len(lines[0]) > 2000):
        return "long", result.exit_code, said[:3000]
    return "fine", result.exit_code, ""


def _snapshot(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


# -- all of them ---------------------------------------------------------------------------------------------


def verdicts(folder: Path, kind: str, seeds: range) -> Iterator[Verdict]:
    """In processes of their own, a chunk each: a file may end its process, and fill its memory."""
    at = seeds.start
    while at < seeds.stop:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _chunk(folder, kind, range(at, min(at + CHUNK, seeds.stop)), write)
        os.close(write)
        with os.fdopen(read) as lines:
            for line in lines:
                yield Verdict(**json.loads(line))
                at += 1
        _, status = os.waitpid(child, 0)
        if status:
            yield Verdict(f"{kind}:{at}", "crash", status, f"the process ended with {status}")
            at += 1


def _chunk(folder: Path, kind: str, seeds: range, out: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what libraries say by themselves
    for seed in seeds:
        verdict = tried(folder, kind, seed)
        os.write(out, (json.dumps(verdict.__dict__) + "\n").encode())
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="one file, as plan:123; it stays where it is made")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="rowtune-fuzz-"))
    os.chdir(folder)
    make(folder)
    if given.only:
        kind, _, seed = given.only.partition(":")
        print(folder, tried(folder, kind, int(seed)))
        return
    try:
        for kind, count in (("plan", given.plans), ("model", given.models)):
            told(folder, kind, range(given.first, given.first + count))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def told(folder: Path, kind: str, seeds: range) -> None:
    """What each of these files did, where it was not fine, and their sums."""
    began, kinds, codes = time.monotonic(), Counter[str](), Counter[int]()
    for verdict in verdicts(folder, kind, seeds):
        kinds[verdict.kind] += 1
        codes[verdict.code] += 1
        if sum(kinds.values()) % 500 == 0:
            print(f"... {verdict.name}: {dict(kinds)}", flush=True)
        if verdict.kind != "fine":
            print(verdict.name, verdict.kind, verdict.code, verdict.said[-1500:], flush=True)
    seconds = time.monotonic() - began
    print(f"{kind}s: {dict(kinds)}, exit codes {dict(sorted(codes.items()))}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
