"""Files that are damaged, hostile or of the wrong kind, and places that cannot be written: for each one clear
line, the documented exit code, in time, and every other file as it was."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from training import MODELS, masks, write_plan
from typer.testing import CliRunner

from rowtune.cli.app import app

WEIGHT = np.random.default_rng(0).random((2, 3, 3, 3), np.float32)


def model(
    path: Path, weight: Any = WEIGHT, size: tuple[Any, ...] = (1, 3, 8, 6), nodes: Any = (), op: str = "Conv"
) -> onnx.ModelProto:
    """One convolution and a ReLU, after what `nodes` say."""
    stored = weight if isinstance(weight, TensorProto) else numpy_helper.from_array(weight, "w")
    made = [
        *(nodes or [helper.make_node("Identity", ["x"], ["i"])]),
        helper.make_node(op, ["i", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, size),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]  # fmt: skip
    graph = helper.make_graph(made, "g", ends[:1], ends[1:], [stored])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(proto.SerializeToString())
    return proto


def external(folder: Path, **entries: str) -> None:
    """A weight that lies elsewhere."""
    stored = numpy_helper.from_array(WEIGHT, "w")
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = stored.external_data.add()
        entry.key, entry.value = key, value
    model(folder / "bad.onnx", stored)


def huge(folder: Path, dims: tuple[int, ...]) -> None:
    """A weight that says it is larger than its data."""
    model(
        folder / "bad.onnx",
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 16),
    )


def constant(folder: Path, op: str, *sizes: int) -> None:
    """A few bytes that stand for terabytes."""
    shape = numpy_helper.from_array(np.array(sizes, np.int64), "n")
    given = [helper.make_node("Constant", [], ["n"], value=shape), helper.make_node(op, ["n"], ["big"])]
    if op == "Expand":
        given[1] = helper.make_node("Expand", ["x", "n"], ["big"])
    model(folder / "bad.onnx", nodes=[*given, helper.make_node("Add", ["x", "big"], ["i"])])


def archive(path: Path, *names: str, size: int = 1 << 20) -> None:
    """A zip whose members are zeros, a thousandth as long as what they say."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in names:
            out.writestr(name, b"\0" * size)


def cut(folder: Path, name: str, share: float = 0.5) -> None:
    data = (folder / name).read_bytes()
    (folder / f"bad{Path(name).suffix}").write_bytes(data[: int(len(data) * share)])


def plan(folder: Path, **changes: Any) -> None:
    """The good plan with other values; a dotted key lies deeper."""
    data = json.loads((folder / "plan.json").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        at = data
        for part in path:
            at = at[int(part) if part.isdigit() else part]
        at[last] = value
    (folder / "bad.json").write_text(json.dumps(data))


def text(folder: Path, change: Callable[[str], str]) -> None:
    (folder / "bad.json").write_text(change((folder / "plan.json").read_text()))


def png(path: Path, wide: int, high: int) -> None:
    """A picture that says it is so large, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def pictures(folder: Path, spoil: Callable[[Path], Any]) -> None:
    """Images and masks, of which one is spoilt."""
    shutil.copytree(folder / "pictures", folder / "bad")
    spoil(folder / "bad")


def volume(folder: Path, kind: str, shape: str) -> None:
    """An .npy file of this type and shape and no data, in the place of an image."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text = header.encode().ljust(118) + b"\n"
    (folder / "images" / "0.png").unlink()
    (folder / "images" / "0.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


def checkpoint(folder: Path, spoil: Callable[[Path], Any]) -> None:
    """What two steps left, spoilt."""
    done = CliRunner().invoke(app, [*RUN, "--data", "pictures", "--steps", "2", "--checkpoint", "bad"])
    assert done.exit_code == 0, done.output
    spoil(folder / "bad" / "step-00000002")


class Bad(NamedTuple):
    """How it comes about, the command that meets it, its exit code, and what the line says."""

    make: Callable[[Path], Any]
    words: list[str]
    code: int
    says: str


RUN = ["run", "plan.json", "--steps", "2"]
INSPECT = ["inspect", "bad.onnx"]
BAD = ["run", "bad.json", "--steps", "1"]
DATA = ["run", "plan.json", "--data", "bad", "--epochs", "1"]
RESUME = [*RUN, "--data", "pictures", "--checkpoint", "bad", "--resume", "--steps", "4"]
NAN = np.full_like(WEIGHT, np.nan)
LINK = "bad.bin"

CASES: dict[str, Bad] = {
    # ONNX files
    "a cut off model": Bad(lambda f: cut(f, "good.onnx"), INSPECT, 3, "bad.onnx"),
    "a model of zeros": Bad(lambda f: (f / "bad.onnx").write_bytes(b"\0" * 999), INSPECT, 3, "bad.onnx"),
    "a plan as a model": Bad(lambda f: shutil.copy("plan.json", f / "bad.onnx"), INSPECT, 3, "bad.onnx"),
    "a folder as a model": Bad(lambda f: (f / "bad.onnx").mkdir(), INSPECT, 2, "not a file"),
    "a zip as a model": Bad(lambda f: archive(f / "bad.onnx", "a"), INSPECT, 3, "bad.onnx"),
    "an unknown operator": Bad(lambda f: model(f / "bad.onnx", op="Nonsense"), INSPECT, 3, "Nonsense"),
    "an operator without its attributes": Bad(
        lambda f: model(f / "bad.onnx", op="Scan"), INSPECT, 3, "num_scan_inputs"
    ),
    "an input without rows": Bad(lambda f: model(f / "bad.onnx", size=(1, 3, 0, 6)), INSPECT, 2, "--shape"),
    "a negative size": Bad(lambda f: model(f / "bad.onnx", size=(1, 3, -8, 6)), INSPECT, 2, "--shape"),
    "an input beyond memory": Bad(
        lambda f: model(f / "bad.onnx", size=(1, 3, 2**31 - 1, 2**31 - 1)), INSPECT, 2, "any memory"
    ),
    "a weight without elements": Bad(
        lambda f: model(f / "bad.onnx", np.zeros((0, 3, 3, 3), np.float32)), INSPECT, 3, ""
    ),
    "a weight that says it is huge": Bad(lambda f: huge(f, (2**40, 3, 3, 3)), INSPECT, 3, "bad.onnx"),
    "a weight of negative size": Bad(lambda f: huge(f, (-2, 3, 3, 3)), INSPECT, 3, "bad.onnx"),
    "a constant of terabytes": Bad(lambda f: constant(f, "ConstantOfShape", 2**20, 2**22), INSPECT, 3, ""),
    "an expansion to terabytes": Bad(lambda f: constant(f, "Expand", 2**20, 2**20, 8, 6), INSPECT, 3, ""),
    "data in the folder above": Bad(lambda f: external(f, location="../mine.bin"), INSPECT, 3, "outside"),
    "data at the root": Bad(lambda f: external(f, location="/etc/passwd"), INSPECT, 3, "outside"),
    "data behind a link": Bad(
        lambda f: ((f / LINK).symlink_to("/etc/passwd"), external(f, location=LINK)), INSPECT, 3, "outside"
    ),
    "data past their end": Bad(
        lambda f: external(f, location="precious.txt", offset="2", length="99999"), INSPECT, 3, "cut off"
    ),
    "weights that are no numbers": Bad(
        lambda f: (model(f / "bad.onnx", NAN), write_plan(f / "bad.json", "bad.onnx", "1x3x8x6")),
        BAD, 6, "the loss is nan",
    ),
    # .pt2 files
    "a bomb as a .pt2 file": Bad(
        lambda f: archive(f / "bad.pt2", "archive_format", "models/model.json", "version"),
        ["inspect", "bad.pt2"], 3, "bad.pt2",
    ),
    "a state dict as a .pt2 file": Bad(
        lambda f: torch.save({"w": torch.zeros(3)}, f / "bad.pt2"), ["inspect", "bad.pt2"], 3, "bad.pt2"
    ),
    # plans
    "a cut off plan": Bad(lambda f: cut(f, "plan.json"), BAD, 5, "bad.json"),
    "an empty plan": Bad(lambda f: (f / "bad.json").write_bytes(b""), BAD, 5, "bad.json"),
    "a list as a plan": Bad(lambda f: text(f, lambda t: f"[{t}]"), BAD, 5, "JSON object"),
    "a plan of bytes": Bad(lambda f: (f / "bad.json").write_bytes(b"\xff\xfe\0{"), BAD, 5, "bad.json"),
    "a model as a plan": Bad(lambda f: shutil.copy("good.onnx", f / "bad.json"), BAD, 5, "bad.json"),
    "a folder as a plan": Bad(lambda f: (f / "bad.json").mkdir(), BAD, 2, "bad.json"),
    "brackets without end": Bad(lambda f: (f / "bad.json").write_text("[" * 200_000), BAD, 5, "bad.json"),
    "segments in segments without end": Bad(
        lambda f: text(f, lambda t: t.replace('"segments": [', '"inside": [' + '[' * 5000, 1)), BAD, 5, ""
    ),
    "NaN in a plan": Bad(lambda f: text(f, lambda t: t.replace("1000000000", "NaN")), BAD, 5, "NaN"),
    "a budget without end": Bad(lambda f: plan(f, budget_bytes=10**400), BAD, 5, "budget_bytes"),
    "a number of 10,000 digits": Bad(
        lambda f: text(f, lambda t: t.replace("1000000000", "9" * 10_000)), BAD, 5, "bad.json"
    ),
    "a key twice": Bad(
        lambda f: text(f, lambda t: t.replace("{", '{"budget_bytes": 1, ', 1)), BAD, 5, "'budget_bytes'"
    ),
    "a budget of true": Bad(lambda f: plan(f, budget_bytes=True), BAD, 5, "budget_bytes"),
    "threads without end": Bad(lambda f: plan(f, threads=2**20), BAD, 5, "threads is at most 1024"),
    "a seed of text": Bad(lambda f: plan(f, seed="0"), BAD, 5, "seed"),
    "a seed past 64 bits": Bad(lambda f: plan(f, seed=2**70), BAD, 5, "seed"),
    "a batch of none": Bad(lambda f: plan(f, inputs__0__shape=[0, 3, 16, 12]), BAD, 5, "shape"),
    "an input of half a row": Bad(lambda f: plan(f, inputs__0__shape=[1, 3, 1.5, 12]), BAD, 5, "shape"),
    "an unknown loss": Bad(lambda f: plan(f, loss="hinge"), BAD, 5, "hinge"),
    "a rate that is no number": Bad(lambda f: plan(f, optimizer="sgd:lr=nan"), BAD, 5, "lr"),
    "an axis that is not there": Bad(lambda f: plan(f, decisions__axis=7), BAD, 5, "nothing in it has rows"),
    "bands of minus one": Bad(lambda f: plan(f, decisions__segments__0__band_rows=-1), BAD, 5, "band_rows"),
    "a front of nonsense": Bad(
        lambda f: plan(f, front=[{"peak_bytes": "x", "step_seconds": 1, "decisions": {"segments": []}}]),
        ["report", "bad.json", "--no-model"], 5, "peak_bytes",
    ),
    "another's records": Bad(
        lambda f: plan(f, study="../../../etc/passwd"), ["report", "bad.json", "--no-model"], 5, "study"
    ),
    "a device of no kind": Bad(lambda f: plan(f, device="tpu"), BAD, 5, "tpu"),
    "a model that is not there": Bad(
        lambda f: plan(f, model={"kind": "onnx", "source": "../gone.onnx", "args": {}}), BAD, 5, "gone.onnx"
    ),
    # data
    "an image that says it is huge": Bad(
        lambda f: pictures(f, lambda d: png(d / "images" / "0.png", 60_000, 60_000)), DATA, 2, "0.png"
    ),
    "a cut off image": Bad(
        lambda f: pictures(f, lambda d: (d / "images" / "0.png").write_bytes(b"\x89PNG\r\n")),
        DATA, 2, "0.png",
    ),
    "a volume that says it is huge": Bad(
        lambda f: pictures(f, lambda d: volume(d, "<f4", "(3, 9999999, 9999999)")),
        DATA, 2, "0.npy",
    ),
    "a volume with code in it": Bad(
        lambda f: pictures(f, lambda d: volume(d, "|O", "(1,)")),
        DATA, 2, "0.npy",
    ),
    "an image without its mask": Bad(
        lambda f: pictures(f, lambda d: (d / "masks" / "1.png").unlink()), DATA, 2, "images/1 has no count"
    ),
    # checkpoints
    "a cut off checkpoint": Bad(
        lambda f: checkpoint(f, lambda d: (d / "state.pt").write_bytes((d / "state.pt").read_bytes()[:999])),
        RESUME, 2, "is damaged",
    ),
    "a bomb as a checkpoint": Bad(
        lambda f: checkpoint(f, lambda d: archive(d / "state.pt", "state/data.pkl", "state/version")),
        RESUME, 2, "is damaged",
    ),
    "weights that say they are huge": Bad(
        lambda f: checkpoint(
            f, lambda d: (d / "weights.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
        ),
        RESUME, 2, "is damaged",
    ),
    # places and runs
    "an output that is a device": Bad(
        lambda f: None, ["search", "run_models:Pixels", "--shape", "1x3x16x12", "--budget", "1GB", "-o",
                         "/dev/full"], 2, "/dev/full",
    ),
    "a loss that is no number": Bad(lambda f: None, [*RUN, "--lr", "1e30", "--steps", "9"], 6, "the loss is"),
    "a card that is not here": Bad(lambda f: None, [*RUN, "--device", "cuda:7"], 2, "cuda:7"),
    "a shape without rows": Bad(lambda f: None, [*RUN, "--shape", "1x3x0x12"], 2, "at least 1"),
    "a shape beyond memory": Bad(lambda f: None, [*RUN, "--shape", "1x3x9999999x9999999"], 2, "does not fit"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bad") / "inner"
    path.mkdir()
    (path / "run_models.py").write_text(MODELS)
    (path / "precious.txt").write_text("mine")
    (path.parent / "mine.bin").write_bytes(b"\0" * 1000)
    model(path / "good.onnx")
    masks(path / "pictures", count=3)
    before = Path.cwd()
    os.chdir(path)
    sys.path.insert(0, str(path))
    write_plan(path / "plan.json", "run_models:Pixels", "1x3x16x12")
    yield path
    os.chdir(before)
    sys.path.remove(str(path))
    sys.modules.pop("run_models", None)


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("name", CASES)
def test_bad(folder: Path, name: str) -> None:
    make, words, code, says = CASES[name]
    try:
        make(folder)
        before = contents(folder)
        result = CliRunner().invoke(app, words)
        after = contents(folder)
    finally:
        for path in folder.glob("bad*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    ours = [line for line in result.stderr.splitlines() if line.startswith("rowtune: ")]
    assert len(ours) == 1 and says in ours[0], result.output
    assert "Traceback" not in result.output and len(ours[0]) < 1300
    assert after == before


def test_there_are_forty_kinds() -> None:
    assert len(CASES) >= 40
